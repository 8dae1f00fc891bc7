"""``sparsevila::attention``: what every attention of a traced model becomes."""

from __future__ import annotations

import torch

from ..registry import Op
from ..triton_support import needs_cuda
from . import library, triton
from .reference import check_heads, reference


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
