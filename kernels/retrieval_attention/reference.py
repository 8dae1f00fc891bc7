"""Semantics of ``sparsevila::retrieval_attention`` in plain torch."""

from __future__ import annotations

import torch

from ..attention.reference import attend, check_heads
from ..cached_attention.reference import append, check_caches


def check_index(k_cache: torch.Tensor, index: torch.Tensor) -> None:
    """Index int32 or int64 [B, 1 or Hkv, I], else ValueError."""
    if index.dim() != 3 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be int [B, H, I], is {list(index.shape)} {index.dtype}")
    if index.shape[1] not in (1, k_cache.shape[1]):
        raise ValueError(f"index has {index.shape[1]} heads, not 1 or {k_cache.shape[1]}")


def check_entries(entries: torch.Tensor, limit: int) -> None:
    """No entry of one batch row's index names a position from ``limit`` on, else ValueError."""
    if entries.numel() > 0:
        highest = int(entries.max())
        if highest >= limit:
            raise ValueError(
                f"index names cache position {highest}, but the tail starts at {limit}"
            )


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    index: torch.Tensor,
    tail_start: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Append new keys and values to the cache, then attend to a chosen part of it.

    Query row i of batch row b, key/value head h attends the cache positions ``index[b, h]`` and the
    contiguous tail_start[b] .. cache_lens[b] + i. This is SparseVILA's decode (arXiv 2510.17777,
    Algorithm 3) without the packed copy: keys are cached rotated, so any may be read in place.

    Args:
        q, k, v, k_cache, v_cache, cache_lens, new_lens, scale: as in ``cached_attention``, with the
            same write, the same treatment of padding and of a full cache.
        index: int32 or int64 [B, 1 or Hkv, I], cache positions, each once, in any order, all below
            both tail_start[b] and cache_lens[b]; negative entries are absent. I may be 0.
        tail_start: int32 [B], first position of the tail, normally at most cache_lens[b].

    Returns:
        [B, S, Hq, D], contiguous, q's dtype; softmax in float32 (float64 for float64). Padding
        rows are zero.

    Raises:
        ValueError: shapes or dtypes disagree, or a row's index reaches into its tail. (Kernels that
            cannot look take such an entry for absent.)
    """
    check_heads(q, k, v)
    check_caches(q, k_cache, v_cache)
    check_index(k_cache, index)
    batch, heads, length, dim = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    out = q.new_zeros(batch, length, heads, dim)
    rows = zip(cache_lens.tolist(), new_lens.tolist(), tail_start.tolist(), strict=True)
    for b, (start, count, tail) in enumerate(rows):
        count = min(count, length)
        row = slice(b, b + 1)
        held = append(k, v, k_cache, v_cache, row, start, count)
        if count <= 0:
            continue
        check_entries(index[b], min(tail, start))
        tail_keys = torch.arange(min(tail, held), held, device=q.device)
        query = start + torch.arange(count, device=q.device)
        tail_visible = tail_keys <= query[:, None]
        for h in range(kv_heads):
            named = index[b, h if index.shape[1] > 1 else 0].long()
            named = named[named >= 0]
            keys = torch.cat([named, tail_keys])
            named_visible = tail_visible.new_ones(count, named.numel())
            of_group = slice(h * group, (h + 1) * group)
            out[row, :count, of_group] = attend(
                q[row, of_group, :count],
                k_cache[row, h : h + 1, keys],
                v_cache[row, h : h + 1, keys],
                torch.cat([named_visible, tail_visible], dim=1),
                scale,
            ).transpose(1, 2)
    return out
