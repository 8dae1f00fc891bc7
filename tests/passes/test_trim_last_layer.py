"""``trim_last_layer``: what moves behind the gather of rows, that logits stay, and the misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsevila_compile.ops import W4A16_LINEAR
from sparsevila_compile.passes.trim_last_layer import NOT_ROWS
from sparsevila_compile.program import Program
from tests import tiny
from tests.kernels.compare import assert_close_to
from tests.passes.fusing import FUSED, misses, program_of, result
from tests.passes.quantizing import outputs, prompt, rtn
from tests.passes.rules import check
from tests.tiny import Image, words

PASS = "trim_last_layer"
LINEAR = torch.ops.aten.linear.default
ONE_ROW = "a decode step has one row a sequence"


def rows_of(program: Program, component: str) -> list[str]:
    """For each linear, in order, how many rows of a sequence it computes, as text."""
    nodes = program.component(component).graph.nodes
    kinds = (LINEAR, W4A16_LINEAR)
    return [str(n.meta["val"].shape[1]) for n in nodes if n.target in kinds]


@pytest.mark.parametrize("fused", ["before", "after", None])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_models(name: str, quantized: bool, fused: str | None) -> None:
    program = tiny.at_stage(name, "canonicalize", *tiny.FULL)
    if quantized:
        rtn(program)
    before = {c: outputs(program, "language", prompt(name), c) for c in ("language", "turn")}
    if fused == "before":
        tiny.step(program, *FUSED)
    report = check(program, PASS)
    if fused == "after":
        for pass_ in FUSED:
            check(program, pass_)
    assert [s.component for s in report.matches] == ["language", "turn"]
    assert misses(report) == {ONE_ROW: 1}
    asked = str(program.component("language").input("logit_rows").meta["val"].shape[1])
    merged = fused is not None
    for component in ("language", "turn"):
        counts = [c == asked for c in rows_of(program, component)]
        # q, k, v of two layers and the first layer's rest see every token; then o_proj, the MLP
        # and the head see rows.
        short = 1 + (2 if merged else 3) + 1
        assert counts == [False] * (len(counts) - short) + [True] * short
    for component, wanted in before.items():
        got = outputs(program, "language", prompt(name), component)
        assert_close_to(got, wanted, 1e-5, component)


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "llava_tied", "qwen_windowed"])
def test_same_as_transformers(name: str) -> None:
    """Rows of different lengths, so that the asked row differs."""
    rows: list[tiny.Row] = [[Image(1), *words(3)], words(7, 5), [Image(2, (6, 6)), *words(2)]]
    given = tiny.inputs(name, rows)
    out = tiny.compiled(name, *tiny.FULL, *FUSED, PASS).generate(**given, **tiny.greedy(24))
    assert torch.equal(out, tiny.dense(name, given, **tiny.greedy(24)))


# ---------------------------------------------------------------------- small graphs

INPUTS = {
    "x": (torch.float32, ("batch", "length", 8)),
    "logit_rows": (torch.int64, ("batch", "asked")),
}
WEIGHTS = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}
linear = torch.nn.functional.linear


def pick(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


def residual(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = x.cumsum(1)
    return linear(pick(h + linear(h, a), rows), b)


def test_every_input_is_gathered_once() -> None:
    program = program_of(residual, INPUTS, WEIGHTS)
    x, rows = torch.randn(2, 5, 8), torch.tensor([[4, 0, 4], [1, 2, 3]])
    wanted = result(program, x, rows)
    check(program, PASS)
    gathers = [n for n in program.component("language").graph.nodes if "gather" in str(n.target)]
    assert len(gathers) == 1
    assert_close_to(result(program, x, rows), wanted, 1e-6, "y")


def used_twice(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Its input's other use sees every row."""
    y = linear(x, a)
    return linear(pick(y, rows), b) + y.sum()


def across_rows(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return linear(pick(linear(x, a).cumsum(1), rows), b)


def other_rows(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return linear(pick(linear(x, a), rows + 1), b)


def turned_rows(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return linear(pick(linear(x, a), rows.flip(1)), b)


def other_dim(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    index = rows[:, None, :].expand(-1, 8, -1)
    return linear(linear(x, a).transpose(1, 2).gather(2, index).transpose(1, 2), b)


ALONE = "no linear lies between it and other uses"


@pytest.mark.parametrize(
    "function, reason",
    [
        (used_twice, ALONE),
        (across_rows, ALONE),
        (other_rows, NOT_ROWS),
        (turned_rows, NOT_ROWS),
        (other_dim, NOT_ROWS),
    ],
)
def test_misses(function: Callable[..., Tensor], reason: str) -> None:
    program = program_of(function, INPUTS, WEIGHTS)
    before = str(program.component("language").graph)
    [report] = tiny.step(program, (PASS, {"optional": True}))
    assert report.matches == ()
    assert misses(report) == {reason: 1}
    assert str(program.component("language").graph) == before


def test_values_of_other_shapes_are_not_gathered() -> None:
    def broadcast(x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear(pick(linear(x, a) + x.mean(1, keepdim=True), rows), b)

    program = program_of(broadcast, INPUTS, WEIGHTS)
    [report] = tiny.step(program, (PASS, {"optional": True}))
    [reason] = misses(report)
    assert reason.endswith("has no such rows")
