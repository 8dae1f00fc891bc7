"""All fusions together: what a decode step launches, and that answers stay token for token."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from sparsevila_compile.graph_edit import module_path
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.program import Program
from tests import tiny
from tests.passes.fusing import FUSED, Launches
from tests.passes.quantizing import rtn
from tests.tiny import Image, words

SPARSE: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.6}),
    *tiny.retrieving(0.3),
)
LAYER = re.compile(r"language_model\.layers\.(\d+)")

# Norm, q/k/v, rotary, attention, o_proj; norm, gate/up, silu_mul, down_proj.
A_LAYER = 9


class _Count(fx.Interpreter):
    """Runs a component and counts, by layer, the calls that are no views ('' outside of layers)."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, list[str]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with Launches() as launches:
            out = super().run_node(n)
        if n.op == "call_function":
            layer = LAYER.search(module_path(n))
            self.found.setdefault(layer[1] if layer else "", []).extend(launches.names)
        return out


def _launches(program: Program, component: str, prompt: dict[str, torch.Tensor]) -> _Count:
    """What one decode step runs, counted while the engine takes it."""
    model = CompiledModel(program, tiny.processor(), tiny.model("llava").generation_config)
    engine = model.engine
    real, counted = engine.run, []

    def run(name: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        if name == component and inputs["inputs_embeds"].shape[1] == 1:
            part = program.component(name)
            count = _Count(part.module(program.weights))
            count.run(*(inputs[i].clone() for i in part.inputs))
            counted.append(count)
        return real(name, inputs)

    engine.run = run  # type: ignore[method-assign]
    model.generate(**prompt, **tiny.greedy(3))
    return counted[0]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_launches_a_layer(name: str, quantized: bool) -> None:
    program = tiny.at_stage(name, "canonicalize", *SPARSE)
    if quantized:
        rtn(program)
    prompt = tiny.inputs(name, [[*words(3), Image(1, (8, 8)), *words(6)]])
    unfused = _launches(_lowered(program.snapshot()), "decode", prompt).found
    fused = _launches(_lowered(program, *FUSED), "decode", prompt).found
    for layer in ("0", "1"):
        assert len(fused[layer]) == A_LAYER, Counter(fused[layer])
        assert len(unfused[layer]) > 3 * A_LAYER
    assert len(fused[""]) < len(unfused[""])


def _lowered(program: Program, *specs: tiny.Spec) -> Program:
    tiny.step(program, *specs, "lower_ops")
    return program


@pytest.mark.parametrize("recipe", [tiny.DENSE, tiny.FULL], ids=["cache", "full"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_same_as_transformers(name: str, recipe: tuple[tiny.Spec, ...]) -> None:
    """Every token kept: a batch of prompts with and without pictures."""
    rows: list[tiny.Row] = [[Image(1), *words(3)], words(7, 5), [Image(2, (6, 6)), *words(2)]]
    prompt = tiny.inputs(name, rows)
    out = tiny.compiled(name, *recipe, *FUSED).generate(**prompt, **tiny.greedy())
    assert torch.equal(out, tiny.dense(name, prompt))


@pytest.mark.parametrize("name", ["llava_tied", "llava_windowed", "llava_yarn", "qwen_windowed"])
def test_other_configurations(name: str) -> None:
    prompt = tiny.inputs(name, [[*words(2), Image(3), *words(5)]])
    out = tiny.compiled(name, *tiny.DENSE, *FUSED).generate(**prompt, **tiny.greedy())
    assert torch.equal(out, tiny.dense(name, prompt))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_sparse_dialogue(name: str) -> None:
    """Four turns, pruned and retrieving: what the unfused model answers."""
    turns: list[tiny.Row] = [
        [*words(2), Image(1, (8, 8)), *words(6, 1)],
        words(5, 2),
        [*words(2, 3), Image(2, (6, 8)), *words(7, 4)],
        words(4, 5),
    ]
    models = [tiny.compiled(name, *SPARSE), tiny.compiled(name, *SPARSE, *FUSED)]
    talks = [m.conversation() for m in models]
    row: list[tiny.Item] = []
    for new in turns:
        row = [*row, *new]
        prompt = tiny.inputs(name, [row])
        outs = [
            m.generate(conversation=c, **prompt, **tiny.greedy(24))
            for m, c in zip(models, talks, strict=True)
        ]
        assert torch.equal(*outs)
        [answer] = tiny.answers_of(prompt, outs[0])
        assert len(set(answer)) >= 6, f"this answer proves little: {answer}"
        row = tiny.continued(row, answer)
