"""The ``sparsevila::select_tokens`` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Op
from ..triton_support import needs_cuda
from .library import select_tokens_library
from .reference import check_arguments, select_tokens
from .triton import select_tokens_triton, triton_supports

SCHEMA = (
    "(Tensor scores, Tensor starts, Tensor lengths, Tensor keep, Tensor offsets, SymInt total, "
    '*, str impl="reference") -> Tensor'
)


def _fake(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor, total: int
) -> Tensor:
    check_arguments(scores, starts, lengths, keep, offsets)
    return scores.new_empty((total,), dtype=torch.int64)


OP = Op("select_tokens", SCHEMA, reference=select_tokens, fake=_fake)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(select_tokens_triton)
OP.implement("library", supported=lambda device: None)(select_tokens_library)
