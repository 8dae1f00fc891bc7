"""ONNX forms of the aten ops that traced and rewritten graphs hold."""

from __future__ import annotations

import operator
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

_END = 2**62
"""Slices to at least here go to the end."""


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


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = value(node).dtype
    return found


def _rank(node: Any) -> int:
    return int(value(node).dim())


def _dim(node: Any, dim: int) -> int:
    rank = _rank(node)
    return dim % rank if rank else 0


# -------------------------------------------------------------- one by one


def _binary(kind: str) -> Converter:
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        given = arguments(node)
        if given.get("alpha", 1) != 1:
            raise g.refuse(node, "a sum with alpha")
        x, y = given["self"], given["other"]
        dtype = _dtype(node)
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
        x = g.typed(node.args[0], _dtype(node))
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
    return g.op("Pow", g.typed(x, _dtype(node)), g.typed(exponent, _dtype(node)))


@converts(aten.clamp_min.default)
def _clamp_min(g: GraphWriter, node: fx.Node) -> Value:
    x, low = node.args[:2]
    return g.op("Max", g.typed(x, _dtype(node)), g.typed(low, _dtype(node)))


@converts(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.where.self)
def _where(g: GraphWriter, node: fx.Node) -> Value:
    condition, x, y = node.args[:3]
    return g.op("Where", g.tensor(condition), g.typed(x, _dtype(node)), g.typed(y, _dtype(node)))


@converts(aten.to.dtype, aten.to.device, aten._to_copy.default, aten.to.dtype_layout)
def _to(g: GraphWriter, node: fx.Node) -> Value:
    return g.typed(node.args[0], _dtype(node))


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
        x = g.typed(given["self"], _dtype(node))
        return g.op(kind, x, *([g.constant(axes)] if axes else []), keepdims=keep)

    return convert


converts(aten.mean.dim)(_reduction("ReduceMean"))
converts(aten.amax.default)(_reduction("ReduceMax"))
converts(aten.sum.dim_IntList)(_reduction("ReduceSum"))


@converts(aten.softmax.int, aten._softmax.default)
def _softmax(g: GraphWriter, node: fx.Node) -> Value:
    return g.op("Softmax", g.typed(node.args[0], _dtype(node)), axis=node.args[1])


