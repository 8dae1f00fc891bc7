"""Nothing in the graphs on which onnxruntime's CUDA provider would crash, or answer as it likes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparsevila_compile.kernels.onnx_support import IR_VERSION, OPSET, Body
from sparsevila_compile.onnx.export import ExportOptions, export_component
from tests import tiny
from tests.onnx.graphs import read_on_both_sides, run_strictly
from tests.onnx.test_export import MODELS


@pytest.mark.parametrize("case", MODELS)
def test_no_value_is_read_as_data_and_as_a_shape(case: str) -> None:
    name, specs, pure = MODELS[case]
    program = tiny.compiled(name, *specs).program
    assert len(program.components) >= 3
    for component in program.components:
        model = export_component(program, component, ExportOptions(pure=pure))
        assert read_on_both_sides(model) == [], component


def _model(b: Body, result: str, *inputs: str) -> onnx.ModelProto:
    """A graph of int64 inputs [n]."""
    infos = [helper.make_tensor_value_info(n, TensorProto.INT64, [None]) for n in inputs]
    out = helper.make_empty_tensor_value_info(result)
    graph = helper.make_graph(b.nodes, "g", infos, [out])
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


def test_a_value_that_is_read_twice_is_found() -> None:
    """Directly, by another name, computed twice, and within a loop."""
    b = Body()
    plain = b.op("Expand", "x", "x")
    named = b.op("Reshape", "x", b.op("Identity", b.long("x")))
    size, again = b.size("x", 0), b.size("x", 0)
    twice = b.op("Tile", size, again)
    step = Body(prefix="step_")
    inner = step.op("Slice", "x", size, "x")
    b.loop(size, step, [inner])
    fine = b.op("Slice", "x", size, again, b.constant([0]))
    found = read_on_both_sides(_model(b, fine, "x"))
    assert [f.rpartition(" ")[2] for f in found] == [plain, named, twice, inner]


def _of(kind: str, *inputs: Any, looped: bool = False, **attributes: Any) -> list[Any]:
    names = [f"x{i}" for i in range(len(inputs))]
    b = Body()
    if looped:
        step = Body(prefix="step_")
        (out,) = b.loop(b.constant([1]), step, [step.op(kind, *names, **attributes)])
    else:
        out = b.op(kind, *names, **attributes)
    feeds = dict(zip(names, (np.array(x) for x in inputs), strict=True))
    return [x.tolist() for x in run_strictly(_model(b, out, *names), feeds)]


@pytest.mark.parametrize("looped", [False, True])
def test_what_cuda_does_not_promise_is_refused(looped: bool) -> None:
    data = [5, 6, 7]
    refused = {
        "one place twice": ("ScatterElements", data, [1, 1], [8, 8]),
        "two values for one place": ("ScatterND", data, [[1], [1]], [8, 9]),
        "ScatterND: out of range": ("ScatterND", data, [[3]], [8]),
        "Gather: out of range": ("Gather", data, [-1]),
        "GatherElements: out of range": ("GatherElements", data, [3]),
        "GatherND: out of range": ("GatherND", data, [[3]]),
        "TopK of infinity": ("TopK", [1.0, -np.inf], [1]),
        "TopK of a NaN": ("TopK", [1.0, np.nan], [1]),
    }
    for why, (kind, *inputs) in refused.items():
        with pytest.raises(AssertionError, match=why):
            _of(kind, *inputs, looped=looped)
    wrap = (lambda x: [[x]]) if looped else (lambda x: [x])
    assert _of("ScatterND", data, [[1], [1], [0]], [8, 8, 9], looped=looped) == wrap([9, 8, 7])
    assert _of("ScatterElements", data, [2, 0], [1, 2], looped=looped) == wrap([2, 6, 1])
    assert _of("GatherND", data, [[2], [0]], looped=looped) == wrap([7, 5])


def test_equal_ones_come_in_another_order_than_onnx_promises() -> None:
    b = Body()
    _, places = b.ops("TopK", 2, "x", b.constant([4]), axis=0, largest=1, sorted=1)
    (found,) = run_strictly(_model(b, places, "x"), {"x": np.array([3, 9, 3, 9, 1])})
    assert found.tolist() == [3, 1, 2, 0]
