"""With every token kept, a compiled model answers token for token as transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from sparsevila_compile.errors import UserError
from tests import tiny
from tests.tiny import Image, Video, words

RECIPES: dict[str, tuple[tiny.Spec, ...]] = {
    "cache": tiny.DENSE,
    "full": tiny.FULL,
    "full, compact, kv_head": (
        ("prune_visual_tokens", {"keep_ratio": 1.0, "positions": "compact", "budget": "prompt"}),
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 1.0, "share": "kv_head"}),
    ),
}

PROMPTS: dict[str, list[tiny.Row]] = {
    "one picture": [[Image(1), *words(6)]],
    "picture in the middle": [[*words(9), Image(2, (6, 4)), *words(1, 1)]],
    "prompt ends with a picture": [[*words(3), Image(3)]],
    "three pictures": [[Image(1), *words(2), Image(2, (8, 6)), *words(4), Image(3, (4, 4)), 50]],
    "pictures side by side": [[40, Image(1), Image(2, (2, 10)), Image(1), *words(5)]],
    "no picture": [words(12)],
    "one token": [[33]],
    "batch": [
        [Image(1), *words(3)],
        [*words(20), Image(2, (6, 4)), *words(2), Image(3, (4, 10)), 44],
        [Image(4, (2, 4)), *words(9, 3)],
    ],
    "batch, one row without a picture": [
        [*words(4), Image(1), *words(3)],
        words(7, 5),
        [Image(2, (6, 6)), Image(3), *words(2)],
    ],
    "batch without pictures": [words(3), words(11, 1), words(6, 2)],
}
VIDEOS: dict[str, list[tiny.Row]] = {
    "video": [[Video(1, (3, 4, 6)), *words(5)]],
    "long slow video": [[*words(2), Video(2, (6, 4, 4), 2.5), *words(5)]],
    "image and video": [[Image(1), *words(2), Video(2, (2, 6, 4), 0.5), Image(3, (2, 4)), 60]],
    "two videos": [[Video(1, (2, 4, 4), 1.5), *words(2), Video(2, (4, 2, 6), 0.5), *words(3)]],
    "batch": [
        [Video(1, (2, 4, 4), 2.0), *words(3)],
        [*words(6), Image(2, (6, 4)), Video(3, (3, 2, 4), 1.0), *words(2)],
        [Image(4, (8, 8)), *words(5)],
    ],
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy(name: str, recipe: str, kind: str) -> None:
    _same_as_transformers(name, RECIPES[recipe], PROMPTS[kind])


@pytest.mark.parametrize("recipe", ["cache", "full"])
@pytest.mark.parametrize("kind", VIDEOS)
def test_greedy_video(recipe: str, kind: str) -> None:
    _same_as_transformers("qwen", RECIPES[recipe], VIDEOS[kind])


@pytest.mark.parametrize(
    "name", ["llava_tied", "llava_two_layers", "llava_windowed", "llava_yarn", "qwen_windowed"]
)
@pytest.mark.parametrize("kind", ["one picture", "three pictures", "batch"])
def test_greedy_other_configurations(name: str, kind: str) -> None:
    """Tied embeddings; two feature layers; sliding windows in every layer and in one; scaled RoPE."""
    recipe = tiny.DENSE if name == "llava_windowed" else tiny.FULL
    _same_as_transformers(name, recipe, PROMPTS[kind])


def _same_as_transformers(name: str, recipe: tuple[tiny.Spec, ...], rows: list[tiny.Row]) -> None:
    prompt = tiny.inputs(name, rows)
    expected = tiny.dense(name, prompt)
    _varied(expected[:, -tiny.NEW :])
    found = tiny.compiled(name, *recipe).generate(**prompt, **tiny.greedy())
    if not torch.equal(found, expected):
        _differ_by_ties_only(name, prompt, found, expected)


def _differ_by_ties_only(
    name: str, prompt: dict[str, torch.Tensor], found: torch.Tensor, expected: torch.Tensor
) -> None:
    """Where a row leaves transformers' answer, transformers' two best logits are equal to rounding.

    Which of the two wins then differs between processors; one such step was met. What follows it
    cannot be compared.
    """
    more = {"return_dict_in_generate": True, "output_logits": True}
    steps = tiny.model(name).generate(**prompt, **tiny.greedy(), **more).logits
    start = prompt["input_ids"].shape[1]
    assert torch.equal(found[:, :start], expected[:, :start])
    for row in range(len(expected)):
        differs = (found[row] != expected[row]).nonzero()
        if len(differs) == 0:
            continue
        at = int(differs[0]) - start
        assert at >= 12, f"row {row} differs after {at} tokens"
        logits = steps[at][row]
        best = logits.topk(2)
        both = {int(found[row, start + at]), int(expected[row, start + at])}
        assert both == set(best.indices.tolist()), f"row {row} differs after {at} tokens"
        gap, scale = float(best.values[0] - best.values[1]), float(logits.abs().max())
        assert gap <= 1e-6 * scale, f"row {row} differs after {at} tokens, by {gap} of {scale}"


def _varied(answers: torch.Tensor) -> None:
    """A model in a loop would forgive a broken cache."""
    for answer in answers.tolist():
        assert len(set(answer)) >= 12, f"this answer proves little: {answer}"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_right_padding(name: str) -> None:
    """transformers wants padding on the left; here rows are as if they were asked alone."""
    rows = PROMPTS["batch, one row without a picture"]
    prompt = tiny.inputs(name, rows, side="right")
    out = tiny.compiled(name, *tiny.FULL).generate(**prompt, **tiny.greedy())
    assert torch.equal(out[:, : -tiny.NEW], prompt["input_ids"])
    assert tiny.answers_of(prompt, out) == tiny.dense_rows(name, rows)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_scores(name: str) -> None:
    """Not only the best token: all logits of all steps, to float32's accuracy."""
    prompt = tiny.inputs(name, PROMPTS["three pictures"])
    seen = _Recorder()
    tiny.compiled(name, *tiny.FULL).generate(
        **prompt, **tiny.greedy(), logits_processor=LogitsProcessorList([seen])
    )
    expected = tiny.model(name).generate(
        **prompt, **tiny.greedy(), return_dict_in_generate=True, output_logits=True
    )
    ours, theirs = torch.stack(seen.scores), torch.stack(expected.logits)
    assert ours.shape == theirs.shape == (tiny.NEW, 1, tiny.WORDS)
    assert theirs.std() > 0.5
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert errors.max() < 1e-4