@converts(aten.argsort.default)
def _argsort(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, dim = given["self"], _dim(given["self"], given["dim"])
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
    rank = _rank(node) - 2

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
    inputs = [given["input"], given["weight"]]
    inputs += [] if given["bias"] is None else [given["bias"]]
    return g.op("Conv", *map(g.tensor, inputs), **attributes)


# ----------------------------------------------------------------- picking


@converts(aten.embedding.default)
def _embedding(g: GraphWriter, node: fx.Node) -> Value:
    return g.op("Gather", g.tensor(node.args[0]), g.tensor(node.args[1]), axis=0)


@converts(aten.index_select.default)
def _index_select(g: GraphWriter, node: fx.Node) -> Value:
    x, dim, index = node.args[:3]
    return g.op("Gather", g.tensor(x), g.tensor(index), axis=_dim(x, dim))  # type: ignore[arg-type]


@converts(aten.index.Tensor)
def _index(g: GraphWriter, node: fx.Node) -> Value:
    x, indices = node.args[:2]
    given = [(i, n) for i, n in enumerate(indices) if n is not None]  # type: ignore[arg-type]
    if len(given) != 1 or value(given[0][1]).dtype == torch.bool:
        raise g.refuse(node, "indexing by several tensors or by a mask")
    axis, index = given[0]
    return g.op("Gather", g.tensor(x), g.tensor(index), axis=axis)


@converts(aten.gather.default)
def _gather(g: GraphWriter, node: fx.Node) -> Value:
    x, dim, index = node.args[:3]
    return g.op("GatherElements", g.tensor(x), g.tensor(index), axis=_dim(x, dim))  # type: ignore[arg-type]


@converts(aten.select.int)
def _select(g: GraphWriter, node: fx.Node) -> Value:
    x, dim, index = node.args[:3]
    at = g.op("Squeeze", g.length(index), g.constant([0]))
    return g.op("Gather", g.tensor(x), at, axis=_dim(x, dim))  # type: ignore[arg-type]


@converts(aten.slice.Tensor)
def _slice(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, start, end, step = given["self"], given["start"] or 0, given["end"], given["step"]
    end = _END if end is None else end
    if isinstance(start, int) and start == 0 and isinstance(end, int) and end >= _END and step == 1:
        return g.tensor(x)
    bounds = [g.length(min(b, _END) if isinstance(b, int) else b) for b in (start, end)]
    axis = g.constant([_dim(x, given["dim"])])
    return g.op("Slice", g.tensor(x), *bounds, axis, *([] if step == 1 else [g.length(step)]))


# ------------------------------------------------------------------ shapes


@converts(aten.sym_size.int)
def _sym_size(g: GraphWriter, node: fx.Node) -> Value:
    return g.size(g.tensor(node.args[0]), _dim(node.args[0], node.args[1]))  # type: ignore[arg-type]


@converts(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _reshape(g: GraphWriter, node: fx.Node) -> Value:
    return g.op("Reshape", g.tensor(node.args[0]), g.vector(node.args[1]), allowzero=1)  # type: ignore[arg-type]


@converts(aten.flatten.using_ints)
def _flatten(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x = given["self"]
    first, last = _dim(x, given["start_dim"]), _dim(x, given["end_dim"])
    name, rank = g.tensor(x), _rank(x)
    sizes = [g.op("Shape", name, start=0, end=first)] if first else []
    sizes.append(g.constant([-1]))
    sizes += [g.op("Shape", name, start=last + 1)] if last + 1 < rank else []
    return g.op("Reshape", name, g.op("Concat", *sizes, axis=0))


@converts(aten.expand.default)
def _expand(g: GraphWriter, node: fx.Node) -> Value:
    # A size of 1 keeps what is there, as torch's -1 does.
    sizes = [1 if isinstance(s, int) and s == -1 else s for s in node.args[1]]  # type: ignore[union-attr]
    if all(isinstance(s, int) and s == 1 for s in sizes) and len(sizes) == _rank(node.args[0]):
        return g.tensor(node.args[0])
    return g.op("Expand", g.tensor(node.args[0]), g.vector(sizes))


@converts(aten.unsqueeze.default)
def _unsqueeze(g: GraphWriter, node: fx.Node) -> Value:
    return g.unsqueeze(g.tensor(node.args[0]), node.args[1] % _rank(node))  # type: ignore[operator, arg-type]


@converts(aten.squeeze.dim)
def _squeeze(g: GraphWriter, node: fx.Node) -> Value:
    x = node.args[0]
    if _rank(x) == _rank(node):
        return g.tensor(x)
    return g.op("Squeeze", g.tensor(x), g.constant([_dim(x, node.args[1])]))  # type: ignore[arg-type]


@converts(aten.transpose.int)
def _transpose(g: GraphWriter, node: fx.Node) -> Value:
    x, first, second = node.args[:3]
    order = list(range(_rank(x)))
    first, second = _dim(x, first), _dim(x, second)  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return g.op("Transpose", g.tensor(x), perm=order)


@converts(aten.permute.default)
def _permute(g: GraphWriter, node: fx.Node) -> Value:
    x, order = node.args[:2]
    return g.op("Transpose", g.tensor(x), perm=[_dim(x, d) for d in order])  # type: ignore[union-attr, arg-type]


@converts(aten.cat.default)
def _cat(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    parts = [g.typed(t, _dtype(node)) for t in given["tensors"]]
    return g.op("Concat", *parts, axis=_dim(node, given["dim"]))


@converts(aten.split_with_sizes.default)
def _split(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, sizes = given["self"], given["split_sizes"]
    return g.ops("Split", len(sizes), g.tensor(x), g.vector(sizes), axis=_dim(x, given["dim"]))


@converts(aten.unbind.int)
def _unbind(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, dim = given["self"], _dim(given["self"], given["dim"])
    return [g.op("Gather", g.tensor(x), g.constant(i), axis=dim) for i in range(len(value(node)))]


@converts(aten.arange.default)
def _arange(g: GraphWriter, node: fx.Node) -> Value:
    count = g.range(g.length(node.args[0]))
    return count if _dtype(node) == torch.int64 else g.cast(count, g.type_code(_dtype(node)))


# ---------------------------------------------------------- sizes in Python


def _arithmetic(kind: str) -> Converter:
    def convert(g: GraphWriter, node: fx.Node) -> Value:
        if isinstance(value(node), (float, torch.SymFloat)):
            raise g.refuse(node, "floating-point arithmetic on sizes")
        return g.op(kind, *(g.length(a) for a in node.args))

    return convert


for _function, _kind in {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.mod: "Mod",
    operator.neg: "Neg",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
}.items():
    converts(_function)(_arithmetic(_kind))


@converts(operator.floordiv)
def _floordiv(g: GraphWriter, node: fx.Node) -> Value:
    x, y = (g.length(a) for a in node.args)
    # ONNX divides towards zero, but its remainder has the divisor's sign, as Python's.
    return g.op("Div", g.op("Sub", x, g.op("Mod", x, y)), y)


@converts(operator.getitem)
def _getitem(g: GraphWriter, node: fx.Node) -> Value:
    source, index = node.args[:2]
    found = g.values[source]  # type: ignore[index]
    assert isinstance(found, list)
    assert isinstance(index, int)
    return found[index]
