"""Second pass of ``column_reduce`` for few rows and many columns: rows held, keys streamed."""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import dot, tl, triton
from .tiles import LSE_UNIT, SIZES, first_of, load_held, load_part, place, step_of


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def few_rows_kernel(
    q,
    k,
    weights,
    q_start,
    k_lens,
    columns,
    lse,
    out,
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
    programs,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    WEIGHTED: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    """out[block of rows, b, group, j] = norm * sum of w_i P[i, column j] over the block's rows.

    Programs share the columns and the blocks of rows.
    """
    part = tl.program_id(0) % programs
    group = tl.program_id(0) // programs
    row_block = tl.program_id(1)
    b = (group // GROUPS).to(tl.int64)
    g = group % GROUPS
    r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    used = r < rows * HEADS
    if WEIGHTED:
        weight_at = b * weights_batch + (r // HEADS).to(tl.int64) * weights_row
        weight = tl.load(weights + weight_at, mask=used, other=0.0)
        used = used & (weight != 0)
    minus = tl.load(
        lse + group.to(tl.int64) * (lse_group * LSE_UNIT) + r, mask=used, other=float("inf")
    )
    q_base = q + first_of(b, q_batch, g * HEADS, q_head, UNIT)
    q_at = place(
        r.to(tl.int64) if WIDE else r,
        HEADS,
        step_of(q_head, UNIT, WIDE),
        step_of(q_row, UNIT, WIDE),
    )
    held = load_part(q_base, q_at, used, q_dim, False, DIM, 0, PART)
    if MORE > 0:
        held_more = load_part(q_base, q_at, used, q_dim, False, DIM, PART, MORE)
    end_key = keys
    if LENGTHS:
        end_key = tl.minimum(tl.load(k_lens + b), keys).to(tl.int32)
    if CAUSAL:
        last = tl.load(q_start + b).to(tl.int32) + r // HEADS
        seen_by_all = tl.min(tl.where(used, last, keys), 0)

    k_base = k + first_of(b, k_batch, g * HEADS // SHARING, k_head, UNIT)
    out_base = out + (row_block * (batch * GROUPS) + group).to(tl.int64) * width
    zeros = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    # Columns that a row can see, shared by the programs in whole blocks; the rest are zeros.
    seen = width
    if not GATHER:
        seen = tl.minimum(seen, tl.maximum(end_key, 0))
        if CAUSAL:
            seen = tl.minimum(seen, tl.maximum(tl.max(tl.where(used, last, -1), 0) + 1, 0))
    seen = tl.where(tl.max(used.to(tl.int32), 0) > 0, seen, 0)
    per = tl.cdiv(tl.cdiv(seen, BLOCK_N), programs) * BLOCK_N
    start = tl.minimum(part * per, seen)
    stop = tl.minimum(start + per, seen)
    # Whole blocks that all rows see all of. Of chosen columns that is not known beforehand.
    inner = start
    if not GATHER:
        inner = stop
        if CAUSAL:
            inner = tl.minimum(stop, seen_by_all + 1)
        inner = start + tl.maximum(inner - start, 0) // BLOCK_N * BLOCK_N
    for j0 in tl.range(start, inner, BLOCK_N, num_stages=STAGES):
        n = j0 + tl.arange(0, BLOCK_N)
        k_at = (n.to(tl.int64) if WIDE else n) * step_of(k_row, UNIT, WIDE)
        # As below, but without any mask: the loop in which the time goes.
        s = dot(load_held(k_base, k_at, n, k_dim, True, DIM, 0, PART), held, zeros, PRECISION)
        if MORE > 0:
            more = load_held(k_base, k_at, n, k_dim, True, DIM, PART, MORE)
            s = dot(more, held_more, s, PRECISION)
        p = tl.exp2(s * scale_log2 - minus[None, :])
        if WEIGHTED:
            p = p * weight[None, :]
        tl.store(out_base + n, tl.sum(p, 1) * norm)
    for j0 in tl.range(inner, stop, BLOCK_N, num_stages=STAGES if GATHER else 1):
        j = j0 + tl.arange(0, BLOCK_N)
        n = j
        if GATHER:
            column_at = b * columns_batch + j.to(tl.int64) * columns_row
            n = tl.load(columns + column_at, mask=j < stop, other=-1).to(tl.int32)
        exists = (n >= 0) & (n < end_key) & (j < stop)
        k_at = (n.to(tl.int64) if WIDE else n) * step_of(k_row, UNIT, WIDE)
        tile = load_held(k_base, k_at, exists, k_dim, False, DIM, 0, PART)
        s = dot(tile, held, zeros, PRECISION)
        if MORE > 0:
            more = load_held(k_base, k_at, exists, k_dim, False, DIM, PART, MORE)
            s = dot(more, held_more, s, PRECISION)
        p = tl.exp2(s * scale_log2 - minus[None, :])
        if CAUSAL:  # noqa: SIM102 - the outer one is decided at compile time
            if tl.max(tl.where(exists, n, -1), 0) > seen_by_all:
                p = tl.where(n[:, None] <= last[None, :], p, 0.0)
        if WEIGHTED:
            p = p * weight[None, :]
        tl.store(out_base + j, tl.where(exists, tl.sum(p, 1) * norm, 0.0), mask=j < stop)
    for j0 in range(seen + part * BLOCK_N, width, programs * BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        tl.store(out_base + j, tl.zeros([BLOCK_N], tl.float32), mask=j < width)
