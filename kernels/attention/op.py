"""``sparsevila::attention``, what every attention of a traced model becomes, and ``attention_lse``."""

from __future__ import annotations

import torch

from ..registry import Op
from ..triton_support import needs_cuda
from . import library, triton
from .reference import check_heads, reference, reference_lse


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    check_heads(q, k, v)
    batch, heads, length, dim = q.shape
    return q.new_empty((batch, length, heads, dim))


def _fake_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _fake(q, k, v, cu_seqlens, scale, causal, window)
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool causal, int window,"
    ' *, str impl="reference") -> Tensor',
    reference=reference,
    fake=_fake,
)

OP.implement("library", supported=lambda device: None, supports_args=library.unmasked_only)(
    library.library
)
OP.implement("triton", supported=needs_cuda, supports_args=triton.supports_args)(triton.attention)
OP.implement("library_segments", supported=library.cpu_only)(library.library)

LSE = Op(
    "attention_lse",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool causal, int window,"
    ' *, str impl="reference") -> (Tensor, Tensor)',
    reference=reference_lse,
    fake=_fake_lse,
)

LSE.implement("triton", supported=needs_cuda, supports_args=triton.supports_args)(
    triton.attention_lse
)
