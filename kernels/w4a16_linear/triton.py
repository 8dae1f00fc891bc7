"""Triton implementation of ``w4a16_linear``: which kernel takes which shapes, and with what tiles.

========================  =======================================================================
rows of x                 kernel
========================  =======================================================================
up to ``FEW_ROWS``        :mod:`.stream_rows` or :mod:`.direct_rows` (Hopper, group size 128), or
                          :mod:`.few_rows`: the weight read once
up to ``MID_ROWS``        :mod:`.mid_rows`: x reordered, ``wgmma``, split channels added (Hopper)
more                      :mod:`.many_rows` (Hopper, group size 128) where :mod:`.many_schedule`
                          expects it to be faster; else :mod:`.dequantize`, then the library's
                          16-bit product
float32 x, any number     :mod:`.full_precision`
========================  =======================================================================

Every kernel sums in float32 in a fixed order, so results do not vary from run to run. Up to
``MID_ROWS`` weights are never rounded; beyond, each is rounded once to x's dtype, as eager code does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..triton_support import (
    Reason,
    cdiv,
    check_launch,
    interpreting,
    next_power_of_2,
    on_device,
    processors,
    tl,
)
from .dequantize import dequantize_rows
from .direct import direct, direct_tiles
from .few_rows import few_rows
from .full_precision import full_few_rows, full_many_rows
from .many import multiplies, multiply
from .mid_rows import mid_rows, reorder_x, sum_splits
from .packing import GROUP_SIZES
from .reference import ACTIVATION_DTYPES, check_args
from .stream import stream, stream_tiles, streams

FEW_ROWS = 8
"""Up to this many rows of x, decode above all, the kernel for a few rows takes them."""

MID_ROWS = 512
"""From more rows on, writing the weight out in 16 bits costs less than it saves."""

FULL_FEW_ROWS = 4
"""Up to this many rows of a float32 x are taken without blocks of x."""

SCRATCH_BYTES = 320 << 20
"""The most memory that weights written out in 16 bits may take; a larger weight is done in parts."""

_HOPPER = (9, 0)


class Weight(NamedTuple):
    """A stored weight, contiguous, and what it means."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    group_size: int

    @property
    def outputs(self) -> int:
        return self.qweight.shape[0]

    @property
    def groups(self) -> int:
        return self.scales.shape[1]


WIDE = 16384
"""Outputs from which on rows of the weight alone keep a GPU busy."""

LONG = 64
"""Groups from which on a row of the weight is worth more warps than programs."""


class FewTiles(NamedTuple):
    """Sizes of :func:`.few_rows.few_rows`; named as there."""

    tokens: int
    side: int  # S
    rows: int  # R
    warps: int
    steps: int  # J

    @property
    def outputs(self) -> int:
        """Rows of the weight that one program takes."""
        return self.rows * 8 // self.side


