"""The kernels for float32 x: full float32 products, for which there are no matrix instructions."""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import dot, tl, triton


@triton.jit
@no_type_check
def full_few_rows(
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
        for i in tl.static_range(8):
            xi = tl.load(x_word + i, mask=in_x, other=0.0).to(tl.float32)
            # The code in the top bits of a float's fraction, with the exponent of 16, is exactly
            # 16 + code: no integer-to-float conversion, which runs at a quarter of the rate.
            if i < 5:
                shifted = word << (19 - 4 * i)
            else:
                shifted = word >> (4 * i - 19)
            code = ((shifted & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)
            product += xi[:, None, :] * (code - offset)[None, :, :]
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
def full_many_rows(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP, hence K
):
    """One program: a BLOCK_M x BLOCK_N tile of the output over all of K."""
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
        weight = (tl.reshape(codes, (BLOCK_N, BLOCK_K)) - zero[:, None]).to(tl.float32)
        product = dot(
            tile, tl.trans(weight), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), "ieee"
        )
        acc += product * scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :],
        acc.to(out.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )
