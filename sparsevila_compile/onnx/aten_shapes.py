"""ONNX forms of the aten ops that pick and reshape, and of arithmetic on sizes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsevila_compile.graph_edit import value
from sparsevila_compile.onnx.aten import (
    Converter,
    arguments,
    converts,
    dim_of,
    dtype_of,
    rank_of,
)
from sparsevila_compile.onnx.graph_writer import GraphWriter, Value

aten = torch.ops.aten

_END = 2**62
"""Slices to at least here go to the end."""


# ----------------------------------------------------------------- picking


@converts(aten.embedding.default)
def _embedding(g: GraphWriter, node: fx.Node) -> Value:
    return g.op("Gather", g.tensor(node.args[0]), g.tensor(node.args[1]), axis=0)


@converts(aten.index_select.default)
def _index_select(g: GraphWriter, node: fx.Node) -> Value:
    x, dim, index = node.args[:3]
    return g.op("Gather", g.tensor(x), g.tensor(index), axis=dim_of(x, dim))  # type: ignore[arg-type]


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
    return g.op("GatherElements", g.tensor(x), g.tensor(index), axis=dim_of(x, dim))  # type: ignore[arg-type]


@converts(aten.select.int)
def _select(g: GraphWriter, node: fx.Node) -> Value:
    x, dim, index = node.args[:3]
    if isinstance(index, int):
        at = g.constant(index)
    else:
        at = g.op("Squeeze", g.length(index), g.constant([0]))
    return g.op("Gather", g.tensor(x), at, axis=dim_of(x, dim))  # type: ignore[arg-type]


@converts(aten.slice.Tensor)
def _slice(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, start, end, step = given["self"], given["start"] or 0, given["end"], given["step"]
    end = _END if end is None else end
    if isinstance(start, int) and start == 0 and isinstance(end, int) and end >= _END and step == 1:
        return g.tensor(x)
    bounds = [g.length(min(b, _END) if isinstance(b, int) else b) for b in (start, end)]
    axis = g.constant([dim_of(x, given["dim"])])
    return g.op("Slice", g.tensor(x), *bounds, axis, *([] if step == 1 else [g.length(step)]))


# ------------------------------------------------------------------ shapes


@converts(aten.sym_size.int)
def _sym_size(g: GraphWriter, node: fx.Node) -> Value:
    return g.size(g.tensor(node.args[0]), dim_of(node.args[0], node.args[1]))  # type: ignore[arg-type]


@converts(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _reshape(g: GraphWriter, node: fx.Node) -> Value:
    if node in g.shaped:
        return g.tensor(node.args[0])
    return g.op("Reshape", g.tensor(node.args[0]), g.vector(node.args[1]), allowzero=1)  # type: ignore[arg-type]


@converts(aten.flatten.using_ints)
def _flatten(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x = given["self"]
    first, last = dim_of(x, given["start_dim"]), dim_of(x, given["end_dim"])
    name, rank = g.tensor(x), rank_of(x)
    sizes = [g.op("Shape", name, start=0, end=first)] if first else []
    sizes.append(g.constant([-1]))
    sizes += [g.op("Shape", name, start=last + 1)] if last + 1 < rank else []
    return g.op("Reshape", name, g.op("Concat", *sizes, axis=0))


@converts(aten.expand.default)
def _expand(g: GraphWriter, node: fx.Node) -> Value:
    # A size of 1 keeps what is there, as torch's -1 does.
    sizes = [1 if isinstance(s, int) and s == -1 else s for s in node.args[1]]  # type: ignore[union-attr]
    if all(isinstance(s, int) and s == 1 for s in sizes) and len(sizes) == rank_of(node.args[0]):
        return g.tensor(node.args[0])
    return g.op("Expand", g.tensor(node.args[0]), g.vector(sizes))


@converts(aten.unsqueeze.default)
def _unsqueeze(g: GraphWriter, node: fx.Node) -> Value:
    return g.unsqueeze(g.tensor(node.args[0]), node.args[1] % rank_of(node))  # type: ignore[operator, arg-type]


@converts(aten.squeeze.dim)
def _squeeze(g: GraphWriter, node: fx.Node) -> Value:
    x = node.args[0]
    if rank_of(x) == rank_of(node):
        return g.tensor(x)
    return g.op("Squeeze", g.tensor(x), g.constant([dim_of(x, node.args[1])]))  # type: ignore[arg-type]


@converts(aten.transpose.int)
def _transpose(g: GraphWriter, node: fx.Node) -> Value:
    x, first, second = node.args[:3]
    order = list(range(rank_of(x)))
    first, second = dim_of(x, first), dim_of(x, second)  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return g.op("Transpose", g.tensor(x), perm=order)


@converts(aten.permute.default)
def _permute(g: GraphWriter, node: fx.Node) -> Value:
    x, order = node.args[:2]
    return g.op("Transpose", g.tensor(x), perm=[dim_of(x, d) for d in order])  # type: ignore[union-attr, arg-type]


@converts(aten.cat.default)
def _cat(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    parts = [g.typed(t, dtype_of(node)) for t in given["tensors"]]
    return g.op("Concat", *parts, axis=dim_of(node, given["dim"]))


def _views_by_heads(g: GraphWriter, node: fx.Node) -> list[fx.Node]:
    """The views ``[…, heads, dim]`` of the parts of a last dim, if parts are read in no other way.

    The whole can then be reshaped once, and split after that.
    """
    views = [view for part in node.users for view in part.users]
    parts = [part for part in node.users if part.target is operator.getitem]
    if not len(views) == len(parts) == len(node.users) == len(value(node)):
        return []
    if not all(map(_is_view, views)):
        return []
    if len({(str(_sizes(v)[:-2]), str(value(v).shape[-1])) for v in views}) != 1:
        return []
    if not all(s in g.values for v in views for s in _sizes(v) if isinstance(s, fx.Node)):
        return []  # sizes that are computed only later
    dim = value(views[0]).shape[-1]
    whole = isinstance(dim, int) and all(value(part).shape[-1] % dim == 0 for part in parts)
    added = all(rank_of(v) == rank_of(v.args[0]) + 1 for v in views)
    leading = all(
        list(value(v).shape[:-2]) == list(value(v.args[0]).shape[:-1])  # type: ignore[arg-type]
        for v in views
    )
    return views if whole and added and leading else []


def _sizes(view: fx.Node) -> list[Any]:
    given = view.args[1]
    assert isinstance(given, (list, tuple))
    return list(given)


def _is_view(node: fx.Node) -> bool:
    return node.target in (aten.view.default, aten.reshape.default)


@converts(aten.split_with_sizes.default)
def _split(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, sizes = given["self"], given["split_sizes"]
    last = dim_of(x, given["dim"]) == rank_of(x) - 1
    views = _views_by_heads(g, node) if last else []
    if views:
        g.shaped.update(views)
        dim = int(value(views[0]).shape[-1])
        rows = g.vector([*_sizes(views[0])[:-2], -1, dim])
        whole = g.op("Reshape", g.tensor(x), rows, allowzero=1)
        heads = g.vector([size // dim for size in sizes])
        return g.ops("Split", len(sizes), whole, heads, axis=rank_of(x) - 1)
    return g.ops("Split", len(sizes), g.tensor(x), g.vector(sizes), axis=dim_of(x, given["dim"]))


@converts(aten.unbind.int)
def _unbind(g: GraphWriter, node: fx.Node) -> Value:
    given = arguments(node)
    x, dim = given["self"], dim_of(given["self"], given["dim"])
    return [g.op("Gather", g.tensor(x), g.constant(i), axis=dim) for i in range(len(value(node)))]


@converts(aten.arange.default)
def _arange(g: GraphWriter, node: fx.Node) -> Value:
    count = g.range(g.length(node.args[0]))
    return count if dtype_of(node) == torch.int64 else g.cast(count, g.type_code(dtype_of(node)))


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
