"""The ``sparsevila::silu_mul`` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Op
from ..triton_support import needs_cuda
from .reference import check_arguments, silu_mul
from .triton import silu_mul_triton, triton_supports


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    check_arguments(gate, up)
    # Not new_empty: the result is contiguous whatever gate is.
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


OP = Op(
    "silu_mul",
    '(Tensor gate, Tensor up, *, str impl="reference") -> Tensor',
    reference=silu_mul,
    fake=_fake,
)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(silu_mul_triton)
