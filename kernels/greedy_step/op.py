"""The ``sparsevila::greedy_step`` op."""

from __future__ import annotations

from ..registry import Op
from ..triton_support import needs_cuda
from .reference import check_arguments, greedy_step
from .triton import greedy_step_triton, triton_supports

OP = Op(
    "greedy_step",
    "(Tensor logits, Tensor(a!) tokens, Tensor(b!) alive, Tensor(c!) lens, Tensor(d!) positions, "
    'Tensor ends, Tensor pad, *, str impl="reference") -> ()',
    reference=greedy_step,
    fake=check_arguments,
)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(greedy_step_triton)
