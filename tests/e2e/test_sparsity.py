"""Pruned and retrieved answers against an independent eager computation in transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparsevila_compile.budget import keep_count
from sparsevila_compile.engine import Retrieved
from sparsevila_compile.model import CompiledModel
from tests import tiny
from tests.e2e.reference import Dialogue, Encoded, Prune, encode, kept, plain, share
from tests.tiny import Image, Row, Video, words

NEW = 32
ROWS: dict[str, Row] = {
    "one picture": [*words(3), Image(1, (6, 8)), *words(5, 1)],
    "two pictures": [Image(2, (4, 4)), *words(3), Image(3, (8, 10)), *words(6, 1)],
}
VIDEO_ROW: Row = [40, Video(1, (3, 4, 8), 2.0), *words(2), Image(2, (6, 6)), *words(5, 2)]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_reference_is_transformers(name: str) -> None:
    """With nothing left out, the reference gives what ``generate`` gives."""
    rows = [*ROWS.values(), *([VIDEO_ROW] if name == "qwen" else [])]
    for row in rows:
        assert plain(name, row, NEW) == tiny.dense_rows(name, [row], NEW)[0]


# ---------------------------------------------------------------------- which tokens are kept


def _compiled_kept(model: CompiledModel, name: str, rows: Sequence[Row]) -> list[list[list[int]]]:
    """Kept tokens by prompt and picture; checks that the tokens are those of that index."""
    read = model.reader.read(tiny.inputs(name, rows))
    tokens, kept = model.engine.encode([row.pictures for row in read])
    indices = kept()
    start = 0
    for row, mine in zip(rows, indices, strict=True):
        items = [item for item in row if not isinstance(item, int)]
        for item, index in zip(items, mine, strict=True):
            expected = encode(name, item).tokens[index]
            got = tokens[start : start + len(index)]
            assert (got - expected).norm() < 1e-4 * expected.norm()
            start += len(index)
    assert start == len(tokens)
    return [[index.tolist() for index in mine] for mine in indices]


def _encoded(name: str, row: Row, prune: Prune) -> list[Encoded]:
    options: dict[str, Any] = {k: getattr(prune, k) for k in ("score", "layer", "pool")}
    return [encode(name, item, **options) for item in row if not isinstance(item, int)]


KEPT: list[tuple[str, Prune]] = [
    *((n, Prune(r)) for n in tiny.FAMILIES for r in (0.25, 0.5)),
    ("llava", Prune(0.3, score="column_mean")),
    ("llava", Prune(0.3, score="cls", layer=0)),
    ("llava", Prune(0.3, layer=-2)),
    ("llava_siglip", Prune(0.3, layer=1)),
    ("qwen", Prune(0.3, pool="max")),
    ("qwen", Prune(0.3, layer=1)),
    *((n, Prune(0.25, budget="prompt")) for n in tiny.FAMILIES),
    ("qwen", Prune(0.25, budget="frame")),
]


@pytest.mark.parametrize("name,prune", KEPT)
def test_kept_tokens(name: str, prune: Prune) -> None:
    rows: list[Row] = [*ROWS.values(), words(4), *([VIDEO_ROW] if name == "qwen" else [])]
    model = tiny.compiled(name, prune.spec(), "insert_kv_cache")
    got = _compiled_kept(model, name, rows)
    for row, mine in zip(rows, got, strict=True):
        pictures = _encoded(name, row, prune)
        assert mine == kept(pictures, prune)
        total = sum(len(p.tokens) for p in pictures)
        count = sum(map(len, mine))
        assert count < 0.7 * total or not pictures
        # Salience that is flat, or the first tokens always, would make this an empty test.
        if pictures:
            spread = torch.cat([p.salience for p in pictures])
            assert spread.std() > 0.02 * spread.mean()
    assert any(i != list(range(len(i))) for mine in got for i in mine)


def test_budgets_are_exact() -> None:
    """Hundredths of any number of tokens: no rounding of 0.1 + 0.2 keeps one too many."""
    for hundredths in range(1, 101):
        for n in (0, 1, 7, 10, 16, 20, 30, 100, 576, 1500, 70_000):
            expected = -(-hundredths * n // 100)
            assert keep_count(hundredths / 100, n) == expected, (hundredths, n)


def test_options_choose_different_tokens() -> None:
    """Each option of the salience is one: none is ignored."""
    for name, group in (
        ("llava", [Prune(0.3), Prune(0.3, score="column_mean"), Prune(0.3, layer=0)]),
        ("qwen", [Prune(0.3), Prune(0.3, pool="max"), Prune(0.3, layer=1)]),
    ):
        row = ROWS["two pictures"]
        sets = [kept(_encoded(name, row, p), p) for p in group]
        assert len({str(s) for s in sets}) == len(group)
    by_budget = [
        kept(_encoded("qwen", VIDEO_ROW, p), p)
        for p in (Prune(0.25), Prune(0.25, budget="frame"), Prune(0.25, budget="prompt"))
    ]
    assert len({str(s) for s in by_budget}) == 3


# ---------------------------------------------------------------------- pruned answers


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_pruned_answers(name: str, ratio: float, positions: str) -> None:
    prune = Prune(ratio, positions=positions)
    rows = [*ROWS.values(), *([VIDEO_ROW] if name == "qwen" else [])]
    model = tiny.compiled(name, prune.spec(), "insert_kv_cache")
    expected = [Dialogue(name, prune).ask(row, NEW) for row in rows]
    for row, answer in zip(rows, expected, strict=True):
        prompt = tiny.inputs(name, [row])
        out = tiny.answers_of(prompt, model.generate(**prompt, **tiny.greedy(NEW)))
        assert out == [answer]
        assert answer != tiny.dense_rows(name, [row], NEW)[0], "pruning changes the answer"
        total = sum(len(encode(name, i).tokens) for i in row if not isinstance(i, int))
        assert model.usage.visual_tokens == total
        assert model.usage.kept_tokens < 0.6 * total
    # The same side by side, and padded on the other side.
    for side in ("left", "right"):
        prompt = tiny.inputs(name, rows, side)
        out = tiny.answers_of(prompt, model.generate(**prompt, **tiny.greedy(NEW)))
        assert out == expected, side


@pytest.mark.parametrize(
    "name,budget", [(n, "prompt") for n in tiny.FAMILIES] + [("qwen", "frame")]
)
def test_pruned_answers_other_budgets(name: str, budget: str) -> None:
    prune = Prune(0.25, budget=budget)
    row = VIDEO_ROW if name == "qwen" else ROWS["two pictures"]
    prompt = tiny.inputs(name, [row])
    model = tiny.compiled(name, prune.spec(), "insert_kv_cache")
    out = tiny.answers_of(prompt, model.generate(**prompt, **tiny.greedy(NEW)))
    assert out == [Dialogue(name, prune).ask(row, NEW)]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_positions_matter(name: str) -> None:
    row = ROWS["one picture"]
    answers = [
        Dialogue(name, Prune(0.1, positions=p)).ask(row, NEW) for p in ("original", "compact")
    ]
    assert answers[0] != answers[1]


# ---------------------------------------------------------------------- retrieval

TURNS: list[Row] = [
    [*words(2), Image(1, (8, 8)), *words(6, 1)],
    words(5, 2),
    [*words(2, 3), Image(2, (6, 8)), *words(7, 4)],
    words(4, 5),
]


class _Watch:
    """Records what a model retrieves."""

    def __init__(self, model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scores: dict[str, torch.Tensor] = {}
        self.found: Retrieved | None = None
        real = model.engine.retrieve

        def retrieve(scores: dict[str, torch.Tensor], *args: Any) -> Retrieved | None:
            self.scores = scores
            self.found = real(scores, *args)
            return self.found

        monkeypatch.setattr(model.engine, "retrieve", retrieve)

    def sets(self, columns: list[int]) -> list[list[list[int]]]:
        """Retrieved visual positions by layer and KV head, of a batch of one."""
        assert self.found is not None
        result = []
        for layer in range(2):
            index = self.found.index.get(f"index_{layer}")
            if index is None:
                result.append([columns, columns])
                continue
            heads = [sorted(set(row.tolist()) & set(columns)) for row in index[0]]
            result.append(heads if len(heads) == 2 else heads * 2)
        return result


@pytest.mark.parametrize("options", [{}, {"share": "kv_head"}, {"layers": (1,)}], ids=str)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_retrieved_answers(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four turns: scores, sets and tokens are those of dense attention under that mask."""
    model = tiny.compiled(name, *tiny.retrieving(0.2, **options))
    per_head = options.get("share") == "kv_head"
    layers = options.get("layers", (0, 1))
    reference = Dialogue(name, retrieve=0.2, per_head=per_head, layers=layers)
    watch = _Watch(model, monkeypatch)
    conversation = model.conversation()
    row: list[tiny.Item] = []
    sets = []
    for turn, new in enumerate(TURNS):
        row = [*row, *new]
        prompt = tiny.inputs(name, [row])
        out = model.generate(conversation=conversation, **prompt, **tiny.greedy(NEW))
        [answer] = tiny.answers_of(prompt, out)
        expected = reference.ask(new, NEW)
        columns = [j for j, v in enumerate(reference.visual) if v]
        for layer in layers:
            ours, theirs = watch.scores[f"scores_{layer}"][0], reference.scores[layer]
            assert ours.shape == theirs.shape
            assert theirs.sum() > 0.005, "the question looks at the pictures"
            assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        assert watch.sets(columns) == reference.sets, f"turn {turn + 1}"
        assert answer == expected, f"turn {turn + 1}"
        assert model.usage.attended_visual == share(0.2, len(columns)) < len(columns)
        sets.append(str(reference.sets))
        row = tiny.continued(row, answer)
    assert len(set(sets)) == len(TURNS), "every turn retrieves anew"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_retrieval_changes_the_answer(name: str) -> None:
    row = ROWS["two pictures"]
    answers = [Dialogue(name, retrieve=r).ask(row, NEW) for r in (None, 0.1, 0.5)]
    assert len({str(a) for a in answers}) == 3


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_pruned_and_retrieved(name: str, positions: str) -> None:
    prune = Prune(0.5, positions=positions)
    model = tiny.compiled(name, prune.spec(), *tiny.retrieving(0.3))
    reference, conversation = Dialogue(name, prune, retrieve=0.3), model.conversation()
    row: list[tiny.Item] = []
    turns = [[*words(3), Video(3, (4, 4, 4), 1.5), *words(3)], *TURNS] if name == "qwen" else TURNS
    for turn, new in enumerate(turns):
        row = [*row, *new]
        prompt = tiny.inputs(name, [row])
        out = model.generate(conversation=conversation, **prompt, **tiny.greedy(NEW))
        assert tiny.answers_of(prompt, out) == [reference.ask(new, NEW)], f"turn {turn + 1}"
        row = tiny.continued(row, tiny.answers_of(prompt, out)[0])


