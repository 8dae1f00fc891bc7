"""``cached_attention`` on scaled_dot_product_attention; lengths are read on the host."""

from __future__ import annotations

import torch

from ..attention.library import causal_mask, sdpa
from ..attention.reference import attend
from .reference import append


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, scale: float, window: int
) -> torch.Tensor:
    """q [B, Hq, M, D] at positions start .., over keys [B, Hkv, N, D] at positions 0 .. N-1."""
    rows, held = q.shape[2], k.shape[2]
    if window > 0:
        first = min(held, max(0, start - window + 1))  # the oldest key that the first row sees
        k, v, start, held = k[:, :, first:], v[:, :, first:], start - first, held - first
    if held == 0:
        return torch.zeros_like(q)
    if rows == 1:
        return sdpa(q, k, v, scale)
    if start == 0 and rows == held and (window == 0 or rows <= window):
        return sdpa(q, k, v, scale, causal=True)
    mask = causal_mask(rows, held, start, window, q.device)
    if start + rows > held:  # the cache is full: a row may see nothing, which sdpa leaves open
        return attend(q, k, v, mask, scale)
    return sdpa(q, k, v, scale, mask)


def library(
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
    """See :func:`.reference.reference`. Batch rows of one length share a call."""
    batch, heads, length, dim = q.shape
    starts, counts = cache_lens.tolist(), new_lens.tolist()
    if batch > 1 and len(set(starts)) == 1 and set(counts) == {length}:
        groups = [slice(0, batch)]
    else:
        groups = [slice(b, b + 1) for b in range(batch)]
    out = q.new_empty(batch, length, heads, dim)
    for rows in groups:
        start, count = starts[rows.start], min(counts[rows.start], length)
        held = append(k, v, k_cache, v_cache, rows, start, count)
        if count > 0:
            out[rows, :count] = _attend_rows(
                q[rows, :, :count],
                k_cache[rows, :, :held],
                v_cache[rows, :, :held],
                start,
                scale,
                window,
            ).transpose(1, 2)
        if count < length:
            out[rows, count:] = 0
    return out
