"""Second pass of ``column_reduce``: weighted sums over rows of ``exp2(scores - log-sum-exp)``."""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import tl, triton
from .tiles import (
    LSE_UNIT,
    SIZES,
    find_segment,
    first_of,
    load_held,
    narrow,
    place,
    scores,
    step_of,
    to_registers,
)


@triton.jit
@no_type_check
def _used_rows(weights, at, stride, first, end, AT_ONCE: tl.constexpr):
    """First and last row (exclusive) of ``first`` to ``end`` whose weight is not zero."""
    lowest, highest = end, first
    for i0 in range(first, end, AT_ONCE):
        i = i0 + tl.arange(0, AT_ONCE)
        weight = tl.load(weights + at + i.to(tl.int64) * stride, mask=i < end, other=0.0)
        lowest = tl.minimum(lowest, tl.min(tl.where(weight != 0, i, end), 0))
        highest = tl.maximum(highest, tl.max(tl.where(weight != 0, i + 1, first), 0))
    return lowest, highest


@triton.jit
@no_type_check
def _tile_sums(
    held,
    held_more,
    zeros,
    q_base,
    r,
    end,
    n,
    start_at,
    weights,
    weights_at,
    weights_row,
    lse,
    q_head,
    q_row,
    q_dim,
    scale_log2,
    HEADS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALL: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_N, 8] sums of one tile: the columns ``n``, held, and the rows ``r``, loaded.

    ALL: all of these rows exist and see all of the columns.
    """
    exists = r < end
    minus = tl.load(lse + r) if ALL else tl.load(lse + r, mask=exists, other=float("inf"))
    at = place(r.to(tl.int64) if WIDE else r, HEADS, q_head, q_row)
    s = scores(held, held_more, zeros, q_base, at, exists, q_dim, ALL, DIM, PART, MORE, PRECISION)
    p = tl.exp2(s * scale_log2 - minus[None, :])
    if CAUSAL and not ALL:
        p = tl.where(n[:, None] <= (start_at + r // HEADS)[None, :], p, 0.0)
    if WEIGHTED:
        weight_at = weights + weights_at + (r // HEADS) * weights_row
        weight = tl.load(weight_at) if ALL else tl.load(weight_at, mask=exists, other=0.0)
        p = tl.where((weight != 0)[None, :], p * weight[None, :], 0.0)
    return narrow(p, BLOCK_N, BLOCK_R)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def column_sums_kernel(
    q,
    k,
    weights,
    q_start,
    k_lens,
    columns,
    lse,
    out,
    bounds,
    scale_log2,
    norm,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    batch,
    rows,
    keys,
    width,
    weights_batch,
    weights_row,
    columns_batch,
    columns_row,
    lse_group,
    segments,
    slots,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr,
    GATHER: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    REGISTERS: tl.constexpr,
    PRECISION: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """out[split, b, group, j] = norm * sum of w_i P[i, column j] over a part of the rows.

    Each program owns a block of columns, whose keys it holds, and runs through rows: nothing is
    added atomically, and the result is the same in every run.
    """
    slot = tl.program_id(0) % slots
    group = tl.program_id(0) // slots
    split = tl.program_id(1)
    b = (group // GROUPS).to(tl.int64)
    g = group % GROUPS
    first, end = 0, rows
    if PACKED:
        first, end, tile = find_segment(bounds, segments, slot, slots, rows, 1, BLOCK_N, AT_ONCE)
        j = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        reported = j < end
        if not WEIGHTED:
            norm = norm / tl.maximum(end - first, 1)
    else:
        j = slot * BLOCK_N + tl.arange(0, BLOCK_N)
        reported = j < width
    if GATHER:
        n = tl.load(
            columns + b * columns_batch + j.to(tl.int64) * columns_row, mask=reported, other=-1
        ).to(tl.int32)
    else:
        n = j
    exists = reported & (n >= 0) & (n < keys)
    if LENGTHS:
        exists = exists & (n < tl.load(k_lens + b))
    # The rows that can see any of these columns.
    start_at = 0
    if CAUSAL:
        start_at = tl.load(q_start + b).to(tl.int32)
        first = tl.maximum(tl.min(tl.where(exists, n, keys), 0) - start_at, 0)
        first = tl.minimum(first, rows)
    weights_at = b * weights_batch
    if WEIGHTED:
        first, end = _used_rows(weights, weights_at, weights_row, first, end, AT_ONCE)
    end = tl.where(tl.max(exists.to(tl.int32), 0) > 0, end, first)

    k_base = k + first_of(b, k_batch, g * HEADS // SHARING, k_head, UNIT)
    k_at = (n.to(tl.int64) if WIDE else n) * step_of(k_row, UNIT, WIDE)
    held = load_held(k_base, k_at, exists, k_dim, False, DIM, 0, PART)
    held_more = load_held(k_base, k_at, exists, k_dim, False, DIM, PART, MORE)
    if REGISTERS:
        held = to_registers(held, PART, PRECISION)
        if MORE > 0:
            held_more = to_registers(held_more, MORE, PRECISION)
    q_base = q + first_of(b, q_batch, g * HEADS, q_head, UNIT)
    lse_base = lse + group.to(tl.int64) * (lse_group * LSE_UNIT)
    zeros = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_N, 8], tl.float32)

    blocks = tl.cdiv(tl.maximum(end - first, 0) * HEADS, BLOCK_R)
    start = first * HEADS + split * tl.cdiv(blocks, SPLITS) * BLOCK_R
    stop = tl.minimum(start + tl.cdiv(blocks, SPLITS) * BLOCK_R, end * HEADS)
    # Blocks at the start whose rows do not all see all columns, and one at the end that is not full.
    inner, outer = start, start + tl.maximum(stop - start, 0) // BLOCK_R * BLOCK_R
    if CAUSAL:
        partly = (tl.max(tl.where(exists, n, 0), 0) - start_at) * HEADS - start
        inner = start + tl.cdiv(tl.maximum(partly, 0), BLOCK_R) * BLOCK_R
        inner = tl.minimum(inner, tl.maximum(outer, start))
    for r0 in tl.range(inner, outer, BLOCK_R, num_stages=STAGES):
        sums += _tile_sums(
            held, held_more, zeros, q_base, r0 + tl.arange(0, BLOCK_R), stop, n, start_at,
            weights, weights_at, weights_row, lse_base,
            step_of(q_head, UNIT, WIDE), step_of(q_row, UNIT, WIDE), q_dim, scale_log2,
            HEADS, WEIGHTED, True, CAUSAL, WIDE, DIM, PART, MORE,
            BLOCK_R, BLOCK_N, PRECISION,
        )  # fmt: skip
    for r0 in tl.range(start, stop - (outer - inner), BLOCK_R, num_stages=1):
        r = tl.where(r0 < inner, r0, r0 + (outer - inner)) + tl.arange(0, BLOCK_R)
        sums += _tile_sums(
            held, held_more, zeros, q_base, r, stop, n, start_at,
            weights, weights_at, weights_row, lse_base,
            step_of(q_head, UNIT, WIDE), step_of(q_row, UNIT, WIDE), q_dim, scale_log2,
            HEADS, WEIGHTED, False, CAUSAL, WIDE, DIM, PART, MORE,
            BLOCK_R, BLOCK_N, PRECISION,
        )  # fmt: skip
    at = (split * (batch * GROUPS) + group).to(tl.int64) * width + j
    tl.store(out + at, tl.where(exists, tl.sum(sums, 1) * norm, 0.0), mask=reported)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def sum_parts_kernel(
    parts,
    bounds,
    columns,
    out,
    count,
    keys,
    width,
    columns_batch,
    columns_row,
    segments,
    OUTPUTS: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    PACKED: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[x, j] = mean over h of the sum over s of parts[s, x, h, j]; packed: 0 in no segment.

    GATHER: parts[s, x, h, columns[x // OUTPUTS, j]] instead, 0 where that is no key.
    """
    blocks = tl.cdiv(width, BLOCK)
    x = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = j < width
    n = j
    if GATHER:
        column_at = (x // OUTPUTS) * columns_batch + j.to(tl.int64) * columns_row
        n = tl.load(columns + column_at, mask=inside, other=-1).to(tl.int32)
        inside = (n >= 0) & (n < keys)
    if PACKED:
        inside = inside & (j >= tl.load(bounds)) & (j < tl.load(bounds + segments))
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLITS):
        for h in range(HEADS):
            at = (s * count + x) * HEADS + h
            total += tl.load(parts + at * keys + n, mask=inside, other=0.0)
    tl.store(out + x * width + j, total / HEADS, mask=j < width)
