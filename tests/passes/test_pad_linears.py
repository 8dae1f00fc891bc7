"""``pad_linears``: inner widths become multiples, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sparsevila_compile.pass_base import PassError, calls, tensor_of
from sparsevila_compile.passes.pad_linears import LINEAR
from tests import tiny
from tests.passes.rules import check

ODD = 56
"""A multiple that divides no inner width of the tiny encoders."""


def widths(program: object, component: str) -> list[int]:
    return [int(tensor_of(n.args[1]).shape[1]) for n in calls(program, component, LINEAR)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_mlps_are_padded_and_answer_alike(name: str) -> None:
    plain = tiny.at_stage(name, "canonicalize")
    program = tiny.at_stage(name, "canonicalize")
    before = [w for w in widths(program, "vision") if w % ODD]
    report = check(program, ("pad_linears", {"multiple": ODD}))
    assert report.matches
    assert report.notes["widths"]
    matched = {(m.component, m.node) for m in report.matches}
    for component in ("vision", "language"):
        for node in calls(program, component, LINEAR):
            if (component, node.name) in matched:
                assert int(tensor_of(node.args[1]).shape[1]) % ODD == 0  # type: ignore[arg-type]
    assert before
    # The same tokens from the same pictures: the added channels are zeros.
    for key, weight in program.weights.items():
        old = plain.weights[key]
        if old.shape == weight.shape:
            continue
        inside = weight[tuple(slice(0, n) for n in old.shape)]
        assert torch.equal(inside, old), key
        assert float(weight.abs().sum()) == pytest.approx(float(old.abs().sum()), rel=1e-5)


def test_answers_do_not_change() -> None:
    prompt = tiny.inputs("qwen", [[tiny.Image(1), *tiny.words(6)]])
    plain = tiny.compiled("qwen", "insert_kv_cache").generate(**prompt, **tiny.greedy(12))
    padded = tiny.compiled("qwen", "insert_kv_cache", ("pad_linears", {"multiple": ODD}))
    assert torch.equal(padded.generate(**prompt, **tiny.greedy(12)), plain)


def test_no_odd_width_is_an_error() -> None:
    program = tiny.at_stage("llava", "canonicalize")
    with pytest.raises(PassError, match="matches nothing"):
        tiny.step(program, ("pad_linears", {"multiple": 2}))


def test_a_linear_that_is_used_elsewhere_is_left() -> None:
    program = tiny.at_stage("qwen", "canonicalize")
    component = program.component("vision")
    down = next(
        n for n in calls(program, "vision", LINEAR)
        if isinstance(n.args[0], fx.Node) and n.args[0].target is torch.ops.aten.mul.Tensor
        and int(tensor_of(n.args[1]).shape[1]) % ODD  # type: ignore[arg-type]
    )  # fmt: skip
    product = down.args[0]
    assert isinstance(product, fx.Node)
    component.output_node().args = ((*component.results(), product),)
    component.outputs = (*component.outputs, "extra")
    report = tiny.step(program, ("pad_linears", {"multiple": ODD}))[0]
    assert any(m.reason == "its input is used elsewhere too" for m in report.misses)
    assert down.name not in {m.node for m in report.matches}
