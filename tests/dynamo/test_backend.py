"""Stock ``generate`` of stock models behind the backend: tokens, turns, caches, recompilations."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from sparsevila_compile import dynamo
from sparsevila_compile.errors import UserError
from tests import tiny
from tests.dynamo import models
from tests.dynamo.models import Dialogue, ask, shared
from tests.tiny import Image, Video, words

PROMPTS: dict[str, list[tiny.Row]] = {
    "one picture": [[*words(3), Image(1), *words(8, 1)]],
    "no picture": [words(9)],
    "batch, padded": [
        [*words(4), Image(1), *words(3)],
        words(7, 5),
        [Image(2, (6, 6)), Image(3), *words(2)],
    ],
}
VIDEO: list[tiny.Row] = [[Image(1), *words(2), Video(2, (2, 6, 4), 0.5), Image(3, (2, 4)), 60]]


def test_prompts_of_twenty_lengths_recompile_at_most_three_times() -> None:
    torch._dynamo.reset()
    model = models.compiled("llava", models.SPARSE)
    artifact = tiny.compiled("llava", *models.SPARSE)
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    for extra in range(20):
        prompt = tiny.inputs("llava", [[*words(2 + extra), Image(extra), *words(4 + extra, 1)]])
        expected = artifact.generate(**prompt, **tiny.greedy(4))
        assert ask(model, prompt, 4) == tiny.answers_of(prompt, expected)
    graphs = dynamo.report(model).graphs
    assert graphs == compiled["unique_graphs"] - before, "graphs that the backend did not see"
    assert 2 <= graphs <= 1 + 3


def test_models_of_one_shape_are_told_apart() -> None:
    """Dynamo runs one compiled graph for all of them: weights are its inputs."""
    prompt = tiny.inputs("llava", [[*words(3), Image(1), *words(8, 1)]])
    first, second = (models.compiled("llava", tiny.DENSE) for _ in range(2))
    second.lm_head.weight.neg_()
    expected = tiny.build("llava")
    expected.lm_head.weight.neg_()
    theirs = ask(expected, prompt)
    assert theirs != tiny.dense_rows("llava", [[*words(3), Image(1), *words(8, 1)]], models.NEW)
    for _ in range(2):
        assert ask(second, prompt) == theirs
        assert ask(first, prompt) == ask(tiny.model("llava"), prompt)
    with pytest.raises(UserError, match="copied"):
        copy.deepcopy(first)


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_sparse_tokens_are_the_artifacts(name: str) -> None:
    model, artifact = shared(name, "sparse"), tiny.compiled(name, *models.SPARSE)
    differs = 0
    prompts = {k: v for k, v in PROMPTS.items() if name == "llava" or "batch" in k}
    prompts |= {"video": VIDEO} if name == "qwen" else {}
    for kind, rows in prompts.items():
        prompt = tiny.inputs(name, rows)
        expected = tiny.answers_of(prompt, artifact.generate(**prompt, **tiny.greedy(models.NEW)))
        assert ask(model, prompt) == expected, kind
        differs += expected != tiny.dense_rows(name, rows, models.NEW)
    assert differs >= 2, "nothing was sparse"
    done = [p.name for p in dynamo.report(model).passes if p.matches]
    assert {"prune_visual_tokens", "insert_kv_cache", "sparsify_decode_attention"} <= set(done)


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_with_nothing_sparse_tokens_are_the_stock_models(name: str) -> None:
    kinds = ["batch, padded"] if name == "llava" else ["video"]
    for kind in kinds:
        rows = VIDEO if kind == "video" else PROMPTS[kind]
        answers = ask(shared(name, "full"), tiny.inputs(name, rows))
        assert answers == tiny.dense_rows(name, rows, models.NEW), kind


def test_sliding_windows() -> None:
    """Layers with a window show the cache only in part."""
    model = models.compiled("qwen_windowed", tiny.FULL)
    rows = PROMPTS["one picture"]
    expected = tiny.dense_rows("qwen_windowed", rows, models.NEW)
    assert ask(model, tiny.inputs("qwen_windowed", rows)) == expected


def test_usage_counts_what_a_turn_cost() -> None:
    model = shared("llava", "sparse")
    ask(model, tiny.inputs("llava", PROMPTS["one picture"]))
    usage = dynamo.report(model).usage
    assert (usage.visual_tokens, usage.kept_tokens, usage.attended_visual) == (16, 8, 2)
    assert (usage.fed_tokens, usage.new_tokens) == (1 + 3 + 8 + 8, models.NEW)


# ---------------------------------------------------------------------- turns

A: tiny.Row = [*words(3), Image(1), *words(8, 1)]
B: tiny.Row = [*words(5, 4), Image(2, (6, 4)), *words(4, 2)]


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_interleaved_dialogues(name: str) -> None:
    """Two dialogues take turns over caches of their own; each is the artifact's, turn by turn."""
    first, second = Dialogue(name, "sparse"), Dialogue(name, "sparse")
    a = first.turn([A], [Image(1)])[0]
    b = second.turn([B], [Image(2, (6, 4))])[0]
    a2 = tiny.continued(A, a, 41, 42, 43)
    b2 = tiny.continued(B, b, 51, 52)
    b = second.turn([b2])[0]
    a = first.turn([a2])[0]
    # A new picture in a later turn, with another dialogue's turn between.
    if name == "llava":
        first.turn([tiny.continued(a2, a, Image(7), 61, 62)], [Image(7)])
    second.turn([tiny.continued(b2, b, 55, 56, 57)])


