"""Attention within short segments (the windows of a vision encoder) on Hopper, in Gluon.

With 64 tokens a segment there is little to compute: what counts is to keep the memory busy. A
program takes one block of rows, looks its segments up once, and goes through several heads, the
next head's queries, keys and values being copied while it computes this one's. Where a block's rows
see more keys than one tile holds, it fetches the rest tile by tile, without overlap.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..gluon_support import (
    descriptor,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ..triton_support import cdiv, on_device
from .hopper_parts import (
    LOG2E,
    allocate,
    barriers_of,
    fetch,
    head_dim_parts,
    maximum,
    rescaled,
    scores_of,
    softmax_step,
    store_rows,
)

_ROWS = 64
_STAGES = 2
_HEADS = 4
"""At most so many heads a program."""


@gluon.jit
@no_type_check
def _row_bounds(rows, first_row, last_row, cu, rows_total, segments, steps):
    """The interval [first, end) of keys that each row sees: its segment; and whether it has one.

    All rows that exist lie in first_row .. last_row.
    """
    # Segments are mostly about equal: one guess finds that of all rows, or the two they lie in.
    # Else a binary search for the last cu[s] <= row, ``steps`` halvings.
    guess = (first_row.to(gl.int64) * segments // rows_total).to(gl.int32)
    guess = gl.minimum(guess, gl.maximum(segments - 1, 0))
    middle_bound = gl.load(cu + gl.minimum(guess + 1, segments)).to(gl.int32)
    guess_end = gl.load(cu + gl.minimum(guess + 2, segments)).to(gl.int32)
    hit = (gl.load(cu + guess).to(gl.int32) <= first_row) & (last_row < guess_end)
    found = guess + 1 + gl.where(rows >= middle_bound, 1, 0)
    low = gl.where(hit, found, 0)
    high = gl.where(hit, found, segments + 1)
    for _step in range(gl.where(hit, 0, steps)):
        middle = (low + high) // 2
        open_ = low < high
        below = gl.load(cu + middle, mask=open_, other=0).to(gl.int32) <= rows
        high = gl.where(open_ & (below == 0), middle, high)
        low = gl.where(open_ & below, middle + 1, low)
    inside = (rows < rows_total) & (low > 0) & (low <= segments)
    first = gl.load(cu + low - 1, mask=inside, other=0).to(gl.int32)
    end = gl.load(cu + low, mask=inside, other=0).to(gl.int32)
    return first, end, inside & (first < end)


@gluon.jit
@no_type_check
def _key_ranges(first, end, seen):
    """[first, end) of the keys that some row sees, and [first, end) of those that all rows see."""
    LARGE: gl.constexpr = 2147483647
    any_first = LARGE - gl.reduce(gl.where(seen, LARGE - first, 0), 0, maximum)
    any_end = gl.reduce(gl.where(seen, end, 0), 0, maximum)
    all_first = gl.reduce(gl.where(seen, first, 0), 0, maximum)
    all_end = LARGE - gl.reduce(gl.where(seen, LARGE - end, 0), 0, maximum)
    return any_first, any_end, all_first, all_end


@gluon.jit
@no_type_check
def _fetch_head(
    descriptors, tiles, ready, n, b, h, row, key,
    GROUP: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    D_0: gl.constexpr, D_1: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying what the n-th head of this program needs."""
    q_0_desc, q_1_desc, k_0_desc, k_1_desc, v_0_desc, v_1_desc = descriptors
    q_0, q_1, k_0, k_1, v_0, v_1 = tiles
    slot = n % STAGES
    barrier = ready.index(slot)
    mbarrier.expect(barrier, (M + 2 * N) * (D_0 + D_1) * 2)
    fetch(q_0_desc, q_1_desc, q_0, q_1, barrier, slot, b, h, row, D_0, D_1)
    fetch(k_0_desc, k_1_desc, k_0, k_1, barrier, slot, b, h // GROUP, key, D_0, D_1)
    fetch(v_0_desc, v_1_desc, v_0, v_1, barrier, slot, b, h // GROUP, key, D_0, D_1)


@gluon.jit(do_not_specialize=["rows_total", "segments", "steps"])
@no_type_check
def _windows_kernel(
    q_0_desc, q_1_desc, k_0_desc, k_1_desc, v_0_desc, v_1_desc, out, cu,
    rows_total, heads, segments, steps, scale,
    GROUP: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    D_0: gl.constexpr, D_1: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A block of M rows, HEADS heads. Grid (row blocks, heads / HEADS); tiles of M keys."""
    N: gl.constexpr = M
    W_1: gl.constexpr = D_1 if D_1 > 0 else D_0  # of a second part that may not be there
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    LAYOUT_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_0, 16])
    LAYOUT_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W_1, 16])
    P_LAYOUT_0: gl.constexpr = gl.DotOperandLayout(0, LAYOUT_0, 2)
    P_LAYOUT_1: gl.constexpr = gl.DotOperandLayout(0, LAYOUT_1, 2)
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q_0, k_0, v_0 = allocate(q_0_desc, k_0_desc, v_0_desc, STAGES, STAGES)
    q_1, k_1, v_1 = q_0, k_0, v_0
    if D_1 > 0:
        q_1, k_1, v_1 = allocate(q_1_desc, k_1_desc, v_1_desc, STAGES, STAGES)
    descriptors = (q_0_desc, q_1_desc, k_0_desc, k_1_desc, v_0_desc, v_1_desc)
    tiles = (q_0, q_1, k_0, k_1, v_0, v_1)
    ready = barriers_of(STAGES, 1)
    free = barriers_of(STAGES, 1)
    more = barriers_of(1, 1)

    row = gl.program_id(0) * M
    head = gl.program_id(1) * HEADS
    rows = row + gl.arange(0, M, R_LAYOUT)
    last = gl.minimum(row + M, rows_total) - 1
    first, end, seen = _row_bounds(rows, row, last, cu, rows_total, segments, steps)
    any_first, any_end, all_first, all_end = _key_ranges(first, end, seen)
    any_first = gl.minimum(any_first, any_end)  # no row sees a key: nothing to do
    zero = gl.full([M, N], 0.0, gl.float32, S_LAYOUT)
    lane = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
    more_phase = 0
    for n in gl.static_range(STAGES - 1):
        if n < HEADS:
            _fetch_head(
                descriptors, tiles, ready, n, 0, head + n, row, any_first,
                GROUP, M, N, D_0, D_1, STAGES,
            )  # fmt: skip
    for i in range(HEADS):
        ahead = i + STAGES - 1
        if ahead < HEADS:
            mbarrier.wait(free.index(ahead % STAGES), ((ahead // STAGES) & 1) ^ 1)
            _fetch_head(
                descriptors, tiles, ready, ahead, 0, head + ahead, row, any_first,
                GROUP, M, N, D_0, D_1, STAGES,
            )  # fmt: skip
        h = head + i
        slot = i % STAGES
        q_tile_0 = q_0.index(slot).reshape([M, D_0])
        k_tile_0 = k_0.index(slot).reshape([N, D_0])
        v_tile_0 = v_0.index(slot).reshape([N, D_0])
        q_tile_1 = q_1.index(slot).reshape([M, W_1])
        k_tile_1 = k_1.index(slot).reshape([N, W_1])
        v_tile_1 = v_1.index(slot).reshape([N, W_1])
        peak = gl.full([M], float("-inf"), gl.float32, R_LAYOUT)
        total = gl.full([M], 0.0, gl.float32, R_LAYOUT)
        acc_0 = gl.full([M, D_0], 0.0, gl.float32, LAYOUT_0)
        acc_1 = gl.full([M, W_1], 0.0, gl.float32, LAYOUT_1)
        mbarrier.wait(ready.index(slot), (i // STAGES) & 1)
        for j in range(any_first, any_end, N):
            if j > any_first:
                barrier = more.index(0)
                mbarrier.expect(barrier, 2 * N * (D_0 + D_1) * 2)
                fetch(k_0_desc, k_1_desc, k_0, k_1, barrier, slot, 0, h // GROUP, j, D_0, D_1)
                fetch(v_0_desc, v_1_desc, v_0, v_1, barrier, slot, 0, h // GROUP, j, D_0, D_1)
                mbarrier.wait(barrier, more_phase)
                more_phase = more_phase ^ 1
            scores = scores_of(q_tile_0, q_tile_1, k_tile_0, k_tile_1, zero, D_1)
            s = warpgroup_mma_wait(0, deps=[scores])
            masked = (j < all_first) | (j + N > all_end)
            p, rescale, peak, total = softmax_step(
                s, j + lane, first, end, masked, peak, total, scale
            )
            weights = gl.convert_layout(p.to(q_0.dtype), P_LAYOUT_0)
            if j > any_first:
                acc_0 = acc_0 * gl.convert_layout(rescale, gl.SliceLayout(1, LAYOUT_0))[:, None]
                acc_1 = acc_1 * gl.convert_layout(rescale, gl.SliceLayout(1, LAYOUT_1))[:, None]
            sum_0 = warpgroup_mma(weights, v_tile_0, acc_0, is_async=True)
            if D_1 > 0:
                sum_1 = warpgroup_mma(
                    gl.convert_layout(weights, P_LAYOUT_1), v_tile_1, acc_1, is_async=True
                )
                acc_0, acc_1 = warpgroup_mma_wait(0, deps=[sum_0, sum_1])
            else:
                acc_0 = warpgroup_mma_wait(0, deps=[sum_0])
        mbarrier.arrive(free.index(slot))
        inverse = gl.where(seen, 1.0 / total, 0.0)
        stride = heads * D
        store_rows(out + h * D, rescaled(acc_0, inverse), row, rows_total, stride, M, 0, D_0, D)
        if D_1 > 0:
            store_rows(
                out + h * D, rescaled(acc_1, inverse), row, rows_total, stride, M, D_0, D_1, D
            )


def windows_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> None:
    """Launch on tensors that are not ``unsuitable``; right for any segments, fast for short ones.

    q [1, Hq, S, D]; k, v [1, Hkv, S, D]; writes out [1, S, Hq, D], contiguous.
    """
    _, heads, rows, dim = q.shape
    segments = cu_seqlens.shape[0] - 1
    at_once = next(n for n in range(min(_HEADS, heads), 0, -1) if heads % n == 0)
    parts = head_dim_parts(dim)
    descriptors = [
        descriptor(tensor, (1, 1, _ROWS, part or 16)) for tensor in (q, k, v) for part in parts
    ]
    with on_device(q):
        _windows_kernel[(cdiv(rows, _ROWS), heads // at_once)](
            *descriptors, out, cu_seqlens,
            rows, heads, segments, (segments + 1).bit_length(), scale * LOG2E,
            GROUP=heads // k.shape[1], HEADS=at_once, D=dim, D_0=parts[0], D_1=parts[1],
            M=_ROWS, STAGES=_STAGES, num_warps=4,
        )  # fmt: skip
