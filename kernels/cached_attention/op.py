"""``sparsevila::cached_attention``: attention that appends to an explicit, mutated cache.

``cached_attention_lse`` also returns the rows' log-sum-exp.
"""

from __future__ import annotations

import torch

from ..attention.library import cpu_only
from ..attention.reference import check_heads
from ..registry import Op
from ..triton_support import needs_cuda
from . import library, triton
from .reference import check_caches, reference, reference_lse


def _fake(
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
    check_heads(q, k, v)
    check_caches(q, k_cache, v_cache)
    batch, heads, length, dim = q.shape
    return q.new_empty((batch, length, heads, dim))


def _fake_lse(
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
    out = _fake(q, k, v, k_cache, v_cache, cache_lens, new_lens, scale, window)
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


OP = Op(
    "cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens,"
    ' Tensor new_lens, float scale, int window, *, str impl="reference") -> Tensor',
    reference=reference,
    fake=_fake,
)
OP.implement("library", supported=cpu_only)(library.library)
OP.implement("triton", supported=needs_cuda, supports_args=triton.supports_args)(
    triton.cached_attention
)

LSE = Op(
    "cached_attention_lse",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens,"
    ' Tensor new_lens, float scale, int window, *, str impl="reference") -> (Tensor, Tensor)',
    reference=reference_lse,
    fake=_fake_lse,
)
LSE.implement("triton", supported=needs_cuda, supports_args=triton.supports_args)(
    triton.cached_attention_lse
)
