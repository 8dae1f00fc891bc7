"""ONNX forms of the canonical ops: nodes of the domain ``sparsevila``, or a contrib op that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from sparsevila_compile import ops
from sparsevila_compile.graph_edit import value
from sparsevila_compile.kernels.add_rms_norm.onnx import ADD_RMS_NORM
from sparsevila_compile.kernels.attention.onnx import ATTENTION, ATTENTION_LSE
from sparsevila_compile.kernels.cached_attention.onnx import (
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    HEADS,
)
from sparsevila_compile.kernels.column_reduce.onnx import COLUMN_REDUCE
from sparsevila_compile.kernels.onnx_support import DOMAIN, OnnxOp
from sparsevila_compile.kernels.retrieval_attention.onnx import RETRIEVAL_ATTENTION
from sparsevila_compile.kernels.rotary.onnx import ROTARY
from sparsevila_compile.kernels.select_tokens.onnx import SELECT_TOKENS
from sparsevila_compile.kernels.silu_mul.onnx import SILU_MUL
from sparsevila_compile.kernels.w8a8_linear.onnx import W8A8_LINEAR
from sparsevila_compile.onnx.aten import arguments, converts
from sparsevila_compile.onnx.graph_writer import GraphWriter, Value

HALVES = (torch.float16, torch.bfloat16)

ONNX_OPS: tuple[OnnxOp, ...] = (
    ADD_RMS_NORM,
    ATTENTION,
    ATTENTION_LSE,
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    COLUMN_REDUCE,
    RETRIEVAL_ATTENTION,
    ROTARY,
    SELECT_TOKENS,
    SILU_MUL,
    W8A8_LINEAR,
)
"""Everything in the domain ``sparsevila``."""

EMITTED: dict[Any, str] = {}
"""By canonical op: the name of the ONNX op that it becomes."""

_Attributes = Callable[[dict[str, Any]], dict[str, Any]]
_Fits = Callable[[dict[str, Any]], bool]
"""Whether ONNX Runtime's own op computes the same for these arguments."""


def _never(given: dict[str, Any]) -> bool:
    return False


def _write(
    g: GraphWriter,
    node: fx.Node,
    op: OnnxOp,
    inputs: list[str],
    attributes: dict[str, Any],
    names: list[str] | None = None,
    fused: bool = False,
) -> list[str]:
    outputs = names or [g.name() for _ in op.outputs]
    g.add_function(*op.node(inputs, outputs, attributes, fused))
    return outputs


def _inputs(g: GraphWriter, op: OnnxOp, given: dict[str, Any]) -> list[str]:
    return ["" if given[p.name] is None else g.tensor(given[p.name]) for p in op.inputs]


def _function(
    target: Any, op: OnnxOp, attributes: _Attributes, single: bool = True, fits: _Fits = _never
) -> None:
    """An op whose tensors are its inputs by name, and whose attributes follow from the rest."""
    EMITTED[target] = f"{DOMAIN}::{op.name}"

    @converts(target)
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        given = arguments(node)
        fused = not g.pure and fits(given)
        made = _write(g, node, op, _inputs(g, op, given), attributes(given), fused=fused)
        return made[0] if single else made


def _attention(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "scale": given["scale"],
        "causal": int(given["causal"]),
        "window": given["window"],
    }


_function(ops.ATTENTION, ATTENTION, _attention)
_function(ops.ATTENTION_LSE, ATTENTION_LSE, _attention, single=False)
_function(
    ops.COLUMN_REDUCE,
    COLUMN_REDUCE,
    lambda given: {
        "scale": given["scale"],
        "causal": int(given["causal"]),
        "heads": given["heads"],
    },
)
_function(ops.SILU_MUL, SILU_MUL, lambda given: {})
_function(
    ops.ADD_RMS_NORM,
    ADD_RMS_NORM,
    lambda given: {"eps": given["eps"]},
    single=False,
    fits=lambda given: given["residual"] is not None and value(given["x"]).dim() in (2, 3),
)


