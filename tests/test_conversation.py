"""Conversations: whatever happened to the cache before, the next prompt is answered rightly."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image as Pictures
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from sparsevila_compile.conversation import Conversation
from sparsevila_compile.errors import UserError
from sparsevila_compile.model import CompiledModel
from tests import tiny
from tests.tiny import Image, Row, Video, words

NEW = 12
SPARSE: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.75}),
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.2}),
)


def ask(
    model: CompiledModel, name: str, conversation: Conversation, *rows: Row, **more: Any
) -> list[list[int]]:
    prompt = tiny.inputs(name, rows)
    out = model.generate(conversation=conversation, **prompt, **tiny.greedy(NEW, **more))
    return tiny.answers_of(prompt, out)


def fresh(model: CompiledModel, name: str, *rows: Row, **more: Any) -> list[list[int]]:
    return ask(model, name, model.conversation(len(rows)), *rows, **more)


FIRST: Row = [*words(3), Image(1), *words(8, 1)]


# ---------------------------------------------------------------------- roll-back

EDITS: dict[str, tuple[Row, int]] = {
    # the prompt that follows FIRST and its answer, and how many tokens of it the cache may serve
    "another picture": ([*words(3), Image(2), *words(8, 1), 70], 4),
    "an edited question": ([*words(3), Image(1), *words(5, 1), 71, 72], 25),
    "an edited beginning": ([71, *words(2), Image(1), *words(8, 1)], 1),
    "a shorter prompt": ([*words(3), Image(1), *words(2, 1)], 21),
    "no picture any more": ([*words(3), *words(8, 1)], 4),
    "a picture before it": ([Image(3), *words(3), Image(1), *words(8, 1)], 1),
    "the same prompt": (FIRST, 27),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_history_rolls_back(edit: str) -> None:
    row, reused = EDITS[edit]
    model = tiny.compiled("llava", *tiny.DENSE)
    conversation = model.conversation()
    ask(model, "llava", conversation, FIRST)
    assert ask(model, "llava", conversation, row) == tiny.dense_rows("llava", [row], NEW)
    assert model.usage.cached_tokens == reused


def test_a_video_at_another_speed_is_another_video() -> None:
    model = tiny.compiled("qwen", *tiny.DENSE)
    conversation = model.conversation()
    slow, fast = ([*words(2), Video(1, (2, 4, 4), s), *words(4, 1)] for s in (3.0, 1.0))
    expected = tiny.dense_rows("qwen", [slow, fast], NEW)
    assert expected[0] != expected[1]
    assert ask(model, "qwen", conversation, slow) == expected[:1]
    assert ask(model, "qwen", conversation, fast) == expected[1:]
    assert model.usage.cached_tokens == 4, "up to the video"


def _mutated(row: list[tiny.Item], answer: list[int], rng: random.Random) -> list[tiny.Item]:
    """A prompt that has something to do with the last one."""
    kind = rng.choice(["extend", "extend", "picture", "edit", "cut", "same", "mid-answer"])
    if kind == "extend" or len(row) < 3:
        new: list[tiny.Item] = [Image(rng.randrange(9), rng.choice([(4, 4), (2, 6), (8, 6)]))]
        new = new if rng.random() < 0.5 else []
        return tiny.continued(row, answer, *new, *words(rng.randrange(1, 6), rng.randrange(99)))
    at = rng.randrange(len(row))
    if kind == "picture":
        return [*row[:at], Image(rng.randrange(9)), *row[at + 1 :], 44]
    if kind == "edit":
        return [*row[:at], rng.randrange(tiny.FIRST_WORD, tiny.WORDS), *row[at + 1 :]]
    if kind == "cut":
        return [*row[: max(1, at)], 55]
    if kind == "mid-answer":
        return tiny.continued(row, answer[: rng.randrange(len(answer))], 66, 67)
    return row


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("recipe", [tiny.DENSE, tiny.FULL])
def test_any_sequence_of_prompts(name: str, recipe: tuple[tiny.Spec, ...]) -> None:
    """Many prompts of every kind through one cache, two dialogues side by side."""
    rng = random.Random(name)
    model = tiny.compiled(name, *recipe)
    conversation = model.conversation(2)
    rows: list[list[tiny.Item]] = [[*words(2), Image(1), *words(3)], words(4, 9)]
    reused = 0
    for step in range(25):
        answers = ask(model, name, conversation, *rows)
        assert answers == tiny.dense_rows(name, rows, NEW), f"step {step}: {rows}"
        reused += model.usage.cached_tokens
        rows = [_mutated(row, answer, rng) for row, answer in zip(rows, answers, strict=True)]
        rows = [row if len(row) < 60 else row[:4] for row in rows]
    assert reused > 200


# ---------------------------------------------------------------------- what asks, when it is sparse


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_sparse_answers_do_not_depend_on_what_is_cached(name: str) -> None:
    """A question asked again, or in place of another, retrieves as if it were asked first."""
    model = tiny.compiled(name, *SPARSE)
    first: Row = [Image(1, (8, 8)), Image(2, (8, 8)), *words(12)]
    second: Row = [*first[:-4], *words(9, 3)]
    expected, other = fresh(model, name, first), fresh(model, name, second)
    assert expected != other
    conversation = model.conversation()
    assert ask(model, name, conversation, first) == expected
    assert ask(model, name, conversation, first) == expected, "asked again"
    assert model.usage.cached_visual > 0
    assert model.usage.cached_tokens > 0, "the pictures are not fed again"
    assert ask(model, name, conversation, second) == other, "edited"
    assert ask(model, name, conversation, first) == expected, "and back"


def test_second_turn_asked_again_is_the_same() -> None:
    model = tiny.compiled("qwen", *SPARSE)
    first: Row = [Image(1, (8, 8)), *words(6)]
    conversation = model.conversation()
    [answer] = ask(model, "qwen", conversation, first)
    second = tiny.continued(first, answer, *words(9, 4))
    expected = ask(model, "qwen", conversation, second)
    assert model.usage.fed_tokens == 10, "the answer's last token and the question"
    for _ in range(2):
        assert ask(model, "qwen", conversation, second) == expected
    start = len(tiny.inputs("qwen", [second])["input_ids"][0]) - 9
    assert ask(model, "qwen", conversation, second, query_start=[start]) == expected


def test_query_start_chooses_what_asks() -> None:
    model = tiny.compiled("qwen", *SPARSE)
    row: Row = [Image(1, (10, 8)), *words(20)]
    length = len(tiny.inputs("qwen", [row])["input_ids"][0])
    answers = [fresh(model, "qwen", row, query_start=[length - n]) for n in (20, 8, 1)]
    assert len({str(a) for a in answers}) > 1
    assert answers[0] != answers[2]


@pytest.mark.parametrize("start", [[10_000], [1, 2], []])
def test_query_start_that_leaves_nothing(start: list[int]) -> None:
    model = tiny.compiled("llava", *SPARSE)
    with pytest.raises(UserError, match="query_start"):
        fresh(model, "llava", FIRST, query_start=start)


# ---------------------------------------------------------------------- interruptions


class _Stop(BaseException):
    """As a Ctrl-C is: no Exception."""


class _Counter:
    """Raises at the given call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Stop


