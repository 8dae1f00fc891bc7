"""``attention`` on torch's own scaled_dot_product_attention."""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..registry import Reason


def cpu_only(device: torch.device) -> Reason:
    """``supported`` of an implementation that reads lengths on the host."""
    return None if device.type == "cpu" else f"reads lengths on the host, this is {device.type}"


def unmasked_only(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> Reason:
    """``supports_args``: what scaled_dot_product_attention does in one fused call."""
    if cu_seqlens is not None:
        return "packed segments would have to be read on the host"
    return "a window would need a full mask" if window > 0 else None


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention with GQA: q [B, Hq, M, D], k and v [B, Hkv, N, D].

    mask: bool [M, N], or [B, Hkv, M, N] where key/value heads see different keys. A single query
    (decode) is laid out as Hq/Hkv rows of Hkv heads, so that a group shares its keys instead of
    reading them once a head.
    """
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    if rows == 1:
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, 1, dim)
    if mask is not None and mask.dim() == 4:
        mask = mask.repeat_interleave(heads // kv_heads, dim=1)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
    )


def causal_mask(
    rows: int, keys: int, first_row: int, window: int, device: torch.device
) -> torch.Tensor:
    """Bool [rows, keys]: row i, at position first_row + i, sees key j <= that and in the window."""
    visible = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(first_row)
    return visible.triu(first_row - window + 1) if window > 0 else visible


def _segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, window: int
) -> torch.Tensor:
    length = q.shape[2]
    if 0 < window < length:
        return sdpa(q, k, v, scale, causal_mask(length, length, 0, window, q.device))
    return sdpa(q, k, v, scale, causal=causal)


def library(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """See :func:`.reference.reference`. Packed: one call a segment, bounds read on the host."""
    if cu_seqlens is None:
        return _segment(q, k, v, scale, causal, window).transpose(1, 2).contiguous()
    batch, heads, length, dim = q.shape
    out = q.new_empty(batch, length, heads, dim)
    bounds = cu_seqlens.tolist()
    out[:, : bounds[0]] = 0
    out[:, bounds[-1] :] = 0
    for first, end in itertools.pairwise(bounds):
        if end > first:
            q_, k_, v_ = (t[:, :, first:end] for t in (q, k, v))
            out[:, first:end] = _segment(q_, k_, v_, scale, causal, window).transpose(1, 2)
    return out
