"""``prune_visual_tokens``: the graph edit. What it keeps is checked in e2e/test_sparsity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevila_compile.ops import ATTENTION, COLUMN_REDUCE, SELECT_TOKENS
from sparsevila_compile.pass_base import PassError
from sparsevila_compile.program import PruneSpec
from tests import tiny
from tests.passes.rules import check, count

PASS = "prune_visual_tokens"
HALF: dict[str, Any] = {"keep_ratio": 0.5}
WINDOWED = "windowed attention: a token competes only within its window"
OTHER = "not the layer that scores"


@pytest.mark.parametrize(
    "name,where,misses,score",
    [
        ("llava", "model.vision_tower.encoder.layers.2.self_attn", {OTHER: [0, 1]}, "cls"),
        (
            "llava_siglip",
            "model.vision_tower.encoder.layers.2.self_attn",
            {OTHER: [0, 1]},
            "column_mean",
        ),
        ("qwen", "model.visual.blocks.3.attn", {WINDOWED: [0, 2], OTHER: [1]}, "column_mean"),
    ],
)
def test_models(name: str, where: str, misses: dict[str, list[int]], score: str) -> None:
    program = tiny.at_stage(name, "canonicalize")
    attentions = [n for n in program.component("vision").graph.nodes if n.target is ATTENTION]
    report = check(program, (PASS, HALF))
    assert [(s.component, s.where) for s in report.matches] == [("vision", where)]
    assert {g.reason: [s.node for s in g.sites] for g in report.misses} == {
        reason: [attentions[i].name for i in layers] for reason, layers in misses.items()
    }
    assert report.notes == {"score": score, "layer": where}
    assert count(program, "vision", COLUMN_REDUCE) == 1
    assert count(program, "vision", SELECT_TOKENS) == 1
    assert count(program, "vision", ATTENTION) == len(attentions), (
        "no layer is lost before lowering"
    )
    assert program.prune == PruneSpec(0.5, "image", "original")
    component = program.component("vision")
    assert component.outputs[0] == "visual_tokens"
    assert component.outputs[-1] == "kept"
    assert component.inputs[-5:] == (
        "segment_starts",
        "segment_lengths",
        "segment_keep",
        "segment_offsets",
        "visual_slots",
    )
    assert component.results()[-1].meta["val"].dtype == torch.int64


def test_taps_and_what_hangs_on_them_go() -> None:
    """LLaVA reads features before the last layer: without the tap, that layer scores and no more."""
    program = tiny.traced("llava")
    tiny.run(program, (PASS, HALF), "insert_kv_cache")
    vision = program.component("vision")
    assert vision.outputs == ("visual_tokens", "kept")
    assert program.taps == ()
    assert count(program, "vision", ATTENTION) == 2, "the last layer's attention is not needed"
    assert count(program, "vision", COLUMN_REDUCE) == 1
    names = {str(n.target) for n in vision.graph.nodes if n.op == "get_attr"}
    assert any("layers.2.self_attn.q_proj" in n for n in names)
    assert not any("layers.2.self_attn.v_proj" in n or "layers.2.mlp" in n for n in names)
    assert not any("layers.2.mlp" in n for n in program.weights)


@pytest.mark.parametrize("layer,index", [(0, 0), (1, 1), (-1, 2), (-3, 0)])
def test_layer(layer: int, index: int) -> None:
    program = tiny.at_stage("llava", "canonicalize")
    report = check(program, (PASS, {**HALF, "layer": layer}))
    assert report.notes["layer"] == f"model.vision_tower.encoder.layers.{index}.self_attn"


def test_a_windowed_layer_may_be_asked_for() -> None:
    program = tiny.at_stage("qwen", "canonicalize")
    report = check(program, (PASS, {**HALF, "layer": 2}))
    assert report.notes["layer"] == "model.visual.blocks.2.attn"
    node = next(n for n in program.component("vision").graph.nodes if n.target is COLUMN_REDUCE)
    assert node.args[3].target == "cu_window_seqlens", "it competes within its windows"
    assert {g.reason for g in report.misses} == {OTHER}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no CLS": ("qwen", {"score": "cls"}, "score: cls needs an encoder with a CLS or summary token"),
    "no summary": ("llava_siglip", {"score": "summary"}, "use column_mean"),
    "layer": ("llava", {"layer": 3}, "layer: 3 is outside the encoder's 3 layers"),
    "negative layer": ("llava", {"layer": -4}, "layer: -4 is outside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, options, message = REFUSED[case]
    program = tiny.at_stage(name, "canonicalize")
    with pytest.raises(PassError, match=message):
        tiny.step(program, (PASS, {**HALF, **options}))
    assert program.prune is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_ratio": 0},
        {"keep_ratio": 1.01},
        {"keep_ratio": -0.5},
        {"keep_ratio": float("nan")},
        {"keep_ratio": 0.5, "score": "best"},
        {"keep_ratio": 0.5, "budget": "video"},
        {"keep_ratio": 0.5, "keep": 1},
        {"keep_ratio": 0.5, "layer": 1.5},
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        tiny.make_passes((PASS, options))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_only_the_vision_component_changes(name: str) -> None:
    program = tiny.at_stage(name, "canonicalize")
    language = str(program.component("language").graph)
    weights = set(program.weights)
    tiny.step(program, (PASS, HALF))
    assert str(program.component("language").graph) == language
    assert set(program.weights) == weights
