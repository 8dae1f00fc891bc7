"""``retrieval_attention`` on scaled_dot_product_attention; lengths are read on the host."""

from __future__ import annotations

import torch

from ..attention.library import sdpa
from ..cached_attention.reference import append
from .reference import check_entries


def _gather(cache: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """cache [Hkv, L, D] at positions ``keys`` [1 or Hkv, N]: [1, Hkv, N, D]."""
    if keys.shape[0] == 1:
        return cache.index_select(1, keys[0]).unsqueeze(0)
    head = torch.arange(keys.shape[0], device=keys.device)
    return cache[head[:, None], keys].unsqueeze(0)


def _mask(present: torch.Tensor, tail_keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Which of [named | tail] the queries at positions ``query`` [M] see, given which named ones
    are there at all: present bool [1 or Hkv, I]; returns bool [M, N] or [1, Hkv, M, N]."""
    tail = tail_keys <= query[:, None]
    heads, named = present.shape
    mask = torch.cat(
        [
            present[:, None, :].expand(heads, query.numel(), named),
            tail.expand(heads, *tail.shape),
        ],
        dim=2,
    )
    return mask[0] if heads == 1 else mask.unsqueeze(0)


def library(
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
    """See :func:`.reference.reference`. Copies the attended keys, and no others, per batch row."""
    batch, heads, length, dim = q.shape
    out = q.new_empty(batch, length, heads, dim)
    lens = zip(cache_lens.tolist(), new_lens.tolist(), tail_start.tolist(), strict=True)
    for b, (start, count, tail) in enumerate(lens):
        count = min(count, length)
        row = slice(b, b + 1)
        held = append(k, v, k_cache, v_cache, row, start, count)
        if count < length:
            out[row, count:] = 0
        if count <= 0:
            continue
        named = index[b].long()
        check_entries(named, min(tail, start))
        present = named >= 0
        if named.shape[0] == 1:  # what is absent for all heads need not be gathered
            named = named[present].unsqueeze(0)
            present = present.new_ones(named.shape)
        tail_keys = torch.arange(min(tail, held), held, device=q.device)
        # Position 0 holds a token by now, so it can stand in for what is absent and masked.
        keys = torch.cat([named.clamp(min=0), tail_keys.expand(named.shape[0], -1)], dim=1)
        if keys.shape[1] == 0:
            out[row, :count] = 0
            continue
        mask = None
        if count > 1 or not present.all():
            mask = _mask(present, tail_keys, start + torch.arange(count, device=q.device))
        k_near, v_near = _gather(k_cache[b], keys), _gather(v_cache[b], keys)
        out[row, :count] = sdpa(q[row, :, :count], k_near, v_near, scale, mask).transpose(1, 2)
    return out
