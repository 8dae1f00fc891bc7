"""What in a graph may differ between onnxruntime's CPU and CUDA kernels: found by reading, and by
running it with ops that promise only what both keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_loop import Loop as _Loop

HOST_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "GroupQueryAttention": (6,),
    "If": (0,),
    "Loop": (0, 1),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
"""Inputs that CUDA kernels read in the processor's memory; of Reduce… ops it is the axes."""


def host_inputs(kind: str) -> tuple[int, ...]:
    return (1,) if kind.startswith("Reduce") else HOST_INPUTS.get(kind, ())


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the bodies of its functions in place of their nodes."""
    made: onnx.ModelProto = onnx.inliner.inline_local_functions(model)
    return made


def read_on_both_sides(model: onnx.ModelProto) -> list[str]:
    """Nodes that read one value both as data and as a shape or axes.

    onnxruntime copies a value that crosses the bus and gives the copy to *all* inputs of the node:
    its CUDA provider then follows a pointer of the other side and crashes. Values that its
    optimizer would find to be the same count as one.
    """
    numbers: dict[Any, int] = {}
    found: list[str] = []

    def number(key: Any) -> int:
        return numbers.setdefault(key, len(numbers))

    def walk(graph: onnx.GraphProto, outer: dict[str, int]) -> None:
        values = dict(outer)
        for info in graph.input:
            values[info.name] = number(("input", id(graph), info.name))
        for weight in graph.initializer:
            values[weight.name] = number(("weight", weight.name, weight.SerializeToString()))
        for node in graph.node:
            reads = [values[x] if x else -1 for x in node.input]
            host = {r for i, r in enumerate(reads) if i in host_inputs(node.op_type)} - {-1}
            device = {r for i, r in enumerate(reads) if i not in host_inputs(node.op_type)} - {-1}
            if host & device:
                found.append(f"{node.op_type}({', '.join(node.input)}) -> {node.output[0]}")
            bodies = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            for body in bodies:
                walk(body, values)
            attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
            key = (node.op_type, attributes, tuple(reads), id(node) if bodies else 0)
            for place, name in enumerate(node.output):
                same = node.op_type == "Identity" or _to_int64(node)
                values[name] = reads[0] if same else number((*key, place))

    walk(inlined(model).graph, {})
    return found


def _to_int64(node: onnx.NodeProto) -> bool:
    """A cast that is left out where its input is int64 already."""
    return node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == 7


# ------------------------------------------------------------- strict kernels


class _StrictError(AssertionError):
    """Something whose result the CUDA provider does not promise."""


def _require(holds: Any, what: str) -> None:
    if not holds:
        raise _StrictError(what)


def _in_range(index: np.ndarray[Any, Any], size: int, kind: str) -> None:
    _require(index.size == 0 or (index.min() >= 0 and index.max() < size), f"{kind}: out of range")


def _written_once(places: np.ndarray[Any, Any], values: np.ndarray[Any, Any], kind: str) -> None:
    """Places [n] are different, or what is written there [n, ...] is the same."""
    order = np.argsort(places, kind="stable")
    places, values = places[order], values[order]
    again = places[1:] == places[:-1]
    _require((values[1:][again] == values[:-1][again]).all(), f"{kind}: two values for one place")


class TopK(OpRun):
    """The values of ONNX's, but equal ones in another order than it promises.

    Of equal ones the last comes first. What CUDA's kernel fills a row up with, the least number,
    must not be above any of its values.
    """

    def _run(self, x: Any, k: Any, axis: int, largest: int, sorted: int) -> tuple[Any, Any]:
        _require(not np.isnan(x).any(), "TopK of a NaN")
        if x.dtype.kind == "f":
            ends = np.finfo(x.dtype)
            past = x < ends.min if largest else x > ends.max
            _require(not past.any(), "TopK of infinity: CUDA fills rows with the least number")
        count = int(k[0])
        turned = np.flip(-x if largest else x, axis)
        order = x.shape[axis] - 1 - np.argsort(turned, axis, kind="stable")
        order = np.take(order, np.arange(count), axis)
        return np.take_along_axis(x, order, axis), order.astype(np.int64)


class ScatterElements(OpRun):
    def _run(self, x: Any, at: Any, new: Any, axis: int, reduction: str) -> tuple[Any]:
        _require(x.ndim == 1 and reduction in (None, "none"), "ScatterElements: of one dim")
        _in_range(at, len(x), "ScatterElements")
        _require(len(np.unique(at)) == at.size, "ScatterElements: one place twice")
        out = x.copy()
        out[at] = new
        return (out,)


class ScatterND(OpRun):
    def _run(self, x: Any, at: Any, new: Any, reduction: str) -> tuple[Any]:
        _require(reduction in (None, "none"), "ScatterND: a reduction")
        depth = at.shape[-1]
        for axis in range(depth):
            _in_range(at[..., axis], x.shape[axis], "ScatterND")
        places = np.ravel_multi_index(tuple(np.moveaxis(at, -1, 0)), x.shape[:depth]).ravel()
        values = new.reshape(places.size, -1)
        _written_once(places, values, "ScatterND")
        out = x.copy()
        out.reshape(-1, values.shape[1])[places] = values
        return (out,)


class Gather(OpRun):
    def _run(self, x: Any, at: Any, axis: int) -> tuple[Any]:
        axis = axis or 0
        _in_range(at, x.shape[axis], "Gather")
        return (np.take(x, at, axis),)


class GatherElements(OpRun):
    def _run(self, x: Any, at: Any, axis: int) -> tuple[Any]:
        axis = axis or 0
        _in_range(at, x.shape[axis], "GatherElements")
        return (np.take_along_axis(x, at, axis),)


class GatherND(OpRun):
    def _run(self, x: Any, at: Any, batch_dims: int) -> tuple[Any]:
        _require(not batch_dims, "GatherND: by batches")
        for axis in range(at.shape[-1]):
            _in_range(at[..., axis], x.shape[axis], "GatherND")
        return (x[tuple(np.moveaxis(at, -1, 0))],)


class Loop(_Loop):
    """As ours are: a count, and results along a new axis, which onnx's own does not make."""

    def _run(self, count: Any, going: Any, *, context: Any, **rest: Any) -> tuple[Any, ...]:
        _require(going is None and self.N == 0, "Loop: with a condition or carried values")
        step, go_on = self.body.input_names
        made = [
            self._run_body(
                {**context, step: np.array(i), go_on: np.array(True)},
                attributes=rest.get("attributes"),
                bindings=rest.get("bindings"),
            )[1:]
            for i in range(int(count))
        ]
        return tuple(np.stack(parts) for parts in zip(*made, strict=True))


STRICT: Sequence[type[OpRun]] = (
    Loop,
    TopK,
    ScatterElements,
    ScatterND,
    Gather,
    GatherElements,
    GatherND,
)


def run_strictly(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """The outputs, with ops that refuse what the CUDA provider does not promise."""
    evaluator = ReferenceEvaluator(inlined(model), new_ops=list(STRICT))
    with np.errstate(invalid="ignore"):  # some bodies reckon with a NaN
        results: list[Any] = evaluator.run(None, feeds)
    return results
