"""First pass of ``column_reduce``: log2-sum-exp2 of every used row."""

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
def _log_sum(peak, total, NOTHING: tl.constexpr):
    """log2 of ``exp2(peak) * total``; NOTHING where nothing was summed."""
    return tl.where(total == 0, NOTHING, peak + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
@no_type_check
def _hide(s, n, last, stop, CAUSAL: tl.constexpr):
    """Scores ``s`` of the keys ``n``, -inf from ``stop`` and, by row, from ``last`` on."""
    seen = (n < stop)[None, :]
    if CAUSAL:
        seen = seen & (n[None, :] < last[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def row_lse_kernel(
    q,
    k,
    weights,
    bounds,
    q_start,
    k_lens,
    lse,
    scale_log2,
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
    segments,
    slots,
    weights_batch,
    weights_row,
    lse_group,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    LENGTHS: tl.constexpr,
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
    """lse[split, b, group, r] of one block of rows over one part of the keys they see.

    A row that sees nothing gets inf, and with it terms of 0; a part of one gets -inf.
    """
    slot = tl.program_id(0) % slots
    group = tl.program_id(0) // slots
    split = tl.program_id(1)
    b = (group // GROUPS).to(tl.int64)
    g = group % GROUPS
    if PACKED:
        first, end, tile = find_segment(
            bounds, segments, slot, slots, rows, HEADS, BLOCK_R, AT_ONCE
        )
        r = first * HEADS + tile * BLOCK_R + tl.arange(0, BLOCK_R)
    else:
        first, end = 0, rows
        r = slot * BLOCK_R + tl.arange(0, BLOCK_R)
    used = r < end * HEADS
    first_key, end_key = (first, end) if PACKED else (0, keys)
    if LENGTHS:
        end_key = tl.minimum(tl.maximum(tl.load(k_lens + b), 0), keys).to(tl.int32)
    last = tl.zeros([BLOCK_R], tl.int32) + end_key  # exclusive
    if CAUSAL:
        start_at = tl.load(q_start + b).to(tl.int32)
        last = tl.minimum(last, start_at + r // HEADS + 1)
    if WEIGHTED:
        at = b * weights_batch + (r // HEADS).to(tl.int64) * weights_row
        used = used & (tl.load(weights + at, mask=used, other=0.0) != 0)
    # All used rows see the keys up to `common`, some of them those up to `highest`.
    common = tl.min(tl.where(used, last, keys), 0)
    highest = tl.max(tl.where(used, last, 0), 0)
    blocks = tl.cdiv(tl.maximum(highest - first_key, 0), BLOCK_N)
    start = first_key + split * tl.cdiv(blocks, SPLITS) * BLOCK_N
    stop = tl.minimum(start + tl.cdiv(blocks, SPLITS) * BLOCK_N, highest)

    out = (split * (batch * GROUPS) + group).to(tl.int64) * (lse_group * LSE_UNIT) + r
    nothing: tl.constexpr = float("inf") if SPLITS == 1 else float("-inf")
    if start >= stop:
        tl.store(lse + out, tl.full([BLOCK_R], nothing, tl.float32), mask=used)
        return

    q_base = q + first_of(b, q_batch, g * HEADS, q_head, UNIT)
    q_at = place(
        r.to(tl.int64) if WIDE else r,
        HEADS,
        step_of(q_head, UNIT, WIDE),
        step_of(q_row, UNIT, WIDE),
    )
    held = load_held(q_base, q_at, used, q_dim, False, DIM, 0, PART)
    held_more = load_held(q_base, q_at, used, q_dim, False, DIM, PART, MORE)
    if REGISTERS:
        held = to_registers(held, PART, PRECISION)
        if MORE > 0:
            held_more = to_registers(held_more, MORE, PRECISION)
    k_base = k + first_of(b, k_batch, g * HEADS // SHARING, k_head, UNIT)
    k_step = step_of(k_row, UNIT, WIDE)

    # Every row's exponents are taken relative to its greatest score of the first block. If a later
    # one is so much greater that the sum leaves float32, all is done again with a running maximum.
    zeros = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    n = start + tl.arange(0, BLOCK_N)
    at = n.to(tl.int64) if WIDE else n
    s = scores(
        held, held_more, zeros, k_base, at * k_step, n < stop, k_dim, False, DIM, PART, MORE,
        PRECISION,
    )  # fmt: skip
    s = _hide(s * scale_log2, n, last, stop, CAUSAL)
    peak = tl.max(s, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    sums = narrow(tl.exp2(s - peak[:, None]), BLOCK_R, BLOCK_N)
    seen_by_all = start + tl.maximum(tl.minimum(common, stop) - start, 0) // BLOCK_N * BLOCK_N
    for n0 in tl.range(start + BLOCK_N, seen_by_all, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64) if WIDE else n
        s = scores(
            held, held_more, zeros, k_base, at * k_step, n < stop, k_dim, True, DIM, PART, MORE,
            PRECISION,
        )  # fmt: skip
        sums += narrow(tl.exp2(s * scale_log2 - peak[:, None]), BLOCK_R, BLOCK_N)
    for n0 in tl.range(tl.maximum(start + BLOCK_N, seen_by_all), stop, BLOCK_N, num_stages=1):
        n = n0 + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64) if WIDE else n
        s = scores(
            held, held_more, zeros, k_base, at * k_step, n < stop, k_dim, False, DIM, PART, MORE,
            PRECISION,
        )  # fmt: skip
        s = _hide(s * scale_log2, n, last, stop, CAUSAL)
        sums += narrow(tl.exp2(s - peak[:, None]), BLOCK_R, BLOCK_N)
    total = tl.sum(sums, 1)
    if tl.max((total == float("inf")).to(tl.int32), 0) > 0:
        total = tl.zeros([BLOCK_R], tl.float32)
        for n0 in tl.range(start, stop, BLOCK_N, num_stages=1):
            n = n0 + tl.arange(0, BLOCK_N)
            at = n.to(tl.int64) if WIDE else n
            s = scores(
                held, held_more, zeros, k_base, at * k_step, n < stop, k_dim, False, DIM, PART, MORE,
                PRECISION,
            )  # fmt: skip
            s = _hide(s * scale_log2, n, last, stop, CAUSAL)
            higher = tl.maximum(peak, tl.max(s, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            peak = higher
    tl.store(lse + out, _log_sum(peak, total, nothing), mask=used)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def combine_lse_kernel(
    parts, lse, count, SPLITS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """lse[x] = log2 sum over s of exp2(parts[s, x]); inf where all are -inf."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, PADDED)
    part = tl.load(
        parts + s.to(tl.int64)[:, None] * count + x[None, :],
        mask=(s < SPLITS)[:, None] & (x < count)[None, :],
        other=float("-inf"),
    )
    peak = tl.max(part, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(part - shift[None, :]), 0)
    tl.store(lse + x, _log_sum(peak, total, float("inf")), mask=x < count)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def given_lse_kernel(
    row_lse,
    lse,
    batch_stride,
    head,
    row,
    rows,
    lse_group,
    count,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """lse[b, group, r] from natural logarithms [b, h, i]: to base 2, and inf for either infinity."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group, r = x // (lse_group * LSE_UNIT), x % (lse_group * LSE_UNIT)
    exists = (x < count) & (r < rows * HEADS)
    at = (group // GROUPS) * batch_stride
    at += ((group % GROUPS) * HEADS + r % HEADS) * head + (r // HEADS) * row
    given = tl.load(row_lse + at, mask=exists, other=0.0) * 1.4426950408889634
    tl.store(lse + x, tl.where(given == float("-inf"), float("inf"), given), mask=exists)
