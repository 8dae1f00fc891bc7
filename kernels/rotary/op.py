"""The ``sparsevila::rotary`` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Op
from ..triton_support import needs_cuda
from .reference import check_arguments, rotary
from .triton import rotary_triton, triton_supports


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, cos, sin)

    def turned(x: Tensor) -> Tensor:
        batch, length, heads, width = x.shape
        return torch.empty((batch, heads, length, width), dtype=x.dtype, device=x.device)

    return turned(q), turned(k)


OP = Op(
    "rotary",
    '(Tensor q, Tensor k, Tensor cos, Tensor sin, *, str impl="reference") -> (Tensor, Tensor)',
    reference=rotary,
    fake=_fake,
)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(rotary_triton)