class _Streamer(_Counter, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.tick()

    def end(self) -> None:
        self.tick()


class _Criterion(_Counter, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class _Processor(_Counter, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores


def _interrupting(kind: str, at: int) -> dict[str, Any]:
    if kind == "streamer":
        return {"streamer": _Streamer(at)}
    if kind == "criterion":
        return {"stopping_criteria": [_Criterion(at)]}
    return {"logits_processor": LogitsProcessorList([_Processor(at)])}


INTERRUPTIONS = [(k, n) for k in ("streamer", "criterion", "processor") for n in (0, 1, 5, NEW - 1)]


@pytest.mark.parametrize("kind,at", INTERRUPTIONS)
@pytest.mark.parametrize("recipe", ["full", "sparse"])
def test_interrupted_generation(kind: str, at: int, recipe: str) -> None:
    name = "qwen"
    model = tiny.compiled(name, *(tiny.FULL if recipe == "full" else SPARSE))
    second, expected = _second_turn(model, name, *([Image(4, (6, 6))] if at % 2 else []))
    conversation = model.conversation()
    ask(model, name, conversation, FIRST)
    with pytest.raises(_Stop):
        ask(model, name, conversation, second, **_interrupting(kind, at))
    assert ask(model, name, conversation, second) == expected
    third = tiny.continued(second, expected[0], *words(4, 8))
    if recipe == "full":
        assert ask(model, name, conversation, third) == tiny.dense_rows(name, [third], NEW)
    else:
        assert ask(model, name, conversation, third) == _third(model, name, second, third)


def _second_turn(model: CompiledModel, name: str, *pictures: Image) -> tuple[Row, list[list[int]]]:
    """A second prompt and its answer, nothing going wrong."""
    conversation = model.conversation()
    [answer] = ask(model, name, conversation, FIRST)
    second = tiny.continued(FIRST, answer, *pictures, *words(7, 5))
    return second, ask(model, name, conversation, second)


def _third(model: CompiledModel, name: str, second: Row, third: Row) -> list[list[int]]:
    conversation = model.conversation()
    for row in (FIRST, second):
        ask(model, name, conversation, row)
    return ask(model, name, conversation, third)


@pytest.fixture
def failing_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[CompiledModel, str], None]:
    """Makes one component of a model's engine fail once."""

    def arm(model: CompiledModel, component: str) -> None:
        real, armed = model.engine.run, [True]

        def run(name: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
            out = real(name, inputs)  # after the fact: a cache may be written already
            if name == component and armed:
                armed.clear()
                raise torch.cuda.OutOfMemoryError("out of memory")
            return out

        monkeypatch.setattr(model.engine, "run", run)

    return arm


@pytest.mark.parametrize("component", ["vision", "embed", "turn", "retrieve", "decode"])
@pytest.mark.parametrize("recipe", ["full", "sparse"])
def test_interrupted_engine(
    component: str, recipe: str, failing_run: Callable[[CompiledModel, str], None]
) -> None:
    name = "llava"
    model = tiny.compiled(name, *(tiny.FULL if recipe == "full" else SPARSE))
    pictures = [Image(4)] if component == "vision" else []
    second, expected = _second_turn(model, name, *pictures)
    conversation = model.conversation()
    ask(model, name, conversation, FIRST)
    failing_run(model, component)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ask(model, name, conversation, second)
    assert ask(model, name, conversation, second) == expected
    assert conversation.cache is not None
    third = tiny.continued(second, expected[0], *words(4, 8))
    if recipe == "full":
        assert ask(model, name, conversation, third) == tiny.dense_rows(name, [third], NEW)
    else:
        assert ask(model, name, conversation, third) == _third(model, name, second, third)


def test_a_partial_answer_may_be_continued() -> None:
    model = tiny.compiled("llava", *tiny.FULL)
    conversation = model.conversation()
    [whole] = tiny.dense_rows("llava", [FIRST], NEW)
    with pytest.raises(_Stop):
        ask(model, "llava", conversation, FIRST, **_interrupting("streamer", 5))
    row = tiny.continued(FIRST, whole[:4], *words(5, 5))
    assert ask(model, "llava", conversation, row) == tiny.dense_rows("llava", [row], NEW)
    assert model.usage.cached_tokens >= 28 + 3


# ---------------------------------------------------------------------- rows and room


def test_rows_that_end_early_go_on() -> None:
    name = "qwen"
    model = tiny.compiled(name, *tiny.FULL)
    conversation = model.conversation(3)
    rows: list[Row] = [FIRST, words(5, 2), [Image(3), *words(2, 3)]]
    plain = tiny.dense_rows(name, rows, NEW)
    ends = {"eos_token_id": [plain[0][2], plain[1][5]], "pad_token_id": tiny.PAD}
    answers = tiny.dense_rows(name, rows, NEW, **ends)
    assert len({len(a) for a in answers}) == 3
    padded = [[*a, *[tiny.PAD] * (max(map(len, answers)) - len(a))] for a in answers]
    assert ask(model, name, conversation, *rows, **ends) == padded
    held = model.usage.fed_tokens + sum(len(a) - 1 for a in answers)
    rows = [tiny.continued(r, a, *words(3, 6)) for r, a in zip(rows, answers, strict=True)]
    assert ask(model, name, conversation, *rows) == tiny.dense_rows(name, rows, NEW)
    assert model.usage.cached_tokens == held


def test_two_conversations_do_not_mix() -> None:
    model = tiny.compiled("llava", *tiny.FULL)
    one, two = model.conversation(), model.conversation()
    other: Row = [Image(7), *words(9, 7)]
    [a], [b] = ask(model, "llava", one, FIRST), ask(model, "llava", two, other)
    for conversation, row, answer in ((one, FIRST, a), (two, other, b)):
        follow = tiny.continued(row, answer, *words(3, 3))
        got = ask(model, "llava", conversation, follow)
        assert got == tiny.dense_rows("llava", [follow], NEW)


def test_wrong_number_of_rows() -> None:
    model = tiny.compiled("llava", *tiny.FULL)
    conversation = model.conversation(2)
    with pytest.raises(UserError, match="2 rows, the prompt has 1"):
        ask(model, "llava", conversation, FIRST)


def test_full_cache_is_refused_and_the_conversation_lives_on() -> None:
    name, room = "llava", 60
    specs: tuple[tiny.Spec, ...] = (("insert_kv_cache", {"max_length": room}),)
    model = tiny.compiled(name, *specs)
    conversation = model.conversation()
    assert ask(model, name, conversation, FIRST) == tiny.dense_rows(name, [FIRST], NEW)
    long = [*FIRST, *words(room - 28 - NEW + 1, 5)]
    with pytest.raises(UserError, match=rf"needs {room + 1} cache positions.*limit is {room}"):
        ask(model, name, conversation, long)
    assert ask(model, name, conversation, long[:-1]) == tiny.dense_rows(name, [long[:-1]], NEW)
    assert model.usage.cached_tokens == 28


def test_the_cache_grows_with_the_conversation() -> None:
    model = tiny.compiled("llava", *tiny.FULL)
    conversation = model.conversation()
    row: list[tiny.Item] = words(2)
    sizes = []
    for turn in range(6):
        [answer] = ask(model, "llava", conversation, row)
        assert [answer] == tiny.dense_rows("llava", [row], NEW)
        assert conversation.cache is not None
        sizes.append(conversation.cache.capacity)
        row = tiny.continued(row, answer, *words(5, turn))
    assert len(set(sizes)) > 2
    assert sizes == sorted(sizes)


# ---------------------------------------------------------------------- chat


def picture(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (56, 56, 3), generator=g, dtype=torch.uint8)
    return Pictures.fromarray(data.numpy())


def _text(*ids: tiny.Item) -> str:
    return " ".join(f"w{i}" for i in ids)


def _reference(text: str, pictures: list[Any], new_tokens: int) -> str:
    """transformers on a chat prompt written out by hand."""
    prompt = tiny.processor()(text=[text], images=pictures or None, return_tensors="pt")
    out = tiny.dense("llava", dict(prompt), **tiny.greedy(new_tokens))
    return str(tiny.tokenizer().decode(out[0, prompt["input_ids"].shape[1] :]))


def test_chat_keeps_history() -> None:
    chat = tiny.compiled("llava", *tiny.FULL).chat(system=_text(*words(2, 4)))
    # The template ignores roles other than the user's, so the system prompt comes first as it is.
    written, pictures = _text(*words(2, 4)), []
    for turn, added in enumerate(([1], [2, 3], [])):
        for seed in added:
            pictures.append(picture(seed))
            chat.add_image(pictures[-1])
        question = _text(*words(4, turn))
        marks = "<image> " * len(added)
        written += f" w11 w12 {marks}{question} w13"
        answer = chat.ask(question, **tiny.greedy(16))
        assert answer == _reference(written, pictures, 16), f"turn {turn + 1}"
        assert (chat.usage.cached_tokens > 0) == (turn > 0)
        written += f" {answer}"
    assert chat.usage.fed_tokens == 1 + 2 + 4 + 1, "the last answer's last token and the question"


@pytest.mark.parametrize("recipe", [tiny.FULL, SPARSE])
def test_chat_evicts_history(recipe: tuple[tiny.Spec, ...]) -> None:
    """Every question is as if it were the first; the pictures are fed once."""
    model = tiny.compiled("llava", *recipe)
    chat = model.chat(evict_history=True)
    chat.add_image(picture(1))
    chat.add_image(picture(2))
    for turn in range(3):
        question = _text(*words(6, turn))
        alone = model.chat()
        alone.add_image(picture(1))
        alone.add_image(picture(2))
        expected = alone.ask(question, **tiny.greedy(NEW))
        assert chat.ask(question, **tiny.greedy(NEW)) == expected
        if turn:
            assert chat.usage.visual_tokens == 0
            assert chat.usage.cached_visual > 0
            assert chat.usage.fed_tokens == 6 + 1


def test_chat_forgets() -> None:
    model = tiny.compiled("llava", *tiny.FULL)
    chat = model.chat()
    chat.add_image(picture(1))
    first = chat.ask(_text(*words(5)), **tiny.greedy(NEW))
    chat.forget()
    chat.add_image(picture(1))
    assert chat.ask(_text(*words(5)), **tiny.greedy(NEW)) == first
    assert chat.usage.cached_tokens == 0


def test_chat_after_an_interruption() -> None:
    model = tiny.compiled("llava", *SPARSE)
    steady, shaken = model.chat(), model.chat()
    for chat in (steady, shaken):
        chat.add_image(picture(1))
    questions = [_text(*words(5, i)) for i in range(3)]
    for turn, question in enumerate(questions):
        with pytest.raises(_Stop):
            shaken.ask(question, **tiny.greedy(NEW), **_interrupting("streamer", 3 * turn))
        expected = steady.ask(question, **tiny.greedy(NEW))
        assert shaken.ask(question, **tiny.greedy(NEW)) == expected