@pytest.mark.parametrize("options", [{}, {"share": "kv_head"}], ids=str)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_retrieval_in_a_batch(name: str, options: dict[str, Any]) -> None:
    """Rows of different lengths, pictures and none: each as if it were alone."""
    rows: list[Row] = [TURNS[0], words(9, 3), ROWS["two pictures"], [Image(5, (2, 2)), 77]]
    model = tiny.compiled(name, *tiny.retrieving(0.2, **options))
    per_head = options.get("share") == "kv_head"
    expected = [Dialogue(name, retrieve=0.2, per_head=per_head).ask(row, NEW) for row in rows]
    for side in ("left", "right"):
        prompt = tiny.inputs(name, rows, side)
        assert tiny.answers_of(prompt, model.generate(**prompt, **tiny.greedy(NEW))) == expected


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_prefill_in_chunks(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that cut through pictures and questions give the same scores, sets and tokens."""
    model = tiny.compiled(name, *tiny.retrieving(0.2))
    rows: list[Row] = [TURNS[0], words(3, 3), ROWS["two pictures"]]
    later: list[Row] = [TURNS[2], words(9, 4), words(6, 5)]
    watch = _Watch(model, monkeypatch)

    def two_turns() -> list[tuple[list[list[int]], dict[str, torch.Tensor]]]:
        conversation, now, seen = model.conversation(3), rows, []
        for _ in range(2):
            prompt = tiny.inputs(name, now)
            out = model.generate(conversation=conversation, **prompt, **tiny.greedy(NEW))
            answers = tiny.answers_of(prompt, out)
            seen.append((answers, watch.scores))
            now = [
                tiny.continued(row, answer, *more)
                for row, answer, more in zip(now, answers, later, strict=True)
            ]
        return seen

    whole = two_turns()
    in_chunks = functools.partial(model.engine.prefill, chunk=chunk)
    monkeypatch.setattr(model.engine, "prefill", in_chunks)
    for (answers, scores), (expected, reference) in zip(two_turns(), whole, strict=True):
        assert answers == expected
        assert set(scores) == {"scores_0", "scores_1"}
        for key, value in scores.items():
            assert value is not reference[key]
            assert (value - reference[key]).norm() < 1e-4 * reference[key].norm()
