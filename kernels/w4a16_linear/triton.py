"""Triton kernels of ``w4a16_linear``: one for a few rows of x, one for many.

Both read the stored words once per tile and sum in float32 in a fixed order; no partial sums cross
programs, so results do not vary from run to run.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..triton_support import (
    Reason,
    cdiv,
    check_launch,
    dot,
    dot_precision,
    interpreting,
    next_power_of_2,
    on_device,
    tl,
    triton,
)
from .packing import GROUP_SIZES
from .reference import ACTIVATION_DTYPES, check_args

FEW_ROWS = 4
"""Up to this many rows of x, decode above all, are multiplied without matrix instructions."""


@triton.jit
@no_type_check
def _few_rows(
    x,  # [M, K], rows stride_xm apart
    qweight,  # int32 [N, K // 8]
    scales,  # [N, K // GROUP]
    zero_points,  # uint8 [N, K // GROUP]
    bias,  # [N] or unused
    out,  # [M, N]
    M,
    N,
    K,
    stride_xm,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FOLD: tl.constexpr,  # subtract zero points once per word: faster, some 1e-6 less exact
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,  # words of eight codes
):
    """One program: all of K for BLOCK_N outputs of BLOCK_M rows, reduced across threads once."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    words, groups = K // 8, K // GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, words, BLOCK_W):
        j = start + tl.arange(0, BLOCK_W)
        in_weight = (n[:, None] < N) & (j[None, :] < words)
        in_x = (m[:, None] < M) & (j[None, :] < words)
        word = tl.load(qweight + n[:, None] * words + j[None, :], mask=in_weight, other=0)
        group = n[:, None] * groups + j[None, :] // (GROUP // 8)
        scale = tl.load(scales + group, mask=in_weight, other=0.0).to(tl.float32)
        offset = 16.0 + tl.load(zero_points + group, mask=in_weight, other=0).to(tl.float32)
        x_word = x + m[:, None] * stride_xm + j[None, :] * 8
        product = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_W), dtype=tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
        for i in tl.static_range(8):
            xi = tl.load(x_word + i, mask=in_x, other=0.0).to(tl.float32)
            # The code in the top bits of a float's fraction, with the exponent of 16, is exactly
            # 16 + code: no integer-to-float conversion, which runs at a quarter of the rate.
            if i < 5:
                shifted = word << (19 - 4 * i)
            else:
                shifted = word >> (4 * i - 19)
            code = ((shifted & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)
            if FOLD:
                product += xi[:, None, :] * code[None, :, :]
                total += xi
            else:
                product += xi[:, None, :] * (code - offset)[None, :, :]
        if FOLD:
            product -= offset[None, :, :] * total[:, None, :]
        acc += scale[None, :, :] * product
    result = tl.sum(acc, axis=2)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :],
        result.to(out.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


@triton.jit
@no_type_check
def _many_rows(
    x,  # [M, K], rows stride_xm apart
    qweight,  # int32 [N, K // 8]
    scales,  # [N, K // GROUP]
    zero_points,  # uint8 [N, K // GROUP]
    bias,  # [N] or unused
    out,  # [M, N]
    M,
    N,
    K,
    stride_xm,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP, hence K
):
    """One program: a BLOCK_M x BLOCK_N tile of the output over all of K.

    ``code - zero_point`` is exact in 16 bits, so the product is taken of those integers and scaled
    in float32: the weight is never rounded to x's dtype.
    """
    # Neighbouring programs share a tile of the weight, which costs more to make than one of x.
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = ((tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = ((tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    words, groups = K // 8, K // GROUP
    j = tl.arange(0, BLOCK_K // 8)
    k = tl.arange(0, BLOCK_K)
    shifts = tl.arange(0, 8) * 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        tile = tl.load(
            x + m[:, None] * stride_xm + (start + k)[None, :], mask=m[:, None] < M, other=0.0
        )
        word = tl.load(
            qweight + n[:, None] * words + (start // 8 + j)[None, :], mask=n[:, None] < N, other=0
        )
        group = n * groups + start // GROUP
        scale = tl.load(scales + group, mask=n < N, other=0.0).to(tl.float32)
        zero = tl.load(zero_points + group, mask=n < N, other=0).to(tl.int32)
        codes = (word[:, :, None] >> shifts[None, None, :]) & 15
        # By way of float32: the interpreter cannot cast integers to bfloat16.
        weight = (tl.reshape(codes, (BLOCK_N, BLOCK_K)) - zero[:, None]).to(tl.float32)
        weight = tl.trans(weight.to(x.dtype.element_ty))
        product = dot(tile, weight, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION)
        acc += product * scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :],
        acc.to(out.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


def _tile(rows: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """``(BLOCK_M, BLOCK_N, num_warps)`` of the many-row kernel."""
    if dtype == torch.float32:  # full-precision products take no matrix instructions: small tiles
        return (16, 32, 4) if rows <= 16 else (64, 32, 4)
    if rows <= 64:  # few tiles along M: narrow ones along N keep the GPU busy
        return max(16, next_power_of_2(rows)), 32, 4
    return (64, 64, 4) if rows <= 256 else (128, 128, 8)


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
    tensors = (
        flat,
        qweight.contiguous(),
        scales.contiguous(),
        zero_points.contiguous(),
        out if bias is None else bias.contiguous(),
        out,
    )
    sizes = (rows, outputs, channels, flat.stride(0))
    with on_device(x):
        if rows <= FEW_ROWS:
            block_m = next_power_of_2(rows)
            block_n = 16 if block_m <= 2 else 8
            _few_rows[(cdiv(outputs, block_n),)](
                *tensors,
                *sizes,
                GROUP=group_size,
                HAS_BIAS=bias is not None,
                FOLD=x.dtype != torch.float32,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_W=min(128, next_power_of_2(channels // 8)),
                num_warps=4,
            )
        else:
            block_m, block_n, num_warps = _tile(rows, x.dtype)
            _many_rows[(cdiv(rows, block_m) * cdiv(outputs, block_n),)](
                *tensors,
                *sizes,
                GROUP=group_size,
                HAS_BIAS=bias is not None,
                PRECISION=dot_precision(x.dtype),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=min(group_size, 32 if x.dtype == torch.float32 else 64),
                num_warps=num_warps,
            )
    return out.to(x.dtype).view(*x.shape[:-1], outputs)
