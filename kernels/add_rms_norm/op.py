"""The ``sparsevila::add_rms_norm`` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Op
from ..triton_support import needs_cuda
from .reference import add_rms_norm, check_arguments
from .triton import add_rms_norm_triton, triton_supports


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_arguments(x, residual, weight)
    # Not new_empty: results are contiguous whatever x is.
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return normed, x.new_empty(0) if residual is None else torch.empty_like(normed)


OP = Op(
    "add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, *, "
    'str impl="reference") -> (Tensor, Tensor)',
    reference=add_rms_norm,
    fake=_fake,
)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(add_rms_norm_triton)
