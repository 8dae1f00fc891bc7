"""``column_reduce`` in Triton: row log-sum-exp, then column sums; the matrix is never stored.

Both passes see the rows of the query heads that share a key head as one list, ``r = i * heads + h``
with the row ``i`` slow: a key is loaded once for the whole group, and a block of the list is a
short run of rows, whose keys (causal, packed) and weights (zero) can be skipped together.

1. ``_row_lse``: log2-sum-exp2 of every used row. Few rows over many keys are split over the keys
   and put together by ``_combine_lse``, in a fixed order.
2. ``_column_sums``: each program owns a block of columns and runs through all rows that see them,
   so that nothing is added atomically and the result is the same in every run.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
from torch import Tensor

from ..triton_support import (
    Reason,
    cdiv,
    check_launch,
    dot,
    dot_precision,
    next_power_of_2,
    on_device,
    processors,
    tl,
    triton,
)
from .arguments import check_arguments, check_sizes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_DIM = 256


def triton_supports(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
    columns: Tensor | None,
    row_lse: Tensor | None,
    scale: float,
    causal: bool,
    heads: str,
) -> Reason:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        return f"needs q and k of one dtype, half or float32, not {q.dtype} and {k.dtype}"
    if q.shape[3] > _MAX_DIM:
        return f"head dim {q.shape[3]} is over {_MAX_DIM}"
    return None


@triton.jit
@no_type_check
def _log_sum(peak, total):
    """log2 of ``exp2(peak) * total``; with nothing summed the peak is -inf, and so is this."""
    return peak + tl.log2(tl.where(total == 0, 1.0, total))


@triton.jit
@no_type_check
def _row_lse(
    q,
    k,
    first_key,
    end_key,
    weights,
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
    blocks,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """lse[split, b, h, i] of one block of rows over one part of the keys they see."""
    group = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.program_id(1)
    b = group // GROUPS
    r = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = (r // HEADS).to(tl.int64)
    h = (group % GROUPS) * HEADS + r % HEADS
    row = b * rows + i
    first = tl.load(first_key + row, mask=i < rows, other=0)
    end = tl.load(end_key + row, mask=i < rows, other=0)
    weight = tl.load(weights + row, mask=i < rows, other=0.0)
    used = (weight != 0) & (end > first)
    # The used rows' keys, in equal parts of whole blocks. No used row: no keys, nothing is done.
    lowest = tl.min(tl.where(used, first, keys), 0)
    highest = tl.max(tl.where(used, end, 0), 0)
    part = tl.cdiv(tl.cdiv(tl.maximum(highest - lowest, 0), BLOCK_N), SPLITS) * BLOCK_N
    start = lowest + split * part
    stop = tl.minimum(start + part, highest)

    d = tl.arange(0, BLOCK_D)
    q_tile = tl.load(
        q + (b * q_batch + h * q_head + i * q_row)[:, None] + d[None, :] * q_dim,
        mask=used[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    k_base = k + b * k_batch + ((group % GROUPS) * HEADS // SHARING) * k_head
    no_scores = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k_tile = tl.load(
            k_base + n.to(tl.int64)[None, :] * k_row + d[:, None] * k_dim,
            mask=(n < stop)[None, :] & (d < DIM)[:, None],
            other=0.0,
        )
        s = dot(q_tile, k_tile, no_scores, PRECISION) * scale_log2
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < end[:, None])
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        peak = higher
    out = ((split * batch + b) * (GROUPS * HEADS) + h) * rows + i
    tl.store(lse + out, _log_sum(peak, total), mask=used)


@triton.jit
@no_type_check
def _combine_lse(
    parts, lse, count, SPLITS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """lse[x] = log2 sum over s of exp2(parts[s, x])."""
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
    tl.store(lse + x, _log_sum(peak, total), mask=x < count)


@triton.jit
@no_type_check
def _column_sums(
    q,
    k,
    first_key,
    end_key,
    weights,
    lse,
    columns,
    q_start,
    out,
    scale_log2,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    columns_batch,
    columns_row,
    rows,
    keys,
    width,
    blocks,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    GATHER: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[b, group, j] = mean over the group's heads of sum_i w_i P[i, column j], a block of j."""
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b = group // GROUPS
    j = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATHER:
        n = tl.load(
            columns + b * columns_batch + j.to(tl.int64) * columns_row, mask=j < width, other=-1
        )
        n = n.to(tl.int64)
    else:
        n = tl.where(j < width, j, -1).to(tl.int64)
    exists = (n >= 0) & (n < keys)
    d = tl.arange(0, BLOCK_D)
    k_base = k + b * k_batch + ((group % GROUPS) * HEADS // SHARING) * k_head
    k_tile = tl.load(
        k_base + n[None, :] * k_row + d[:, None] * k_dim,
        mask=exists[None, :] & (d < DIM)[:, None],
        other=0.0,
    )
    # The rows that can see any of these columns.
    row_first = 0
    row_end = rows
    if CAUSAL:
        leftmost = tl.min(tl.where(exists, n, keys), 0)
        row_first = tl.maximum(leftmost - tl.load(q_start + b), 0).to(tl.int32)
    if PACKED:
        row_first = tl.min(tl.load(first_key + n, mask=exists, other=rows), 0)
        row_end = tl.max(tl.load(end_key + n, mask=exists, other=0), 0)

    no_scores = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for r0 in range(row_first * HEADS // BLOCK_R * BLOCK_R, row_end * HEADS, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        i = (r // HEADS).to(tl.int64)
        h = (group % GROUPS) * HEADS + r % HEADS
        row = b * rows + i
        first = tl.load(first_key + row, mask=i < rows, other=0)
        end = tl.load(end_key + row, mask=i < rows, other=0)
        weight = tl.load(weights + row, mask=i < rows, other=0.0)
        used = (weight != 0) & (end > first)
        lowest = tl.min(tl.where(used, first, keys), 0)
        highest = tl.max(tl.where(used, end, 0), 0)
        if tl.max(((n >= lowest) & (n < highest)).to(tl.int32), 0) > 0:
            q_tile = tl.load(
                q + (b * q_batch + h * q_head + i * q_row)[:, None] + d[None, :] * q_dim,
                mask=used[:, None] & (d < DIM)[None, :],
                other=0.0,
            )
            row_lse = tl.load(lse + (b * (GROUPS * HEADS) + h) * rows + i, mask=used, other=0.0)
            s = dot(q_tile, k_tile, no_scores, PRECISION) * scale_log2
            # A row all of whose scores are -inf attends nothing.
            seen = (n[None, :] >= first[:, None]) & (n[None, :] < end[:, None])
            seen = seen & (used & (row_lse != float("-inf")))[:, None]
            p = tl.exp2(s - row_lse[:, None]) * weight[:, None]
            sums += tl.sum(tl.where(seen, p, 0.0), 0)
    tl.store(out + group * width + j, sums / HEADS, mask=j < width)


def column_reduce_triton(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
    columns: Tensor | None,
    row_lse: Tensor | None,
    scale: float,
    causal: bool,
    heads: str,
) -> Tensor:
    """As the reference, without reading any value on the host: grids come from shapes alone.

    Raises:
        ValueError: arguments that do not fit together, or a dtype or head dim over the limits.
    """
    check_arguments(q, k, row_weights, cu_seqlens, q_start, k_lens, columns, row_lse, causal, heads)
    check_sizes(q, k, row_weights, cu_seqlens, q_start, k_lens, columns, row_lse)
    reason = triton_supports(
        q, k, row_weights, cu_seqlens, q_start, k_lens, columns, row_lse, scale, causal, heads
    )
    if reason is not None:
        raise ValueError(f"column_reduce/triton: {reason}")
    check_launch("column_reduce", q)

    batch, q_heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    width = keys if columns is None else columns.shape[1]
    # One program sums over `sharing` heads; their sums meet in a plain mean at the end.
    groups = q_heads if heads == "none" else kv_heads
    shape = (batch, groups, width)
    if 0 in (*shape, rows, keys):
        return q.new_zeros((batch, 1 if heads == "mean" else groups, width), dtype=torch.float32)
    sharing = q_heads // groups
    first_key, end_key, weights = _plan_rows(q, k, row_weights, cu_seqlens, q_start, k_lens)
    block_r, block_n = _blocks(rows * sharing, dim, q.dtype)
    row_blocks, column_blocks = cdiv(rows * sharing, block_r), cdiv(width, block_n)
    strides = (*q.stride(), *k.stride())
    shared = {
        "GROUPS": groups,
        "HEADS": sharing,
        "SHARING": q_heads // kv_heads,
        "DIM": dim,
        "BLOCK_D": max(16, next_power_of_2(dim)),
        "BLOCK_R": block_r,
        "BLOCK_N": block_n,
        "PRECISION": dot_precision(q.dtype),
        "num_warps": 4,
    }
    scale_log2 = scale * math.log2(math.e)

    splits = _splits(batch * groups * row_blocks, keys, block_n, processors(q.device))
    parts = torch.empty((splits, batch, q_heads, rows), dtype=torch.float32, device=q.device)
    lse = parts[0] if splits == 1 else torch.empty_like(parts[0])
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    with on_device(q):
        if row_lse is not None:
            lse, splits = (row_lse * math.log2(math.e)).contiguous(), 0
        else:
            _row_lse[(batch * groups * row_blocks, splits)](
                q, k, first_key, end_key, weights, parts, scale_log2, *strides,
                batch, rows, keys, row_blocks, SPLITS=splits, **shared,
            )  # fmt: skip
        if splits > 1:
            _combine_lse[(cdiv(lse.numel(), 128),)](
                *(parts, lse, lse.numel()),
                SPLITS=splits,
                PADDED=next_power_of_2(splits),
                BLOCK=128,
            )
        _column_sums[(batch * groups * column_blocks,)](
            q, k, first_key, end_key, weights, lse, columns, q_start, out, scale_log2, *strides,
            *((0, 0) if columns is None else columns.stride()),
            rows, keys, width, column_blocks,
            GATHER=columns is not None, CAUSAL=causal, PACKED=cu_seqlens is not None, **shared,
        )  # fmt: skip
    return out.mean(1, keepdim=True) if heads == "mean" and groups > 1 else out


def _blocks(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile: the largest of which nothing is spilled from registers."""
    if dtype == torch.float32:  # full float32 products hold whole operands in registers
        most, columns = (32, 32) if dim <= 128 else (16, 32)
    else:
        most, columns = (64, 64) if dim <= 128 else (64, 32)
    return min(most, max(16, next_power_of_2(rows))), columns


def _splits(programs: int, keys: int, block_n: int, processors: int) -> int:
    """Over how many parts of the keys to spread a row block, so that every processor has work."""
    wanted = cdiv(2 * processors, programs)
    return max(1, min(wanted, cdiv(keys, 4 * block_n), 64))


def _plan_rows(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row attends, first and end key (int32), and its weight (float32), ``[B, M]``."""
    batch, rows, keys = q.shape[0], q.shape[2], k.shape[2]
    row = torch.arange(rows, dtype=torch.int64, device=q.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        after = torch.searchsorted(bounds, row, right=True)
        last = bounds.shape[0] - 1
        within = (after > 0) & (after <= last)
        first = torch.where(within, bounds[(after - 1).clamp(min=0)], 0)
        end = torch.where(within, bounds[after.clamp(max=last)], 0)
        uniform = 1 / (end - first).clamp(min=1)
    else:
        first = torch.zeros_like(row)
        end = torch.full((batch, 1), keys, dtype=torch.int64, device=q.device)
        if k_lens is not None:
            end = k_lens.long().clamp(0, keys)[:, None]
        if q_start is not None:
            end = torch.minimum(end, q_start.long()[:, None] + row + 1)
        uniform = torch.full_like(row, 1 / rows, dtype=torch.float32)
    weights = uniform if row_weights is None else row_weights
    first_key, end_key, weights = (x.expand(batch, rows) for x in (first, end, weights))
    return first_key.int().contiguous(), end_key.int().contiguous(), weights.float().contiguous()
