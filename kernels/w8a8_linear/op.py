"""``sparsevila::w8a8_linear``: 8-bit weights and activations, int8 or float8."""

from __future__ import annotations

import torch

from ..registry import Op
from ..triton_support import needs_cuda
from . import library
from .reference import check_args
from .reference import w8a8_linear as reference_linear
from .triton import float8_missing as float8_missing
from .triton import supports_args as triton_supports
from .triton import w8a8_linear as triton_linear


def _fake(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    check_args(x, weight, scales, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


OP = Op(
    "w8a8_linear",
    '(Tensor x, Tensor weight, Tensor scales, Tensor? bias, *, str impl="reference") -> Tensor',
    reference=reference_linear,
    fake=_fake,
)

OP.implement("cublas", supported=library.float8_cuda, supports_args=library.float8_shapes)(
    library.float8_linear
)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(triton_linear)
OP.implement("library", supported=library.cpu_only, supports_args=library.int8_only)(
    library.w8a8_linear
)