class _Recorder(LogitsProcessor):
    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores.append(scores.clone())
        return scores


def test_the_picture_and_its_place_matter() -> None:
    """What the equalities above rest on: these models do look at the picture."""
    for name in tiny.FAMILIES:
        rows: list[tiny.Row] = [
            [Image(1), *words(6)],
            [Image(2), *words(6)],
            [words(1)[0], Image(1), *words(6)[1:]],
            [Image(1), *words(6, 1)],
        ]
        answers = tiny.dense_rows(name, rows, 16)
        assert len({tuple(a) for a in answers}) == len(rows)


# ---------------------------------------------------------------------- generation settings

SETTINGS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "suppressed tokens": {"suppress_tokens": list(range(20, 90))},
    "max_length": {"max_length": 90, "max_new_tokens": None},
    "encoder repetition": {"encoder_repetition_penalty": 1.5},
    "forced end": {"forced_eos_token_id": 77},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["one picture", "batch"])
def test_settings(setting: str, kind: str) -> None:
    arguments = tiny.greedy(32) | SETTINGS[setting]
    prompt = tiny.inputs("qwen", PROMPTS[kind])
    expected = tiny.dense("qwen", prompt, **arguments)
    assert torch.equal(tiny.compiled("qwen", *tiny.FULL).generate(**prompt, **arguments), expected)
    if setting != "max_length" and kind == "batch":
        plain = tiny.dense("qwen", prompt, **tiny.greedy(32))
        assert not torch.equal(plain, expected), "the setting changes nothing here"


def _ends(name: str, prompt: dict[str, torch.Tensor], *steps: int) -> list[int]:
    """Tokens that each end one row of the batch, at these steps of its plain greedy answer."""
    new = tiny.dense(name, prompt)[:, prompt["input_ids"].shape[1] :]
    return [int(row[step]) for row, step in zip(new, steps, strict=True)]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_rows_end_at_different_times(name: str) -> None:
    prompt = tiny.inputs(name, PROMPTS["batch"])
    arguments = tiny.greedy(eos_token_id=_ends(name, prompt, 40, 3, 22), pad_token_id=tiny.PAD)
    expected = tiny.dense(name, prompt, **arguments)
    lengths = (expected != tiny.PAD)[:, prompt["input_ids"].shape[1] :].sum(1)
    assert len(set(lengths.tolist())) > 1, "rows end at different times"
    assert torch.equal(tiny.compiled(name, *tiny.FULL).generate(**prompt, **arguments), expected)


@pytest.mark.parametrize(
    "extra", [{"min_new_tokens": 30}, {"exponential_decay_length_penalty": (4, 1.3)}]
)
def test_ends_with_processors(extra: dict[str, Any]) -> None:
    prompt = tiny.inputs("llava", PROMPTS["batch"])
    arguments = tiny.greedy(eos_token_id=_ends("llava", prompt, 9, 3, 12), **extra)
    expected = tiny.dense("llava", prompt, **arguments)
    assert torch.equal(tiny.compiled("llava", *tiny.FULL).generate(**prompt, **arguments), expected)


