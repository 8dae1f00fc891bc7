"""ONNX forms of the aten ops that compute; the table that all converters register in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsevila_compile.graph_edit import value
from sparsevila_compile.onnx.graph_writer import GraphWriter, Value

Converter = Callable[[GraphWriter, fx.Node], Value]
aten = torch.ops.aten

CONVERTERS: dict[Any, Converter] = {}
"""By target: writes a node's ONNX form and returns the name of its value, or of its values."""


def converts(*targets: Any) -> Callable[[Converter], Converter]:
    def register(function: Converter) -> Converter:
        for target in targets:
            if target in CONVERTERS:
                raise ValueError(f"{target} has two converters")
            CONVERTERS[target] = function
        return function

    return register


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    declared = target._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    given |= {a.name: x for a, x in zip(declared, node.args, strict=False)}
    return given | node.kwargs


def dtype_of(node: fx.Node) -> torch.dtype:
    found: torch.dtype = value(node).dtype
    return found


def rank_of(node: Any) -> int:
    return int(value(node).dim())


def dim_of(node: Any, dim: int) -> int:
    rank = rank_of(node)
    return dim % rank if rank else 0


# -------------------------------------------------------------- one by one


def _binary(kind: str) -> Converter:
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        given = arguments(node)
        if given.get("alpha", 1) != 1:
            raise g.refuse(node, "a sum with alpha")
        x, y = given["self"], given["other"]
        dtype = dtype_of(node)
        if dtype == torch.bool:  # a comparison: in the type of what is compared
            sides = [value(a) for a in (x, y) if isinstance(a, fx.Node)]
            tensors = [s.dtype for s in sides if isinstance(s, torch.Tensor)]
            dtype = tensors[0] if len(tensors) == 1 else torch.promote_types(*tensors)
        return g.op(kind, g.typed(x, dtype), g.typed(y, dtype))

    return convert


for _kind, _targets in {
    "Add": (aten.add.Tensor, aten.add.Scalar),
    "Sub": (aten.sub.Tensor, aten.sub.Scalar),
    "Mul": (aten.mul.Tensor, aten.mul.Scalar),
    "Div": (aten.div.Tensor, aten.div.Scalar),
    "Less": (aten.lt.Scalar, aten.lt.Tensor),
    "LessOrEqual": (aten.le.Scalar, aten.le.Tensor),
    "Greater": (aten.gt.Scalar, aten.gt.Tensor),
    "GreaterOrEqual": (aten.ge.Scalar, aten.ge.Tensor),
    "Equal": (aten.eq.Scalar, aten.eq.Tensor),
}.items():
    converts(*_targets)(_binary(_kind))


def _unary(*kinds: str, **attributes: Any) -> Converter:
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        x = g.typed(node.args[0], dtype_of(node))
        for kind in kinds:
            x = g.op(kind, x, **attributes)
        return x

    return convert


for _target, _kinds in {
    aten.neg.default: ("Neg",),
    aten.cos.default: ("Cos",),
    aten.sin.default: ("Sin",),
    aten.exp.default: ("Exp",),
    aten.sqrt.default: ("Sqrt",),
    aten.rsqrt.default: ("Sqrt", "Reciprocal"),
    aten.reciprocal.default: ("Reciprocal",),
    aten.sigmoid.default: ("Sigmoid",),
    aten.tanh.default: ("Tanh",),
    aten.relu.default: ("Relu",),
}.items():
    converts(_target)(_unary(*_kinds))


@converts(aten.silu.default)
def _silu(g: GraphWriter, node: fx.Node) -> Value:
    x = g.tensor(node.args[0])
    return g.op("Mul", x, g.op("Sigmoid", x))


