"""What ``column_reduce`` demands of its arguments, whichever implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

HEADS = ("mean", "kv", "none")
_INTEGERS = (torch.int32, torch.int64)


def output_groups(q: Tensor, k: Tensor, heads: str) -> int:
    """G, the head dim of the result: 1, Hkv or Hq."""
    return {"mean": 1, "kv": k.shape[1], "none": q.shape[1]}[heads]


def check_arguments(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
    columns: Tensor | None,
    row_lse: Tensor | None,
    causal: bool,
    heads: str,
) -> None:
    """Raise ValueError for arguments that do not fit together.

    Looks at ranks, dtypes, heads and head dims only, so that it also serves fake tensors whose
    batch and lengths are symbolic.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"column_reduce: q and k have 4 dims, not {q.dim()} and {k.dim()}")
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"column_reduce: {q.shape[1]} heads of {q.shape[3]} in q do not go with "
            f"{k.shape[1]} heads of {k.shape[3]} in k"
        )
    if heads not in HEADS:
        raise ValueError(f"column_reduce: heads is one of {HEADS}, not {heads!r}")
    if causal != (q_start is not None):
        raise ValueError("column_reduce: q_start is given when, and only when, causal is")
    if cu_seqlens is not None and (causal or k_lens is not None):
        raise ValueError("column_reduce: packed segments take neither causal nor k_lens")
    if row_weights is not None and (row_weights.dim(), row_weights.dtype) != (2, torch.float32):
        raise ValueError("column_reduce: row_weights is float32 [B, M]")
    if row_lse is not None and (row_lse.dim(), row_lse.dtype) != (3, torch.float32):
        raise ValueError("column_reduce: row_lse is float32 [B, Hq, M]")
    for name, tensor, rank in (
        ("cu_seqlens", cu_seqlens, 1),
        ("q_start", q_start, 1),
        ("k_lens", k_lens, 1),
        ("columns", columns, 2),
    ):
        if tensor is not None and (tensor.dim() != rank or tensor.dtype not in _INTEGERS):
            raise ValueError(f"column_reduce: {name} is an int32 or int64 tensor of {rank} dims")


def check_sizes(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
    columns: Tensor | None,
    row_lse: Tensor | None,
) -> None:
    """Raise ValueError where batch sizes or lengths disagree. Reads shapes, never values."""
    batch, rows = q.shape[0], q.shape[2]
    for name, tensor in (("k", k), ("q_start", q_start), ("k_lens", k_lens), ("columns", columns)):
        if tensor is not None and tensor.shape[0] != batch:
            raise ValueError(f"column_reduce: {name} has batch {tensor.shape[0]}, q has {batch}")
    if row_weights is not None and row_weights.shape != (batch, rows):
        raise ValueError(
            f"column_reduce: row_weights is {tuple(row_weights.shape)}, not {(batch, rows)}"
        )
    if row_lse is not None and row_lse.shape != q.shape[:3]:
        raise ValueError(
            f"column_reduce: row_lse is {tuple(row_lse.shape)}, not {tuple(q.shape[:3])}"
        )
    if cu_seqlens is not None:
        if batch != 1 or k.shape[2] != rows:
            raise ValueError(
                f"column_reduce: packed q and k have batch 1 and one length, not batch {batch} "
                f"and lengths {rows} and {k.shape[2]}"
            )
        if cu_seqlens.numel() < 1:
            raise ValueError("column_reduce: cu_seqlens is empty, it has one entry at least")
