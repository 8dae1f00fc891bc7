"""Triton: the stored weight becomes a float8 matrix in scratch memory, cuBLAS or ``w8a8_linear`` multiplies it.

Unpacking reads half a byte and writes one for each weight, a few percent of the product's time from
a thousand rows on, and lets the product be the plain one of whole tiles.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..registry import Reason
from ..triton_support import (
    cdiv,
    check_launch,
    interpreting,
    next_power_of_2,
    on_device,
    tl,
    triton,
)
from ..w4a16_linear.reference import check_args
from ..w4a16_linear.triton import supports_args as w4a16_supports
from ..w4a16_linear.triton import w4a16_linear
from ..w8a8_linear.library import float8_linear, float8_shapes
from ..w8a8_linear.rounding import FLOOR, LARGEST
from ..w8a8_linear.triton import _to_float8, float8_missing, w8a8_linear
from .reference import CODE

_FLOOR = tl.constexpr(FLOOR)
_LARGEST = tl.constexpr(LARGEST[CODE])


@triton.jit
@no_type_check
def _unpack(
    qweight,  # int32 [N, K // 8]
    scales,  # [N, K // GROUP]
    zero_points,  # uint8 [N, K // GROUP]
    out,  # float8 [N, K]
    channel_scales,  # float32 [N]
    N,
    K,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,  # >= K // GROUP
    BLOCK_W: tl.constexpr,  # words of eight codes
):
    """One program: BLOCK_N output channels, all of K."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    words, groups = K // 8, K // GROUP
    g = tl.arange(0, BLOCK_G)
    there = (n[:, None] < N) & (g[None, :] < groups)
    at = n[:, None] * groups + g[None, :]
    scale = tl.abs(tl.load(scales + at, mask=there, other=0.0).to(tl.float32))
    zero = tl.load(zero_points + at, mask=there, other=0).to(tl.int32)
    reach = tl.maximum(zero, 15 - zero).to(tl.float32)
    top = tl.maximum(tl.max(scale * reach, 1), _FLOOR)
    tl.store(channel_scales + n, tl.div_rn(top, _LARGEST), mask=n < N)
    inverse = tl.div_rn(_LARGEST, top)[:, None, None]
    shifts = tl.arange(0, 8) * 4
    for start in range(0, words, BLOCK_W):
        j = start + tl.arange(0, BLOCK_W)
        inside = (n[:, None] < N) & (j[None, :] < words)
        word = tl.load(qweight + n[:, None] * words + j[None, :], mask=inside, other=0)
        group = n[:, None] * groups + j[None, :] // (GROUP // 8)
        factor = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
        offset = 8388608.0 + tl.load(zero_points + group, mask=inside, other=0).to(tl.float32)
        # 2^23 + code as the bits of a float: no integer-to-float conversion, which is slow.
        bits = ((word[:, :, None] >> shifts[None, None, :]) & 15) | 0x4B000000
        code = bits.to(tl.float32, bitcast=True) - offset[:, :, None]
        value = _to_float8(code * factor[:, :, None] * inverse)
        where = out + n[:, None, None] * K + (j[None, :, None] * 8 + tl.arange(0, 8)[None, None, :])
        tl.store(where, value, mask=inside[:, :, None])


def to_float8(
    qweight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`.reference.to_float8`, on CUDA or in Triton's interpreter."""
    rows, channels = qweight.shape[0], qweight.shape[1] * 8
    codes = torch.empty((rows, channels), dtype=CODE, device=qweight.device)
    channel_scales = torch.empty(rows, dtype=torch.float32, device=qweight.device)
    block_n = 4
    with on_device(qweight):
        _unpack[(cdiv(rows, block_n),)](
            qweight.contiguous(),
            scales.contiguous(),
            zero_points.contiguous(),
            codes,
            channel_scales,
            rows,
            channels,
            GROUP=group_size,
            BLOCK_N=block_n,
            BLOCK_G=next_power_of_2(channels // group_size),
            BLOCK_W=min(128, next_power_of_2(channels // 8)),
            num_warps=4,
        )
    return codes, channel_scales


def supports_args(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    min_rows: int,
) -> Reason:
    """Why these arguments cannot be taken, or None. Looks at dtypes and the device only."""
    reason = w4a16_supports(x, qweight, scales, zero_points, bias, group_size)
    return reason or float8_missing(x.device)


def w4a8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    min_rows: int,
) -> torch.Tensor:
    """As :func:`.reference.w4a8_linear`, on CUDA or in Triton's interpreter.

    Takes N × K bytes of scratch memory where it multiplies in float8.

    Raises:
        ValueError: the arguments do not fit one another.
        RuntimeError: the tensors' device cannot run Triton kernels.
    """
    check_args(x, qweight, scales, zero_points, bias, group_size)
    check_launch("w4a8_linear", x)
    if x.numel() // x.shape[-1] < min_rows:
        return w4a16_linear(x, qweight, scales, zero_points, bias, group_size)
    codes, channel_scales = to_float8(qweight, scales, zero_points, group_size)
    stock = not interpreting() and float8_shapes(x, codes, channel_scales, bias) is None
    return (float8_linear if stock else w8a8_linear)(x, codes, channel_scales, bias)
