"""Semantics of ``sparsevila::attention``, and the softmax that all attention ops share."""

from __future__ import annotations

import torch

_MAX_SCORES = 1 << 27
"""Scores held at once (512 MiB in float32): longer inputs are done some rows at a time."""


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q [B, Hq, S, D], k and v [B, Hkv, S, D], Hq a multiple of Hkv, one dtype; else ValueError.

    Looks at ranks, heads, head dims and dtypes only, so symbolic lengths are never guarded on.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be [B, H, S, D], are {q.dim()}-, {k.dim()}-, {v.dim()}-d")
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key and {v.shape[1]} value heads"
        )
    if not q.shape[3] == k.shape[3] == v.shape[3]:
        raise ValueError(f"head dims differ: q {q.shape[3]}, k {k.shape[3]}, v {v.shape[3]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")


def attend_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v over the visible keys only, and the log of the softmax's denominator.

    q [B, Hq, M, D]; k, v [B, Hkv, N, D]; visible bool, broadcastable to [B, Hkv, Hq/Hkv, M, N].
    Returns [B, Hq, M, D] in q's dtype and [B, Hq, M], the natural logarithm of
    sum_j exp(scale * q k_j) over the visible keys, in float32; both computed in float32 (and the
    second returned in float64, as both are computed, for float64 inputs). A row that sees no key is
    zero in both.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.to(wide).reshape(q.shape[0], kv_heads, heads // kv_heads, *q.shape[2:])
    scores = scale * grouped @ k.to(wide).unsqueeze(2).transpose(-1, -2)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    out = (weights @ v.to(wide).unsqueeze(2)).flatten(1, 2).to(q.dtype)
    return out, lse.flatten(1, 2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """The first result of :func:`attend_lse`."""
    return attend_lse(q, k, v, visible, scale)[0]


def segment_bounds(cu_seqlens: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last row of each row's own segment, int64 [rows] each.

    Segment s holds the rows cu_seqlens[s] .. cu_seqlens[s+1]-1 and may be empty. A row before the
    first segment or after the last has no keys: both bounds are 0.
    """
    bounds = cu_seqlens.to(torch.int64)
    segment = torch.searchsorted(bounds, torch.arange(rows, device=bounds.device), right=True) - 1
    outside = (segment < 0) | (segment >= bounds.numel() - 1)
    segment = segment.clamp(0, max(bounds.numel() - 2, 0))
    first = bounds[segment].masked_fill(outside, 0)
    end = bounds[(segment + 1).clamp(max=bounds.numel() - 1)].masked_fill(outside, 0)
    return first, end


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """Dense attention of a traced model; GQA head h reads key/value head h // (Hq/Hkv).

    Args:
        q: [B, Hq, S, D], float, any strides.
        k, v: [B, Hkv, S, D], q's dtype.
        cu_seqlens: None, or int32/int64 [n+1], ascending: B is 1 and row i attends only the keys of
            its own segment cu_seqlens[s] <= i < cu_seqlens[s+1].
        scale: factor on q k^T.
        causal: key j is visible to query i only if j <= i.
        window: 0, or with ``causal`` only: key j is visible to query i only if i - j < window.

    Returns:
        [B, S, Hq, D], contiguous, q's dtype; softmax in float32 (float64 for float64). A row
        outside every segment is zero.

    Raises:
        ValueError: shapes or dtypes disagree, packed with B > 1, or a window without ``causal``.
    """
    return reference_lse(q, k, v, cu_seqlens, scale, causal, window)[0]


def reference_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention`` that also returns each row's log-sum-exp: of the scores of the keys it may see.

    Arguments, errors and first result as in :func:`reference`. The second is [B, Hq, S], contiguous,
    float32 (float64 for float64): log(sum_j exp(scale * q_i k_j)), natural, 0 for a row that sees no
    key. With it the weight of any key is exp(scale * q_i k_j - lse_i), without a pass over the row.
    """
    check_heads(q, k, v)
    batch, heads, length, _ = q.shape
    if k.shape[2] != length or v.shape[2] != length:
        raise ValueError(f"{length} queries, but {k.shape[2]} keys and {v.shape[2]} values")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"packed segments need a batch of 1, this is {batch}")
    if window < 0 or (window > 0 and not causal):
        raise ValueError(f"a window of {window} needs causal attention and must not be negative")
    key = torch.arange(length, device=q.device)
    if cu_seqlens is None:
        first, end = torch.zeros_like(key), torch.full_like(key, length)
    else:
        first, end = segment_bounds(cu_seqlens, length)
    if causal:
        end = torch.minimum(end, key + 1)
    if window > 0:
        first = torch.maximum(first, key - window + 1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    step = max(1, _MAX_SCORES // max(1, batch * heads * length))
    for i in range(0, length, step):
        rows = slice(i, i + step)
        visible = (key >= first[rows, None]) & (key < end[rows, None])
        out[:, :, rows], lse[:, :, rows] = attend_lse(q[:, :, rows], k, v, visible, scale)
    return out.transpose(1, 2).contiguous(), lse