def test_bad_words() -> None:
    prompt = tiny.inputs("llava", PROMPTS["one picture"])
    new = tiny.dense("llava", prompt)[0, prompt["input_ids"].shape[1] :].tolist()
    arguments = tiny.greedy(bad_words_ids=[[new[0]], new[4:6]])
    expected = tiny.dense("llava", prompt, **arguments)
    assert expected[0, prompt["input_ids"].shape[1]] != new[0]
    assert torch.equal(tiny.compiled("llava", *tiny.FULL).generate(**prompt, **arguments), expected)


def test_stop_strings() -> None:
    prompt = tiny.inputs("llava", PROMPTS["one picture"])
    new = tiny.dense("llava", prompt)[0, prompt["input_ids"].shape[1] :].tolist()
    step = next(i for i in range(10, len(new)) if new[i] not in new[:i])
    arguments = tiny.greedy(stop_strings=[f"w{new[step]}"])
    expected = tiny.dense("llava", prompt, **arguments, tokenizer=tiny.tokenizer())
    assert expected.shape[1] <= prompt["input_ids"].shape[1] + step + 1
    assert torch.equal(tiny.compiled("llava", *tiny.FULL).generate(**prompt, **arguments), expected)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["one picture", "batch"])
def test_sampling(name: str, kind: str) -> None:
    prompt = tiny.inputs(name, PROMPTS[kind])
    arguments = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.8, "top_k": 30}
    arguments |= {"top_p": 0.9, "suppress_tokens": list(range(tiny.FIRST_WORD))}
    answers = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        answers.append(tiny.dense(name, prompt, **arguments))
        torch.manual_seed(seed)
        assert torch.equal(
            tiny.compiled(name, *tiny.FULL).generate(**prompt, **arguments), answers[-1]
        )
    assert not torch.equal(*answers)


def test_generation_config_object() -> None:
    prompt = tiny.inputs("llava", PROMPTS["one picture"])
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=1.4)
    expected = tiny.dense("llava", prompt, generation_config=settings)
    model = tiny.compiled("llava", *tiny.FULL)
    assert torch.equal(model.generate(**prompt, generation_config=settings), expected)


class _Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_streamer() -> None:
    prompt = tiny.inputs("qwen", PROMPTS["one picture"])
    ours, theirs = _Tokens(), _Tokens()
    tiny.compiled("qwen", *tiny.FULL).generate(**prompt, **tiny.greedy(9), streamer=ours)
    tiny.model("qwen").generate(**prompt, **tiny.greedy(9), streamer=theirs)
    assert ours.seen == theirs.seen
    assert len(ours.seen) == 1 + 9 + 1


def test_streamer_takes_one_prompt() -> None:
    prompt = tiny.inputs("llava", PROMPTS["batch"])
    with pytest.raises(UserError, match="streamer"):
        tiny.compiled("llava", *tiny.FULL).generate(**prompt, **tiny.greedy(3), streamer=_Tokens())


# ---------------------------------------------------------------------- several turns


def _turns(name: str, dialogues: Sequence[Sequence[tiny.Row]], recipe: str) -> None:
    """Ask dialogues side by side, turn by turn, over one cache; each turn as transformers would."""
    model = tiny.compiled(name, *RECIPES[recipe])
    conversation = model.conversation(len(dialogues))
    prompts: list[list[tiny.Item]] = [[] for _ in dialogues]
    held = 0
    for turn in range(len(dialogues[0])):
        prompts = [[*p, *d[turn]] for p, d in zip(prompts, dialogues, strict=True)]
        answers = tiny.dense_rows(name, prompts)
        prompt = tiny.inputs(name, prompts)
        out = model.generate(conversation=conversation, **prompt, **tiny.greedy())
        assert tiny.answers_of(prompt, out) == answers, f"turn {turn + 1}"
        tokens = int(prompt["attention_mask"].sum())
        assert model.usage.cached_tokens == held, f"turn {turn + 1} reuses the last"
        assert model.usage.fed_tokens == tokens - held
        # The last token of an answer was never fed.
        held = tokens + len(dialogues) * (tiny.NEW - 1)
        prompts = [tiny.continued(p, a) for p, a in zip(prompts, answers, strict=True)]


DIALOGUE: list[tiny.Row] = [
    [*words(3), Image(1, (4, 8)), *words(6)],
    [*words(2, 1), Image(2, (6, 6)), *words(4, 2)],
    words(7, 3),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_three_turns(name: str, recipe: str) -> None:
    _turns(name, [DIALOGUE], recipe)


def test_three_turns_about_a_long_video() -> None:
    """The text behind it takes positions that the video's last frames have passed."""
    video = [*words(2), Video(2, (7, 2, 4), 3.0), *words(5)]
    _turns("qwen", [[video, [Image(2), *words(4, 2)], words(7, 3)]], "full")


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_three_turns_batch(name: str) -> None:
    text_only = [words(9, 7), words(2, 8), [Image(5), *words(3, 9)]]
    early = [[Image(6), Image(7, (2, 4)), 99], [31], words(20, 11)]
    _turns(name, [DIALOGUE, text_only, early], "full")
