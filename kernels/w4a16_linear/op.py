"""``sparsevila::w4a16_linear``: AWQ 4-bit groupwise weights, 16-bit activations.

There is no CPU library implementation: torch's own 4-bit CPU matmul interleaves codes of 32 or 64
output rows (as the instruction set wants it) and takes bfloat16 scales and zeros merged into one
tensor, so every call would have to repack the weight, which costs more than the multiplication.
"""

from __future__ import annotations

import torch

from ..registry import Op
from ..triton_support import needs_cuda
from .reference import check_args
from .reference import w4a16_linear as reference_linear
from .triton import supports_args as triton_supports
from .triton import w4a16_linear as triton_linear


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    check_args(x, qweight, scales, zero_points, bias, group_size)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


OP = Op(
    "w4a16_linear",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor zero_points, Tensor? bias, int group_size,"
    ' *, str impl="reference") -> Tensor',
    reference=reference_linear,
    fake=_fake,
)

OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(triton_linear)
