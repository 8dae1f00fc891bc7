"""The canonical ops, declared by importing them, as the overloads that graphs hold.

``GREEDY_STEP``, the op itself, stands in no graph: the decode loop calls it between steps.
"""

from sparsevila_compile.kernels.add_rms_norm.op import OP as _add_rms_norm
from sparsevila_compile.kernels.attention.op import LSE as _attention_lse
from sparsevila_compile.kernels.attention.op import OP as _attention
from sparsevila_compile.kernels.awq_linear.op import OP as _awq_linear
from sparsevila_compile.kernels.cached_attention.op import LSE as _cached_attention_lse
from sparsevila_compile.kernels.cached_attention.op import OP as _cached_attention
from sparsevila_compile.kernels.column_reduce.op import OP as _column_reduce
from sparsevila_compile.kernels.greedy_step.op import OP as _greedy_step
from sparsevila_compile.kernels.retrieval_attention.op import OP as _retrieval_attention
from sparsevila_compile.kernels.rotary.op import OP as _rotary
from sparsevila_compile.kernels.select_tokens.op import OP as _select_tokens
from sparsevila_compile.kernels.silu_mul.op import OP as _silu_mul
from sparsevila_compile.kernels.w4a8_linear.op import OP as _w4a8_linear
from sparsevila_compile.kernels.w4a16_linear.op import OP as _w4a16_linear
from sparsevila_compile.kernels.w8a8_linear.op import OP as _w8a8_linear

ADD_RMS_NORM = _add_rms_norm.overload
ATTENTION = _attention.overload
ATTENTION_LSE = _attention_lse.overload
AWQ_LINEAR = _awq_linear.overload
CACHED_ATTENTION = _cached_attention.overload
CACHED_ATTENTION_LSE = _cached_attention_lse.overload
COLUMN_REDUCE = _column_reduce.overload
GREEDY_STEP = _greedy_step
RETRIEVAL_ATTENTION = _retrieval_attention.overload
ROTARY = _rotary.overload
SELECT_TOKENS = _select_tokens.overload
SILU_MUL = _silu_mul.overload
W4A8_LINEAR = _w4a8_linear.overload
W4A16_LINEAR = _w4a16_linear.overload
W8A8_LINEAR = _w8a8_linear.overload