def test_a_batch_of_dialogues() -> None:
    dialogue = Dialogue("llava", "sparse", batch=2)
    rows: list[list[tiny.Item]] = [[Image(1), *words(6)], [*words(2), Image(2), *words(4, 3)]]
    answers = dialogue.turn(rows, [Image(1), Image(2)])
    dialogue.turn([tiny.continued(r, a, 71, 72) for r, a in zip(rows, answers, strict=True)])


def test_whole_prompts_again_and_again() -> None:
    """Without a cache of the caller's, each prompt stands alone, whatever was asked before."""
    model, artifact = shared("llava", "sparse"), tiny.compiled("llava", *models.SPARSE)
    row = list(A)
    for turn in range(3):
        prompt = tiny.inputs("llava", [row])
        answer = ask(model, prompt)
        expected = artifact.generate(**prompt, **tiny.greedy(models.NEW))
        assert answer == tiny.answers_of(prompt, expected)
        row = tiny.continued(row, answer[0], *words(3, turn))


def test_a_cut_cache_rolls_back() -> None:
    dialogue = Dialogue("llava", "full")
    answer = dialogue.turn([A], [Image(1)])[0]
    dialogue.cache.crop(-4)
    dialogue.turn([tiny.continued(A, answer[:5], 80, 81)])


def _turn(row: tiny.Row) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tiny.inputs("llava", [row]).items() if "pixel" not in k}


def test_caches_that_are_no_longer_true_are_refused() -> None:
    dialogue = Dialogue("llava", "sparse")
    answer = dialogue.turn([A], [Image(1)])[0]
    model, second = dialogue.model, _turn(tiny.continued(A, answer, 80, 81))
    with pytest.raises(UserError, match="copied"):
        ask(model, second, past_key_values=copy.deepcopy(dialogue.cache))
    fork = copy.copy(dialogue.cache)
    fork.layers = [copy.copy(layer) for layer in dialogue.cache.layers]
    fork.crop(-3)
    ask(model, _turn(tiny.continued(A, answer[:6], 82, 83)), past_key_values=fork)
    with pytest.raises(UserError, match="out of date"):
        ask(model, second, past_key_values=dialogue.cache)
    other = Dialogue("llava", "full")
    other.turn([A], [Image(1)])
    with pytest.raises(UserError, match="another"):
        ask(model, second, past_key_values=other.cache)


def test_caches_go_with_the_callers_cache() -> None:
    dialogue = Dialogue("llava", "sparse")
    dialogue.turn([A], [Image(1)])
    from sparsevila_compile.dynamo.standins import record_of

    held = weakref.ref(record_of(dialogue.cache.layers[0].keys).conversation)
    assert dialogue.cache.layers[1].values.isnan().all(), "a stand-in looks like numbers"
    assert dialogue.cache.layers[1].values.untyped_storage().nbytes() <= 8
    gc.collect()
    assert held() is not None
    del dialogue
    gc.collect()
    assert held() is None, "the KV cache outlives the caller's"


# ---------------------------------------------------------------------- generate's ways


class _Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streamer_and_several_sequences() -> None:
    model, prompt = shared("llava", "sparse"), tiny.inputs("llava", [A])
    streamer = _Tokens()
    answer = ask(model, prompt, streamer=streamer)[0]
    assert streamer.seen[-models.NEW :] == answer
    cold = {"do_sample": True, "temperature": 1e-4, "max_new_tokens": models.NEW}
    several = model.generate(**prompt, num_return_sequences=3, **cold)
    assert tiny.answers_of(prompt, several) == [answer] * 3


REFUSED = {
    "num_beams": (2, "beam search"),
    "prefill_chunk_size": (8, "prefill_chunk_size"),
    "cache_implementation": ("static", "cache_implementation"),
    "use_cache": (False, "use_cache"),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_cannot_be_done_is_refused(argument: str) -> None:
    value, said = REFUSED[argument]
    model, prompt = shared("llava", "sparse"), tiny.inputs("llava", [A])
    with pytest.raises(UserError, match=said) as error:
        ask(model, prompt, **{argument: value})
    assert "\n" not in str(error.value)


def test_other_ways_into_the_model_are_refused() -> None:
    model, prompt = shared("llava", "sparse"), tiny.inputs("llava", [A])
    ask(model, prompt)
    with pytest.raises(UserError, match="logits_to_keep=1"):
        model(**prompt)
    with pytest.raises(UserError, match="outside of backend"):
        model.model(**prompt)
    with pytest.raises(UserError, match="number"):
        ask(model, {**prompt, "position_ids": torch.arange(28)[None] + 3})
    with pytest.raises(UserError, match="more placeholders than images"):
        ask(model, {k: v for k, v in prompt.items() if k != "pixel_values"})
    assert model(**prompt, logits_to_keep=1).logits.argmax() == ask(model, prompt)[0][0]
