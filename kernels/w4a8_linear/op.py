"""``sparsevila::w4a8_linear``: 4-bit weights; many rows of x are multiplied in float8."""

from __future__ import annotations

import torch

from ..registry import Op
from ..triton_support import needs_cuda
from ..w4a16_linear.reference import check_args
from .reference import w4a8_linear as reference_linear
from .triton import supports_args as triton_supports
from .triton import w4a8_linear as triton_linear


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    min_rows: int,
) -> torch.Tensor:
    check_args(x, qweight, scales, zero_points, bias, group_size)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


OP = Op(
    "w4a8_linear",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor zero_points, Tensor? bias, int group_size,"
    ' int min_rows, *, str impl="reference") -> Tensor',
    reference=reference_linear,
    fake=_fake,
)

OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(triton_linear)
