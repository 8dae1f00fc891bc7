"""The kernels for some dozens to hundreds of rows of x: batched decoding, short prompts.

``out^T = weight @ x^T`` by ``wgmma`` (Hopper): the weight's codes go from shared memory to registers,
are unpacked there and multiplied straight from registers; tiles of x lie in shared memory. Codes and
x are copied by the tensor memory accelerator some tiles ahead. Where rows of the weight make too few
programs, input channels are split among several, whose sums :func:`add_splits` adds in a fixed order.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..dependent_launch import launch_options
from ..triton_support import HAVE_TRITON, cdiv, dot, interpreting, tl, triton
from .codes import _LANES_FIRST, along, unpack

if HAVE_TRITON and not interpreting():
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
@no_type_check
def reorder_x(
    x,  # [M, K], rows stride_xm apart
    out,  # [M, K]
    total,  # M * groups
    groups,
    stride_xm,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x with the channels of each group in the order in which threads hold their codes.

    Channel 4 h + i of a group, half-word h = 2 q + e of quarter t, moves to place (i, q, t, e).
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i[:, None] < total
    channel = tl.arange(0, GROUP)[None, :]
    at = (i // groups)[:, None].to(tl.int64) * stride_xm + ((i % groups)[:, None] * GROUP + channel)
    tile = tl.reshape(tl.load(x + at, mask=inside, other=0.0), (BLOCK, 4, GROUP // 32, 2, 4))
    tile = tl.reshape(tl.permute(tile, (0, 4, 2, 1, 3)), (BLOCK, GROUP))
    tl.store(out + i[:, None].to(tl.int64) * GROUP + channel, tile, mask=inside)


@triton.jit
@no_type_check
def mid_rows(
    x,  # descriptor of reordered x [M, K], blocks [BLOCK_M, GROUP]
    qweight,  # descriptor of int16 [N, K // 4], blocks [BLOCK_N, GROUP // 4]
    scales,  # [N, K // GROUP]
    zero_points,  # uint8 [N, K // GROUP]
    bias,  # [N] or unused
    out,  # [M, N], or float32 [SPLITS, M, N]
    M,
    N,
    groups,  # K // GROUP
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    W: tl.constexpr,  # warps: each takes 16 rows of the weight
):
    V: tl.constexpr = GROUP // 16
    BLOCK_N: tl.constexpr = 16 * W
    if EARLY:
        gdc_launch_dependents()
    blocks_m = tl.cdiv(M, BLOCK_M)
    n_start = (tl.program_id(0) // blocks_m) * BLOCK_N
    m_start = (tl.program_id(0) % blocks_m) * BLOCK_M
    share = tl.cdiv(groups, SPLITS)
    start = tl.program_id(1) * share
    end = tl.minimum(groups, start + share)

    # dimensions: quarter of a group, row of eight, warp, eight of sixteen
    row = along(W, 2, 4) * 16 + along(2, 3, 4) * 8 + along(8, 1, 4)
    per_group = tl.minimum(n_start + row, N - 1) * groups + 0 * along(4, 0, 4)
    scale_at = tl.max_contiguous(scales + per_group, [1, 1, 1, 1])
    zero_at = tl.max_contiguous(zero_points + per_group, [1, 1, 1, 1])
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if EARLY:
        gdc_wait()
    # A group ahead by hand: they are too small to be copied like the codes.
    scale = tl.load(scale_at + tl.minimum(start, groups - 1))
    zeros = tl.load(zero_at + tl.minimum(start, groups - 1))
    for g in range(start, end):
        ahead = tl.minimum(g + 1, groups - 1)
        next_scale = tl.load(scale_at + ahead)
        next_zeros = tl.load(zero_at + ahead)
        tokens = x.load([m_start, g * GROUP])
        words = tl.reshape(qweight.load([n_start, g * (GROUP // 4)]), (W, 2, 8, 4, V))
        if _LANES_FIRST:
            words = tl.permute(words, (3, 2, 0, 1, 4))
        else:
            words = tl.permute(words, (1, 0, 2, 3, 4))
        codes = unpack(words, tl.expand_dims(zeros, 4), DTYPE)
        factor = scale.to(tl.float32)
        if _LANES_FIRST:
            codes = tl.permute(codes, (2, 3, 1, 0, 5, 4))
            factor = tl.permute(factor, (2, 3, 1, 0))
        else:
            codes = tl.permute(codes, (1, 0, 2, 3, 5, 4))
            factor = tl.permute(factor, (1, 0, 2, 3))
        # codes [W, 2, 8, 4, nibble, V] -> [row, (nibble, q), 4, e]: as reorder_x orders x
        codes = tl.reshape(codes, (BLOCK_N, 4, 2 * V, 2))
        codes = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), (BLOCK_N, GROUP))
        product = dot(codes, tokens.T, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), "tf32")
        factor = tl.broadcast_to(
            tl.reshape(factor, (BLOCK_N, 1, 4, 1)), (BLOCK_N, BLOCK_M // 8, 4, 2)
        )
        acc += product * tl.reshape(factor, (BLOCK_N, BLOCK_M))
        scale = next_scale
        zeros = next_zeros
    rows = n_start + tl.arange(0, BLOCK_N)
    token = m_start + tl.arange(0, BLOCK_M)
    if HAS_BIAS:  # never together with SPLITS
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    out += tl.program_id(1).to(tl.int64) * M * N
    tl.store(
        out + token[:, None].to(tl.int64) * N + rows[None, :],
        acc.to(out.dtype.element_ty).T,
        mask=(token[:, None] < M) & (rows[None, :] < N),
    )


@triton.jit
@no_type_check
def add_splits(
    parts,  # float32 [SPLITS, total]
    bias,  # [N] or unused
    out,  # [total]
    total,  # M * N
    N,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the splits' sums, and the bias, in a fixed order."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    result = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        result += tl.load(parts + split * total.to(tl.int64) + i, mask=inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, result.to(out.dtype.element_ty), mask=inside)


def sum_splits(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Launch :func:`add_splits`: ``parts`` float32 [splits, M, N], and ``bias`` [N], to ``out`` [M, N]."""
    splits, rows, outputs = parts.shape
    add_splits[(cdiv(rows * outputs, 512),)](
        parts,
        out if bias is None else bias,
        out,
        rows * outputs,
        outputs,
        HAS_BIAS=bias is not None,
        SPLITS=splits,
        BLOCK=512,
        num_warps=4,
        **launch_options(parts.device),
    )
