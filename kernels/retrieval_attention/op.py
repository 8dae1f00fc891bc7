"""``sparsevila::retrieval_attention``: decode attention over [indexed | tail] cache positions."""

from __future__ import annotations

import torch

from ..attention.library import cpu_only
from ..attention.reference import check_heads
from ..cached_attention.reference import check_caches
from ..registry import Op
from ..triton_support import needs_cuda
from . import library, triton
from .reference import check_index, reference


def _fake(
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
    check_heads(q, k, v)
    check_caches(q, k_cache, v_cache)
    check_index(k_cache, index)
    batch, heads, length, dim = q.shape
    return q.new_empty((batch, length, heads, dim))


OP = Op(
    "retrieval_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens,"
    " Tensor new_lens, Tensor index, Tensor tail_start, float scale,"
    ' *, str impl="reference") -> Tensor',
    reference=reference,
    fake=_fake,
)
OP.implement("library", supported=cpu_only)(library.library)
OP.implement("triton", supported=needs_cuda, supports_args=triton.supports_args)(
    triton.retrieval_attention
)
