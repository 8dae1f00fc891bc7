"""Importing this module declares every canonical op."""

from sparsevila_compile.kernels.attention import op as attention
from sparsevila_compile.kernels.cached_attention import op as cached_attention
from sparsevila_compile.kernels.column_reduce import op as column_reduce
from sparsevila_compile.kernels.retrieval_attention import op as retrieval_attention
from sparsevila_compile.kernels.select_tokens import op as select_tokens
from sparsevila_compile.kernels.w4a16_linear import op as w4a16_linear

__all__ = [
    "attention",
    "cached_attention",
    "column_reduce",
    "retrieval_attention",
    "select_tokens",
    "w4a16_linear",
]
