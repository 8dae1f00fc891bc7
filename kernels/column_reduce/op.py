"""The ``sparsevila::column_reduce`` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Op
from ..triton_support import needs_cuda
from .arguments import check_arguments, output_groups
from .reference import column_reduce
from .triton import column_reduce_triton, triton_supports

SCHEMA = (
    "(Tensor q, Tensor k, Tensor? row_weights, Tensor? cu_seqlens, Tensor? q_start, "
    "Tensor? k_lens, Tensor? columns, Tensor? row_lse, float scale, bool causal, str heads, "
    '*, str impl="reference") -> Tensor'
)


def _fake(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
    columns: Tensor | None,
    row_lse: Tensor | None,
    scale: float,
    causal: bool,
    heads: str,
) -> Tensor:
    check_arguments(q, k, row_weights, cu_seqlens, q_start, k_lens, columns, row_lse, causal, heads)
    width = k.shape[2] if columns is None else columns.shape[1]
    return q.new_empty((q.shape[0], output_groups(q, k, heads), width), dtype=torch.float32)


OP = Op("column_reduce", SCHEMA, reference=column_reduce, fake=_fake)
OP.implement("triton", supported=needs_cuda, supports_args=triton_supports)(column_reduce_triton)
