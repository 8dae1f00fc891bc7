"""``canonicalize``: everything superfluous goes, nothing else, and results stay the same."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.engine import Engine
from sparsevila_compile.families import family_of
from sparsevila_compile.program import Program
from sparsevila_compile.trace import trace_function
from tests import tiny
from tests.passes.rules import check, count

aten = torch.ops.aten


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str) -> None:
    program = tiny.traced(name)
    checks = sum(
        count(program, c, aten._assert_tensor_metadata.default) for c in program.components
    )
    casts = sum(
        n.args[0].meta["val"].dtype == n.meta["val"].dtype
        for c in program.components.values()
        for n in c.graph.nodes
        if n.target in (aten.to.dtype, aten.to.device)
    )
    ones = sum(
        n.target is aten.mul.Tensor and n.args[1] == 1
        for c in program.components.values()
        for n in c.graph.nodes
    )
    assert checks > 10
    assert casts > 10
    assert ones in (2, 4)  # cos and sin, times a scaling that these models do not have
    report = check(program, "canonicalize")
    assert len(report.matches) == checks + casts + ones
    for component in program.components:
        assert count(program, component, aten._assert_tensor_metadata.default) == 0
        assert count(program, component, aten.to.device) == 0
    # Rotary positions are integers that really become floats.
    assert count(program, "language", aten.to.dtype) == 1


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_results_are_the_same_bits(name: str) -> None:
    embeds = torch.randn(2, 5, 64)
    positions = torch.arange(5).expand(*((3, 2) if tiny.is_qwen(name) else (2,)), 5)
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "logit_rows": torch.tensor([[4], [2]]),
    }
    before, after = tiny.traced(name), tiny.at_stage(name, "canonicalize")
    a, b = (
        Engine(p, family_of(p.config)).run("language", inputs)["logits"] for p in (before, after)
    )
    assert a.norm() > 1
    assert torch.equal(a, b)


class _Clutter(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float32)  # nothing
        x = torch.nn.functional.dropout(x, 0.5, training=False)  # nothing
        x = torch.ops.aten.alias(x).detach()  # nothing, twice
        x = 1.0 * x * 1  # nothing, twice
        wide = x.to(torch.float64)  # something
        unused = torch.exp(y)
        assert unused is not None
        return (wide + y.to(torch.float64)).to(torch.float32)  # something


def test_only_what_is_superfluous() -> None:
    program = tiny.traced("llava")
    shape: tuple[torch.dtype, tuple[int | str, ...]] = (torch.float32, ("n", 3))
    clutter = trace_function(
        "clutter", _Clutter(), {"x": shape, "y": shape}, ("z",), program.device
    )
    program = Program(
        **{
            **vars(program),
            "components": {**program.components, "clutter": clutter},
        }
    )
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    expected = clutter.clone().module({})(x, y)[0]
    check(program, "canonicalize")
    left = program.component("clutter")
    ops = [str(n.target) for n in left.graph.nodes if n.op == "call_function"]
    assert ops == ["aten.to.dtype", "aten.to.dtype", "aten.add.Tensor", "aten.to.dtype"]
    assert torch.equal(left.module({})(x, y)[0], expected)


def test_dropout_that_drops_stays() -> None:
    program = tiny.traced("llava")
    node = next(
        n for n in program.component("language").graph.nodes if n.target is aten.silu.default
    )
    node.target, node.args = aten.dropout.default, (node.args[0], 0.5, True)
    tiny.step(program, "canonicalize")
    assert count(program, "language", aten.dropout.default) == 1