def few_tiles(rows: int, outputs: int, groups: int, multiprocessors: int) -> FewTiles:
    """Sizes for ``rows`` tokens and a weight of ``outputs`` rows of ``groups`` groups; measured."""
    tokens = next_power_of_2(rows)
    wide, long = outputs >= WIDE, groups >= LONG
    if tokens == 1:
        return FewTiles(1, 8, 8, 1, 1) if wide else FewTiles(1, 8, 4, 2, 1)
    if tokens < 8:
        return FewTiles(tokens, 8 // tokens, 4, 2 if wide else 2 * tokens, 1)
    if wide:
        return FewTiles(8, 1, 8, 4, 1)
    if long:
        return FewTiles(8, 1, 2, 8, 2)
    two_steps = cdiv(outputs, 16) <= 2 * multiprocessors
    return FewTiles(8, 2, 4, 4, 2 if two_steps else 1)


class MidTiles(NamedTuple):
    """Sizes of :func:`.mid_rows.mid_rows`; named as there."""

    block_m: int
    warps: int
    splits: int
    stages: int


def mid_tiles(rows: int, outputs: int, groups: int, multiprocessors: int) -> MidTiles:
    """Sizes for ``rows`` tokens and a weight of ``outputs`` rows of ``groups`` groups; measured."""
    block_m = min(max(next_power_of_2(rows), 16), 128)
    warps = 8 if block_m <= 32 and outputs < WIDE and groups >= LONG else 4
    programs = cdiv(rows, block_m) * cdiv(outputs, 16 * warps)
    most = multiprocessors * (18 if block_m <= 32 else 9 if block_m == 64 else 8) // 4
    splits = 1
    while splits < 8 and 2 * splits * programs <= most and groups >= 8 * splits:
        splits *= 2
    splits = cdiv(groups, cdiv(groups, splits))  # none without channels
    stages = 4 if block_m <= 64 and programs * splits <= 2 * multiprocessors else 3
    return MidTiles(block_m, warps, splits, stages)


def supports_args(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> Reason:
    """Why these arguments cannot be taken, or None. Looks at dtypes only."""
    if x.dtype not in ACTIVATION_DTYPES:
        return f"x is {x.dtype}"
    if group_size not in GROUP_SIZES:
        return f"group_size is {group_size}"
    floats = (scales,) if bias is None else (scales, bias)
    for tensor in floats:
        if tensor.dtype not in ACTIVATION_DTYPES:
            return f"scales or bias are {tensor.dtype}"
    return None


def _hopper(x: torch.Tensor) -> bool:
    """Whether the GPU has wgmma, the tensor memory accelerator and early launches."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= _HOPPER


def _early(early: bool) -> dict[str, Any]:
    """Launch options: kernels that wait for their predecessor themselves may start before its end.

    They read nothing that another kernel wrote, and write nothing, before ``gdc_wait``.
    """
    return {"launch_pdl": True} if early else {}


def _few(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    outputs, groups = weight.outputs, weight.groups
    if streams(x.device, x.dtype, weight.group_size):
        stored = weight.qweight, weight.scales, weight.zero_points, bias, out
        sizes = x.shape[0], outputs, groups
        if (straight := direct_tiles(*sizes)) is not None:
            direct(x, *stored, straight)
            return
        if (streamed := stream_tiles(*sizes, processors(x.device))) is not None:
            stream(x, *stored, streamed)
            return
    tiles = few_tiles(x.shape[0], outputs, groups, processors(x.device))
    hopper = _hopper(x)
    few_rows[(cdiv(outputs, tiles.outputs),)](
        x,
        weight.qweight.view(torch.int16),
        weight.scales,
        weight.zero_points,
        out if bias is None else bias,
        out,
        x.shape[0],
        outputs,
        groups,
        x.stride(0),
        GROUP=weight.group_size,
        HAS_BIAS=bias is not None,
        # Of more than this the programs that come first would ask for too much at once.
        PREFETCH=hopper and outputs < WIDE and groups < LONG,
        EARLY=hopper,
        TOKENS=tiles.tokens,
        S=tiles.side,
        R=tiles.rows,
        W=tiles.warps,
        J=tiles.steps,
        KW=8,
        num_warps=tiles.warps,
        num_stages=1,
        **_early(hopper),
    )


def _mid(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, outputs, groups, group_size = x.shape[0], weight.outputs, weight.groups, weight.group_size
    tiles = mid_tiles(rows, outputs, groups, processors(x.device))
    early = _hopper(x)
    ordered = torch.empty((rows, x.shape[1]), dtype=x.dtype, device=x.device)
    reorder_x[(cdiv(rows * groups, 16),)](
        x,
        ordered,
        rows * groups,
        groups,
        x.stride(0),
        GROUP=group_size,
        EARLY=early,
        BLOCK=16,
        num_warps=4,
        **_early(early),
    )
    parts = out
    if tiles.splits > 1:
        parts = torch.empty((tiles.splits, rows, outputs), dtype=torch.float32, device=x.device)
    block_n = 16 * tiles.warps
    codes = weight.qweight.view(torch.int16)
    mid_rows[(cdiv(outputs, block_n) * cdiv(rows, tiles.block_m), tiles.splits)](
        TensorDescriptor.from_tensor(ordered, [tiles.block_m, group_size]),
        TensorDescriptor.from_tensor(codes, [block_n, group_size // 4]),
        weight.scales,
        weight.zero_points,
        out if bias is None else bias,
        parts,
        rows,
        outputs,
        groups,
        GROUP=group_size,
        DTYPE=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        HAS_BIAS=bias is not None and tiles.splits == 1,
        EARLY=early,
        SPLITS=tiles.splits,
        BLOCK_M=tiles.block_m,
        W=tiles.warps,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_early(early),
    )
    if tiles.splits > 1:
        sum_splits(parts, bias, out)


def _many(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """One kernel; or the weight written out in x's dtype, a part at a time, and the library's product."""
    outputs, channels, groups = weight.outputs, x.shape[1], weight.groups
    available = processors(x.device)
    if multiplies(x, weight.scales, weight.group_size, available):
        multiply(x, weight.qweight, weight.scales, weight.zero_points, bias, out, available)
        return
    dtype = torch.float32 if interpreting() else x.dtype
    tokens = x.to(dtype)
    part = min(outputs, max(1, SCRATCH_BYTES // (channels * dtype.itemsize)))
    part = cdiv(outputs, cdiv(outputs, part))
    scratch = torch.empty((part, channels), dtype=dtype, device=x.device)
    block = 1024 // weight.group_size  # four words for each of 32 threads
    for start in range(0, outputs, part):
        rows = min(part, outputs - start)
        chosen = slice(start, start + rows)
        dequantize_rows[(cdiv(rows * groups, block),)](
            weight.qweight[chosen],
            weight.scales[chosen],
            weight.zero_points[chosen],
            scratch,
            rows * groups,
            GROUP=weight.group_size,
            BLOCK=block,
            num_warps=1,
        )
        place, written = out[:, chosen], scratch[:rows].T
        if bias is not None and bias.dtype == dtype:
            torch.addmm(bias[chosen], tokens, written, out=place)
        else:
            torch.mm(tokens, written, out=place)
            if bias is not None:
                place.copy_(place.float() + bias[chosen].float())


def _full(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    rows, channels, outputs = x.shape[0], x.shape[1], weight.outputs
    tensors = (
        x,
        weight.qweight,
        weight.scales,
        weight.zero_points,
        out if bias is None else bias,
        out,
    )
    sizes = (rows, outputs, channels, x.stride(0))
    common = {"GROUP": weight.group_size, "HAS_BIAS": bias is not None, "num_warps": 4}
    if rows <= FULL_FEW_ROWS:
        block_m = next_power_of_2(rows)
        block_n = 16 if block_m <= 2 else 8
        full_few_rows[(cdiv(outputs, block_n),)](
            *tensors,
            *sizes,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_W=min(128, next_power_of_2(channels // 8)),
            **common,
        )
        return
    block_m = 16 if rows <= 16 else 64
    full_many_rows[(cdiv(rows, block_m) * cdiv(outputs, 32),)](
        *tensors, *sizes, BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=32, **common
    )


def _copyable(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and where copies of tiles may start: at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def w4a16_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """As :func:`.reference.w4a16_linear`, on CUDA or in Triton's interpreter.

    Raises:
        ValueError: the arguments do not fit one another.
        RuntimeError: the tensors' device cannot run Triton kernels.
    """
    check_args(x, qweight, scales, zero_points, bias, group_size)
    check_launch("w4a16_linear", x)
    outputs, channels = qweight.shape[0], x.shape[-1]
    rows = x.numel() // channels
    flat = x.reshape(rows, channels)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    # The interpreter truncates where a GPU rounds to bfloat16: there PyTorch does the rounding.
    out_dtype = torch.float32 if interpreting() else x.dtype
    out = torch.empty((rows, outputs), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out.to(x.dtype).view(*x.shape[:-1], outputs)
    weight = Weight(_copyable(qweight), _copyable(scales), _copyable(zero_points), group_size)
    if bias is not None:
        bias = bias.contiguous()
    if x.dtype == torch.float32:
        run = _full
    elif rows <= FEW_ROWS:
        run = _few
    elif rows <= MID_ROWS and (interpreting() or _hopper(x)):
        run = _mid
    else:
        run = _many
    with on_device(x):
        run(flat, weight, bias, out)
    return out.to(x.dtype).view(*x.shape[:-1], outputs)
