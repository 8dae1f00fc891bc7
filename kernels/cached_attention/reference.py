"""Semantics of ``sparsevila::cached_attention`` in plain torch, and of its write to the cache."""

from __future__ import annotations

import torch

from ..attention.reference import attend_lse, check_heads


def check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Caches [B, Hkv, L, D] of q's head dim and dtype, else ValueError (no length is looked at)."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[3] != q.shape[3] or cache.dtype != q.dtype:
            raise ValueError(
                f"{name} must be [B, Hkv, L, {q.shape[3]}] {q.dtype}, "
                f"is {list(cache.shape)} {cache.dtype}"
            )


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: slice,
    start: int,
    count: int,
) -> int:
    """Write the first ``count`` new tokens of some batch rows to the cache from position ``start``.

    Tokens at or past the cache's length are dropped. Returns the cache's new number of tokens.
    """
    capacity = k_cache.shape[2]
    end = min(start + count, capacity)
    if end > start:
        k_cache[rows, :, start:end] = k[rows, :, : end - start]
        v_cache[rows, :, start:end] = v[rows, :, : end - start]
    return max(end, min(start, capacity))


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Append new keys and values to the cache, then attend causally to what the cache holds.

    Query row i of batch row b is at cache position p = cache_lens[b] + i and attends the positions
    j <= p, with ``window`` > 0 only those with p - j < window. Positions that hold no token yet are
    never read, so a cache may start uninitialised.

    Args:
        q: [B, Hq, S, D], float, any strides; rotary embedding already applied (to k as well).
        k, v: [B, Hkv, S, D], the new tokens.
        k_cache, v_cache: [B, Hkv, L, D], written in place: new token i of row b goes to position
            cache_lens[b] + i if i < new_lens[b]. One that would land at L or later is dropped and
            seen by nobody (a row that is stepped on after its cache is full does no harm).
        cache_lens: int32 [B], tokens in the cache before the call.
        new_lens: int32 [B], new tokens of each row, 0 .. S; the rest is padding on the right.
        scale: factor on q k^T.
        window: 0 for none, else how many positions, its own included, a query sees.

    Returns:
        [B, S, Hq, D], contiguous, q's dtype; softmax in float32 (float64 for float64). Padding rows
        are zero.

    Raises:
        ValueError: shapes or dtypes disagree, or the window is negative.
    """
    return reference_lse(q, k, v, k_cache, v_cache, cache_lens, new_lens, scale, window)[0]


def reference_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cached_attention`` that also returns each row's log-sum-exp over the positions it attends.

    Arguments, writes, errors and first result as in :func:`reference`. The second is [B, Hq, S],
    contiguous, float32 (float64 for float64), natural logarithm; 0 for padding rows and for a row
    that sees no position.
    """
    check_heads(q, k, v)
    check_caches(q, k_cache, v_cache)
    if window < 0:
        raise ValueError(f"the window must not be negative, is {window}")
    batch, heads, length, dim = q.shape
    out = q.new_zeros(batch, length, heads, dim)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_zeros((batch, heads, length), dtype=wide)
    for b, (start, count) in enumerate(zip(cache_lens.tolist(), new_lens.tolist(), strict=True)):
        count = min(count, length)
        row = slice(b, b + 1)
        held = append(k, v, k_cache, v_cache, row, start, count)
        key = torch.arange(held, device=q.device)
        query = start + torch.arange(count, device=q.device)
        visible = key <= query[:, None]
        if window > 0:
            visible &= query[:, None] - key < window
        attended, lse[row, :, :count] = attend_lse(
            q[row, :, :count], k_cache[row, :, :held], v_cache[row, :, :held], visible, scale
        )
        out[row, :count] = attended.transpose(1, 2)
    return out, lse
