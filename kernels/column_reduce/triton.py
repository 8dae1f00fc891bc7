"""``column_reduce`` in Triton: row log-sum-exp, then column sums; the matrix is never stored.

1. ``row_lse_kernel``: log2-sum-exp2 of every used row, unless the caller has it. Few rows over many
   keys are split over the keys and put together by ``combine_lse_kernel``, in a fixed order.
2. ``column_sums_kernel``: each program holds the keys of a block of columns and runs through the
   rows that see them; parts (splits of the rows, heads) meet in ``sum_parts_kernel``.

Both keep a tile of one operand and load tiles of the other; sums stay in the registers of the
thread that has the terms and are put together once, at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..triton_support import (
    Reason,
    cdiv,
    check_launch,
    dot_precision,
    next_power_of_2,
    on_device,
    processors,
)
from .arguments import check_arguments, check_sizes
from .column_sums import column_sums_kernel, sum_parts_kernel
from .few_rows import few_rows_kernel
from .row_lse import combine_lse_kernel, given_lse_kernel, row_lse_kernel
from .tiles import LSE_UNIT, SEGMENTS_AT_ONCE, split_dim
from .tuning import few_rows_of, few_rows_tile, is_hopper, lse_tile, resident, splits_of, sums_tile

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
    if cu_seqlens is not None and columns is not None:
        # A block of chosen columns may lie in any segments; all columns cost no more.
        every = column_reduce_triton(
            q, k, row_weights, cu_seqlens, None, None, None, row_lse, scale, causal, heads
        )
        return _gather(every, columns)

    batch, q_heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    width = keys if columns is None else columns.shape[1]
    segments = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # One program sums over `sharing` heads; their sums meet in a plain mean at the end.
    groups = q_heads if heads == "none" else kv_heads
    sharing = q_heads // groups
    merged = groups if heads == "mean" else 1
    shape = (batch, groups // merged, width)
    if 0 in (*shape, rows, keys) or (cu_seqlens is not None and segments == 0):
        return q.new_zeros(shape, dtype=torch.float32)

    unit = _unit(q, k)
    part, more = split_dim(dim)
    shared = {
        "GROUPS": groups,
        "HEADS": sharing,
        "SHARING": q_heads // kv_heads,
        "WEIGHTED": row_weights is not None,
        "PACKED": cu_seqlens is not None,
        "CAUSAL": causal,
        "LENGTHS": k_lens is not None,
        "UNIT": unit,
        "WIDE": _wide(q, sharing) or _wide(k, 1),
        "DIM": dim,
        "PART": part,
        "MORE": more,
        "PRECISION": dot_precision(q.dtype),
        "AT_ONCE": min(SEGMENTS_AT_ONCE, max(16, next_power_of_2(max(segments, rows)))),
    }
    strides = [*_strides(q, unit), *_strides(k, unit)]
    weights_strides = (0, 0) if row_weights is None else row_weights.stride()
    scale_log2 = scale * math.log2(math.e)
    programs, count = processors(q.device), batch * groups
    kind = (dim, q.dtype, is_hopper(q.device))

    def slots(length: int, block: int) -> int:
        return cdiv(length, block) if cu_seqlens is None else length // block + segments

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    unit_of_lse: int = LSE_UNIT.value
    lse_group = cdiv(rows * sharing, unit_of_lse)
    with on_device(q):
        if row_lse is None:
            blocks = lse_tile(rows * sharing, *kind)
            tiles = slots(rows * sharing, blocks["BLOCK_R"])
            splits = 1
            if cu_seqlens is None:
                at_once = programs * resident(blocks, "BLOCK_R", part + more)
                splits = splits_of(tiles * count, cdiv(keys, blocks["BLOCK_N"]), at_once, 128)
            parts = floats(splits, count, lse_group * unit_of_lse)
            row_lse_kernel[(tiles * count, splits)](
                q, k, row_weights, cu_seqlens, q_start, k_lens, parts, scale_log2, *strides,
                batch, rows, keys, segments, tiles, *weights_strides, lse_group,
                SPLITS=splits, **blocks, **shared,
            )  # fmt: skip
            lse = parts[0]
            if splits > 1:
                lse = torch.empty_like(parts[0])
                combine_lse_kernel[(cdiv(lse.numel(), 64),)](
                    *(parts, lse, lse.numel()),
                    SPLITS=splits,
                    PADDED=next_power_of_2(splits),
                    BLOCK=64,
                )
        else:
            lse = floats(count, lse_group * unit_of_lse)
            given_lse_kernel[(cdiv(lse.numel(), 1024),)](
                *(row_lse, lse, *row_lse.stride(), rows, lse_group, lse.numel()),
                GROUPS=groups,
                HEADS=sharing,
                BLOCK=1024,
            )

        norm = 1 / sharing
        if row_weights is None and cu_seqlens is None:
            norm /= rows
        # Most of the keys, but chosen: cheaper to sum for all of them and to choose afterwards.
        late = columns is not None and 2 * width >= keys and rows * sharing <= few_rows_of(keys)
        chosen = None if late else columns
        wide = keys if late else width
        columns_strides = (0, 0) if columns is None else columns.stride()
        arguments = [q, k, row_weights, q_start, k_lens, chosen, lse]
        sizes = [*strides, batch, rows, keys, wide]
        more_strides = [*weights_strides, *columns_strides, lse_group]
        few = cu_seqlens is None and rows * sharing <= few_rows_of(wide)
        if few:
            blocks = few_rows_tile(rows * sharing, *kind, chosen is not None)
            splits = cdiv(rows * sharing, blocks["BLOCK_R"])
            column_blocks = cdiv(wide, blocks["BLOCK_N"])
            tiles = splits_of(splits * count, column_blocks, 2 * programs, 1024)
        else:
            blocks = sums_tile(rows * sharing // (segments + 1), *kind)
            tiles, splits = slots(wide, blocks["BLOCK_N"]), 1
            if cu_seqlens is None:
                at_once = programs * resident(blocks, "BLOCK_N", part + more)
                row_blocks = cdiv(rows * sharing, blocks["BLOCK_R"])
                splits = splits_of(tiles * count, row_blocks, at_once, 64)
        direct = splits == 1 and merged == 1 and cu_seqlens is None and not late
        parts = floats(splits, batch, groups, wide)
        if few:
            few_rows_kernel[(tiles * count, splits)](
                *arguments, parts, scale_log2, norm, *sizes, *more_strides, tiles,
                GATHER=chosen is not None, **blocks,
                **{n: v for n, v in shared.items() if n not in ("PACKED", "AT_ONCE")},
            )  # fmt: skip
        else:
            column_sums_kernel[(tiles * count, splits)](
                *arguments, parts, cu_seqlens, scale_log2, norm, *sizes, *more_strides,
                segments, tiles, SPLITS=splits, GATHER=chosen is not None, **blocks, **shared,
            )  # fmt: skip
        if direct:
            return parts[0]
        out = floats(*shape)
        sum_parts_kernel[(cdiv(width, 256) * batch * shape[1],)](
            parts, cu_seqlens, columns, out, batch * shape[1], wide, width, *columns_strides,
            segments, OUTPUTS=shape[1], HEADS=merged, SPLITS=splits,
            PACKED=cu_seqlens is not None, GATHER=late, BLOCK=256,
        )  # fmt: skip
    return out


def _gather(every: Tensor, columns: Tensor) -> Tensor:
    """``every [B, G, N]`` at ``columns [B, V]``, 0 where the column is no key."""
    keys = every.shape[2]
    if keys == 0:
        return every.new_zeros((*every.shape[:2], columns.shape[1]))
    exists = (columns >= 0) & (columns < keys)
    at = columns.clamp(0, keys - 1).long()[:, None].expand(-1, every.shape[1], -1)
    return torch.where(exists[:, None], every.gather(2, at), 0.0)


def _unit(q: Tensor, k: Tensor) -> int:
    """What divides all strides but that of the head dim: loads of so many values are aligned."""
    strides = [s for x in (q, k) for s in x.stride()[:3]]
    return next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in strides))


def _strides(x: Tensor, unit: int) -> list[int]:
    return [*(s // unit for s in x.stride()[:3]), x.stride(3)]


def _wide(x: Tensor, heads: int) -> bool:
    """Whether offsets from a batch entry's first of so many heads pass 2^31."""
    farthest = (
        (heads - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3)
    )
    return farthest >= 2**31 - 2**20
