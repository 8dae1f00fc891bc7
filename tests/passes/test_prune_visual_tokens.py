"""``prune_visual_tokens``: the graph edit. What it keeps is checked in e2e/test_sparsity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevila_compile.engine import Engine
from sparsevila_compile.families import family_of
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.ops import ATTENTION, ATTENTION_LSE, COLUMN_REDUCE, SELECT_TOKENS
from sparsevila_compile.pass_base import PassError
from sparsevila_compile.passes.scale_folding import find_fold
from sparsevila_compile.program import PruneSpec
from sparsevila_compile.prompt import PromptReader
from tests import tiny
from tests.passes.quantizing import prompt
from tests.passes.rules import check, count

PASS = "prune_visual_tokens"
HALF: dict[str, Any] = {"keep_ratio": 0.5}
WINDOWED = "windowed attention: a token competes only within its window"
OTHER = "not the layer that scores"
GIVEN = "from the layer's attention"
FEW = "computed for it: few rows are scored"
UNNEEDED = "computed for it: the layer's attention is not needed for the visual tokens"


@pytest.mark.parametrize(
    "name,where,misses,score,lse",
    [
        ("llava", "model.vision_tower.encoder.layers.2.self_attn", {OTHER: [0, 1]}, "cls", FEW),
        (
            "llava_siglip",
            "model.vision_tower.encoder.layers.2.self_attn",
            {OTHER: [0, 1]},
            "column_mean",
            UNNEEDED,
        ),
        (
            "qwen",
            "model.visual.blocks.3.attn",
            {WINDOWED: [0, 2], OTHER: [1]},
            "column_mean",
            GIVEN,
        ),
    ],
)
def test_models(name: str, where: str, misses: dict[str, list[int]], score: str, lse: str) -> None:
    program = tiny.at_stage(name, "canonicalize")
    attentions = [n for n in program.component("vision").graph.nodes if n.target is ATTENTION]
    report = check(program, (PASS, HALF))
    assert [(s.component, s.where) for s in report.matches] == [("vision", where)]
    assert {g.reason: [s.node for s in g.sites] for g in report.misses} == {
        reason: [attentions[i].name for i in layers] for reason, layers in misses.items()
    }
    assert report.notes == {"score": score, "layer": where, "row_lse": lse}
    assert count(program, "vision", COLUMN_REDUCE) == 1
    assert count(program, "vision", SELECT_TOKENS) == 1
    given = count(program, "vision", ATTENTION_LSE)
    assert given == (lse == GIVEN)
    [reduce] = [n for n in program.component("vision").graph.nodes if n.target is COLUMN_REDUCE]
    assert (reduce.args[7] is not None) == (lse == GIVEN)
    assert count(program, "vision", ATTENTION) + given == len(attentions), (
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


@pytest.mark.parametrize(
    "name,options",
    [("qwen", {}), ("qwen", {"layer": 2}), ("llava", {"layer": 0, "score": "column_mean"})],
    ids=str,
)
def test_known_log_sum_exp_changes_no_score(name: str, options: dict[str, Any]) -> None:
    program = tiny.at_stage(name, (PASS, {**HALF, **options}))
    scores = []
    for known in (True, False):
        program = program.snapshot()
        vision = program.component("vision")
        [reduce] = [n for n in vision.graph.nodes if n.target is COLUMN_REDUCE]
        assert reduce.args[7] is not None
        if not known:
            reduce.update_arg(7, None)
        if "salience" not in vision.outputs:
            Editor(vision).output("salience", reduce)
        family = family_of(program.config)
        engine, reader = Engine(program, family), PromptReader(program, family)
        inputs = engine.vision_inputs([r.pictures for r in reader.read(prompt(name))])
        scores.append(engine.run("vision", inputs)["salience"])
    assert scores[0].std() > 1e-4 * scores[0].mean(), "the scores tell tokens apart"
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-8)


def test_scales_still_fold_through_the_attention() -> None:
    program = tiny.at_stage("llava", "canonicalize")
    [name] = [
        n for n in program.weights if n.endswith("encoder.layers.0.self_attn.out_proj.weight")
    ]
    before = find_fold([program.component("vision")], {name})
    assert before is not None
    assert before.kind == "value"
    tiny.step(program, (PASS, {**HALF, "layer": 0, "score": "column_mean"}))
    assert count(program, "vision", ATTENTION_LSE) == 1
    assert find_fold([program.component("vision")], {name}) == before


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
