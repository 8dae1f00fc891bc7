"""``sparsevila::awq_linear``: a 4-bit linear as a checkpoint has it, before ``repack_awq``.

It stands in traced programs only, and lets a model that was loaded from such a checkpoint run as it
is; there is one implementation, since no compiled program holds it.
"""

from __future__ import annotations

import torch

from ..registry import Op
from .reference import awq_linear, check_args


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    check_args(x, qweight, qzeros, scales, bias, group_size)
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


OP = Op(
    "awq_linear",
    "(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? bias, int group_size,"
    ' *, str impl="reference") -> Tensor',
    reference=awq_linear,
    fake=_fake,
)