def _same_halves(node: Any) -> bool:
    """Whether both halves of a tensor's last dim are alike, by what it is computed from."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is torch.ops.aten.cat.default:
        parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        last = axis in (-1, value(node).dim() - 1)
        return last and len(parts) == 2 and parts[0] is parts[1]  # type: ignore[arg-type, index]
    if node.target in _EACH_ELEMENT:
        return _same_halves(node.args[0]) and not isinstance(_second(node), fx.Node)
    return False


_aten = torch.ops.aten
_EACH_ELEMENT = (_aten.cos.default, _aten.sin.default, _aten.to.dtype, _aten.mul.Tensor)


def _second(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else None


def _one_rotation(given: dict[str, Any]) -> bool:
    tables = given["cos"], given["sin"]
    same_type = all(value(t).dtype == value(given["q"]).dtype for t in tables)
    return same_type and all(map(_same_halves, tables))


_function(
    ops.ROTARY,
    ROTARY,
    lambda given: {
        "same_type": int(value(given["q"]).dtype == value(given["cos"]).dtype),
        "num_heads": int(value(given["q"]).shape[2]),
        "kv_num_heads": int(value(given["k"]).shape[2]),
    },
    single=False,
    fits=_one_rotation,
)


def _cached(
    target: Any, op: OnnxOp, attributes: _Attributes, results: int, fits: _Fits = _never
) -> None:
    """An op that writes the caches: they come out again, and later readers read what came out."""
    EMITTED[target] = f"{DOMAIN}::{op.name}"

    @converts(target)
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        given = arguments(node)
        caches = [given["k_cache"], given["v_cache"]]
        names = [g.name() for _ in range(results)] + [f"{c.target}_out" for c in caches]
        sizes = {
            "length": g.shared_size(value(given["q"]).shape[2]),
            "capacity": g.shared_size(value(caches[0]).shape[2]),
        }
        tensors = [p.name for p in op.inputs if p.name not in sizes]
        inputs = [g.tensor(given[name]) for name in tensors] + list(sizes.values())
        shape = value(caches[0]).shape
        fixed = (value(given["q"]).shape[1], shape[1], shape[3])
        heads = {name: int(size) for name, size in zip(HEADS, fixed, strict=True)}
        fused = not g.pure and fits(given)
        _write(g, node, op, inputs, attributes(given) | heads, names, fused)
        for cache, name in zip(caches, names[results:], strict=True):
            g.values[cache] = name
        return names[0] if results == 1 else names[:results]


def _windowed(given: dict[str, Any]) -> dict[str, Any]:
    window = given["window"]
    return {"scale": given["scale"], "window": window, "windowed": int(window > 0)}


def _grouped_query(given: dict[str, Any]) -> bool:
    """GroupQueryAttention: its CUDA kernels are of half types; on CPUs it is slower in float32."""
    q = value(given["q"])
    return not given["window"] and q.dtype in HALVES and q.shape[3] % 16 == 0 and q.shape[3] <= 256


_cached(ops.CACHED_ATTENTION, CACHED_ATTENTION, _windowed, 1, _grouped_query)
_cached(ops.CACHED_ATTENTION_LSE, CACHED_ATTENTION_LSE, _windowed, 2)
_cached(
    ops.RETRIEVAL_ATTENTION,
    RETRIEVAL_ATTENTION,
    lambda given: {
        "scale": given["scale"],
        "per_head": int(value(given["index"]).shape[1] > 1),
    },
    1,
)

EMITTED[ops.SELECT_TOKENS] = f"{DOMAIN}::{SELECT_TOKENS.name}"


@converts(ops.SELECT_TOKENS)
def _select_tokens(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    names = [p.name for p in SELECT_TOKENS.inputs[:-1]]
    inputs = [g.tensor(given[name]) for name in names] + [g.length(given["total"])]
    return _write(g, node, SELECT_TOKENS, inputs, {})[0]


EMITTED[ops.W8A8_LINEAR] = f"{DOMAIN}::{W8A8_LINEAR.name}"


@converts(ops.W8A8_LINEAR)
def _w8a8_linear(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    if value(given["weight"]).dtype != torch.int8:
        raise g.refuse(
            node, "float8 linears have no form there that runs; use scheme: w8a8 (int8) or w4a16"
        )
    return _write(g, node, W8A8_LINEAR, _inputs(g, W8A8_LINEAR, given), {})[0]


EMITTED[ops.W4A16_LINEAR] = "com.microsoft::MatMulNBits"
_EXACT, _INT8 = 1, 4
"""Accuracy levels of MatMulNBits: activations as float32, or rounded to int8 a block."""
PURE_W4A16 = "ai.onnx::DequantizeLinear"


@converts(ops.W4A16_LINEAR)
def _w4a16_linear(g: GraphWriter, node: fx.Node) -> Value:
    """The stored bytes are those that MatMulNBits reads: lower nibble first, a row's groups in order."""
    given = arguments(node)
    size: int = given["group_size"]
    names = {key: str(given[key].target) for key in ("qweight", "scales", "zero_points")}
    rows, groups = (int(s) for s in value(given["scales"]).shape)
    x = g.tensor(given["x"])
    dtype = value(given["x"]).dtype
    scales = g.weight(names["scales"], [rows, groups], g.type_code(dtype))
    if g.pure:
        codes = g.weight(names["qweight"], [rows, groups * size], TensorProto.UINT4)
        zeros = g.weight(names["zero_points"], [rows, groups], TensorProto.UINT4)
        dense = g.op("DequantizeLinear", codes, scales, zeros, axis=1, block_size=size)
        out = g.op("MatMul", x, g.op("Transpose", dense, perm=[1, 0]))
    else:
        codes = g.weight(names["qweight"], [rows, groups, size // 2], TensorProto.UINT8)
        zeros = g.weight(names["zero_points"], [rows, (groups + 1) // 2], TensorProto.UINT8)
        out = g.op(
            "MatMulNBits",
            x,
            codes,
            scales,
            zeros,
            domain="com.microsoft",
            K=groups * size,
            N=rows,
            bits=4,
            block_size=size,
            accuracy_level=_INT8 if g.int8_activations else _EXACT,
        )
    return out if given["bias"] is None else g.op("Add", out, g.typed(given["bias"], dtype))


@converts(ops.W4A8_LINEAR)
def _w4a8_linear(g: GraphWriter, node: fx.Node) -> Value:
    raise g.refuse(node, "fp8_prefill multiplies in float8, which has no form there; leave it out")