@converts(aten.gelu.default)
def _gelu(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    return g.op("Gelu", g.tensor(given["self"]), approximate=given["approximate"])


@converts(aten.pow.Tensor_Scalar)
def _pow(g: GraphWriter, node: fx.Node) -> Value:
    x, exponent = node.args[:2]
    return g.op("Pow", g.typed(x, dtype_of(node)), g.typed(exponent, dtype_of(node)))


@converts(aten.clamp_min.default)
def _clamp_min(g: GraphWriter, node: fx.Node) -> Value:
    x, low = node.args[:2]
    return g.op("Max", g.typed(x, dtype_of(node)), g.typed(low, dtype_of(node)))


@converts(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.where.self)
def _where(g: GraphWriter, node: fx.Node) -> Value:
    condition, x, y = node.args[:3]
    return g.op(
        "Where", g.tensor(condition), g.typed(x, dtype_of(node)), g.typed(y, dtype_of(node))
    )


@converts(aten.to.dtype, aten.to.device, aten._to_copy.default, aten.to.dtype_layout)
def _to(g: GraphWriter, node: fx.Node) -> Value:
    return g.typed(node.args[0], dtype_of(node))


@converts(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
def _same(g: GraphWriter, node: fx.Node) -> Value:
    return g.tensor(node.args[0])


# ------------------------------------------------------------- reductions


def _reduction(kind: str) -> Converter:
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        given = arguments(node)
        dims = given["dim"]
        axes = [dims] if isinstance(dims, int) else list(dims or [])
        keep = int(given["keepdim"])
        x = g.typed(given["self"], dtype_of(node))
        return g.op(kind, x, *([g.constant(axes)] if axes else []), keepdims=keep)

    return convert


converts(aten.mean.dim)(_reduction("ReduceMean"))
converts(aten.amax.default)(_reduction("ReduceMax"))
converts(aten.sum.dim_IntList)(_reduction("ReduceSum"))


@converts(aten.softmax.int, aten._softmax.default)
def _softmax(g: GraphWriter, node: fx.Node) -> Value:
    return g.op("Softmax", g.typed(node.args[0], dtype_of(node)), axis=node.args[1])


@converts(aten.argsort.default)
def _argsort(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, dim = given["self"], dim_of(given["self"], given["dim"])
    count = g.size(g.tensor(x), dim)
    largest = int(given["descending"])
    return g.ops("TopK", 2, g.tensor(x), count, axis=dim, largest=largest, sorted=1)[1]


@converts(aten.layer_norm.default)
def _layer_norm(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    if given["weight"] is None:
        raise g.refuse(node, "a LayerNorm without a weight")
    bias = [] if given["bias"] is None else [g.tensor(given["bias"])]
    return g.op(
        "LayerNormalization",
        g.tensor(given["input"]),
        g.tensor(given["weight"]),
        *bias,
        axis=-len(given["normalized_shape"]),
        epsilon=given["eps"],
    )


# ---------------------------------------------------------------- products


@converts(aten.matmul.default, aten.bmm.default)
def _matmul(g: GraphWriter, node: fx.Node) -> Value:
    return g.op("MatMul", g.tensor(node.args[0]), g.tensor(node.args[1]))


@converts(aten.linear.default)
def _linear(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, weight = g.tensor(given["input"]), given["weight"]
    if weight.op == "get_attr" and weight.target in g.transposed:
        product = g.op("MatMul", x, g.tensor(weight))
    elif g.pure:
        turned = g.op("Transpose", g.tensor(weight), perm=[1, 0])
        product = g.op("MatMul", x, turned)
    else:  # a weight that something else reads too, as tied embeddings are
        product = g.op("FusedMatMul", x, g.tensor(weight), domain="com.microsoft", transB=1)
    return product if given["bias"] is None else g.op("Add", product, g.tensor(given["bias"]))


@converts(aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding)
def _conv(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    rank = rank_of(node) - 2

    def each(x: Any) -> list[int]:
        return [int(x[0] if len(x) == 1 else x[i]) for i in range(rank)]

    attributes: dict[str, Any] = {
        "strides": each(given["stride"]),
        "dilations": each(given["dilation"]),
        "group": given["groups"],
    }
    padding = given["padding"]
    if padding == "same":
        attributes["auto_pad"] = "SAME_UPPER"
    elif padding != "valid":
        attributes["pads"] = each(padding) * 2
    held = [t for t in (given["input"], given["weight"], given["bias"]) if t is not None]
    dtype = dtype_of(node)
    if g.dtype(dtype) != torch.bfloat16:
        return g.op("Conv", *map(g.tensor, held), **attributes)
    # Conv takes no bfloat16 in this opset.
    wide = g.op("Conv", *(g.float(g.tensor(t)) for t in held), **attributes)
    return g.cast(wide, g.type_code(dtype))
