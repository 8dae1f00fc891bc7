"""``sparsify_decode_attention``: the graph edit. What it retrieves is checked in e2e."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevila_compile.conversation import Conversation
from sparsevila_compile.engine import Engine
from sparsevila_compile.families import family_of
from sparsevila_compile.ops import (
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    COLUMN_REDUCE,
    RETRIEVAL_ATTENTION,
)
from sparsevila_compile.pass_base import PassError
from sparsevila_compile.program import RetrievalSpec
from sparsevila_compile.prompt import PromptReader
from tests import tiny
from tests.passes.quantizing import prompt
from tests.passes.rules import check, count

PASS = "sparsify_decode_attention"
HALF: dict[str, Any] = {"keep_ratio": 0.5}


@pytest.mark.parametrize("share,groups", [("layer", 1), ("kv_head", 2)])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str, share: str, groups: int) -> None:
    program = tiny.at_stage(name, "canonicalize", "insert_kv_cache")
    language = str(program.component("language").graph)
    weights = dict(program.weights)
    report = check(program, (PASS, {**HALF, "share": share}))
    layers = [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    assert [s.where for s in report.matches] == layers
    assert report.misses == ()
    assert program.retrieval == RetrievalSpec(0.5, share, (0, 1))  # type: ignore[arg-type]
    assert str(program.component("language").graph) == language, "dense prefill stays"
    assert set(program.components) == {"embed", "vision", "language", "turn", "decode", "retrieve"}
    assert count(program, "turn", CACHED_ATTENTION) == 0
    assert count(program, "turn", CACHED_ATTENTION_LSE) == 2
    assert count(program, "turn", COLUMN_REDUCE) == 2
    assert count(program, "decode", RETRIEVAL_ATTENTION) == 2
    assert count(program, "decode", CACHED_ATTENTION) == 0
    assert count(program, "decode", COLUMN_REDUCE) == 0
    assert program.component("turn").outputs == ("logits", "scores_0", "scores_1")
    for node in program.component("turn").results()[1:]:
        assert node.meta["val"].shape[1] == groups
        assert node.meta["val"].dtype == torch.float32
    index = program.component("decode").input("index_0").meta["val"]
    assert index.shape[1] == groups
    assert index.dtype == torch.int32
    assert {k: id(w) for k, w in program.weights.items()} == {k: id(w) for k, w in weights.items()}


def test_scores_are_taken_after_the_keys_are_written() -> None:
    program = tiny.at_stage("llava", "insert_kv_cache", (PASS, HALF))
    order = [n.target for n in program.component("turn").graph.nodes]
    places = [i for i, t in enumerate(order) if t in (CACHED_ATTENTION_LSE, COLUMN_REDUCE)]
    assert [order[i] for i in places] == [CACHED_ATTENTION_LSE, COLUMN_REDUCE] * 2


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_known_log_sum_exp_changes_no_score(name: str) -> None:
    program = tiny.at_stage(name, "insert_kv_cache", (PASS, HALF))
    scores, logits = [], []
    for known in (True, False):
        program = program.snapshot()
        nodes = [n for n in program.component("turn").graph.nodes if n.target is COLUMN_REDUCE]
        assert all(n.args[7] is not None for n in nodes)
        for node in nodes if not known else ():
            node.update_arg(7, None)
        family = family_of(program.config)
        engine, reader = Engine(program, family), PromptReader(program, family)
        inputs = Conversation(engine, reader, 1, program.max_length).first_inputs(prompt(name))
        batch, length = inputs["inputs_embeds"].shape[:2]
        inputs["logit_rows"] = torch.tensor([[length - 1]])
        inputs["score_weights"] = torch.zeros(batch, length)
        inputs["score_weights"][:, -3:] = 1 / 3
        inputs["score_columns"] = torch.arange(1, length - 3, dtype=torch.int32)[None]
        out = engine.run("turn", inputs)
        scores.append(torch.cat([out["scores_0"], out["scores_1"]]))
        logits.append(out["logits"])
    assert scores[0].std() > 1e-3 * scores[0].mean(), "the scores tell tokens apart"
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(logits[0], logits[1])


def test_some_layers() -> None:
    program = tiny.at_stage("qwen_windowed", "insert_kv_cache")
    report = check(program, (PASS, {**HALF, "layers": (2,)}))
    assert [s.where for s in report.matches] == ["model.language_model.layers.2.self_attn"]
    assert {g.reason: len(g.sites) for g in report.misses} == {"not in layers": 2}
    assert program.component("turn").outputs == ("logits", "scores_2")
    assert count(program, "decode", CACHED_ATTENTION) == 2
    assert count(program, "decode", RETRIEVAL_ATTENTION) == 1


def test_windowed_layers_are_left_dense() -> None:
    program = tiny.at_stage("qwen_windowed", "insert_kv_cache")
    report = check(program, (PASS, HALF))
    [group] = report.misses
    assert group.reason == "sliding-window attention: it reads a bounded cache already"
    assert [s.where for s in group.sites] == ["model.language_model.layers.1.self_attn"]
    assert program.retrieval is not None
    assert program.retrieval.layers == (0, 2)


def test_refused() -> None:
    dense = tiny.at_stage("llava", "canonicalize")
    with pytest.raises(PassError, match=r"no KV cache.*list insert_kv_cache before"):
        tiny.step(dense, (PASS, HALF))
    cached = tiny.at_stage("llava", "insert_kv_cache")
    for layers in ((2,), (0, -1)):
        with pytest.raises(PassError, match="outside the language model's 2 layers"):
            tiny.step(cached, (PASS, {**HALF, "layers": layers}))
    with pytest.raises(PassError, match=r"matches nothing.*2 × not in layers"):
        tiny.step(cached, (PASS, {**HALF, "layers": ()}))
    assert set(cached.components) == {"embed", "vision", "language"}


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_ratio": 0}, {"keep_ratio": 1.5}, {**HALF, "share": "head"}, {**HALF, "ratio": 1}],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        tiny.make_passes((PASS, options))
