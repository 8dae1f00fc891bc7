"""The card world: same draws anywhere, answers that follow from the scene, pictures that show it."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch

from examples.cards.render import CELL, PATCHES, SIDE, Renderer
from examples.cards.vocabulary import COLOURS, NUMBERS, PAD, SHAPES, TYPES, WORDS, spell
from examples.cards.world import TURNS, Samples, World, fixed_set

CPU = torch.device("cpu")
SEED = 31_337
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def drawn() -> Samples:
    return fixed_set(100, SEED, CPU)


def answer_to(question: str, cards: list[dict[str, str | int]], printed: str | None) -> str:
    """The answer by plain rules over the listed cards; knows nothing of tensors or templates."""
    named = re.search(r"\b[A-Z2-9]\b", question)
    card = next((c for c in cards if named and c["letter"] == named[0]), None)
    colour = next((w for w in question.split() if w in COLOURS), None)
    shape = next((s for s in SHAPES if re.search(rf"\b{s}s?\b", question)), None)
    brief = question.endswith("?")

    def said(start: str, value: str) -> str:
        return value if brief else f"{start} {value}"

    if question.startswith(("how many", "count")):
        hits = [
            c
            for c in cards
            if (colour is None or c["colour"] == colour) and (shape is None or c["shape"] == shape)
        ]
        return said("there are", NUMBERS[len(hits)])
    if "word" in question:
        assert printed is not None
        return " ".join(printed)
    for place, (down, along) in STEPS.items():
        if place in question:
            assert card is not None
            row, column = int(card["row"]) + down, int(card["column"]) + along
            while True:
                assert {row, column} <= set(range(4)), f"no card for {question!r}"
                there = [c for c in cards if (c["row"], c["column"]) == (row, column)]
                if there:
                    return said("it is", str(there[0]["letter"]))
                row, column = row + down, column + along
    if colour is not None:
        hits = [c for c in cards if c["colour"] == colour and c["shape"] == shape]
        assert len(hits) == 1, f"{question!r} names {len(hits)} cards"
        return said("it says", str(hits[0]["letter"]))
    assert card is not None, question
    if question.startswith(("where", "in which row", "find")):
        where = f"row {NUMBERS[int(card['row']) + 1]} column {NUMBERS[int(card['column']) + 1]}"
        return said("it is in", where)
    if "colour" in question:
        return said("it is", str(card["colour"]))
    assert "shape" in question, question
    return said("it is a", str(card["shape"]))


def test_every_answer_follows_from_the_scene(drawn: Samples) -> None:
    talk = drawn.dialogues
    for i in range(len(drawn)):
        cards, printed = drawn.scenes.listed(i), drawn.scenes.printed(i)
        for t in range(TURNS):
            question, answer = (spell(talk.turn_ids(i, t, a)) for a in (False, True))
            assert answer == answer_to(question, cards, printed), (i, t, question)


def test_scenes_are_what_they_should_be(drawn: Samples) -> None:
    counts = []
    for i in range(len(drawn)):
        cards = drawn.scenes.listed(i)
        counts.append(len(cards))
        assert len({c["letter"] for c in cards}) == len(cards)
        assert len({(c["row"], c["column"]) for c in cards}) == len(cards)
    assert set(counts) == {4, 5, 6, 7, 8}
    words = [drawn.scenes.printed(i) for i in range(len(drawn))]
    assert 30 <= sum(w is not None for w in words) <= 70
    assert {len(w) for w in words if w} == {3, 4, 5}


def test_dialogues_vary(drawn: Samples) -> None:
    talk = drawn.dialogues
    assert all(len(set(row)) == TURNS for row in talk.kind.tolist()), "a type asked twice"
    assert set(talk.kind.flatten().tolist()) == set(range(len(TYPES)))
    assert (talk.answer_tokens > 1).float().mean() > 1 / 3
    for i in range(len(drawn)):
        named = []
        for t in range(TURNS):
            question = spell(talk.turn_ids(i, t, False))
            named += re.findall(r"\b[A-Z2-9]\b", question)
        assert len(set(named)) == len(named), "two questions name one card"


def test_text_is_turns_in_order(drawn: Samples) -> None:
    talk = drawn.dialogues
    for i in range(5):
        whole = [t for t in talk.text[i].tolist() if t != PAD]
        pieces: list[str] = []
        for t in range(TURNS):
            pieces += [*(spell(talk.turn_ids(i, t, a)) for a in (False, True)), "</s>"]
        assert spell(whole) == " ".join(pieces)
    assert int(talk.text.max()) < len(WORDS)


def test_pictures_show_the_scene(drawn: Samples) -> None:
    """In each card's cell the covered patches have the card's colour; elsewhere nothing covers."""
    rgb = torch.tensor(list(COLOURS.values())).float()
    for i in range(20):
        used = torch.zeros(4, 4, dtype=torch.bool)
        for card in drawn.scenes.listed(i):
            row, column = int(card["row"]), int(card["column"])
            used[row, column] = True
            box = drawn.pictures[
                i, :, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL
            ]
            apart = (box.float()[None] - rgb[:, :, None, None]).norm(dim=1)
            near = (apart.amin(0) < 60).flatten()
            shown = apart.argmin(0).flatten()[near].bincount(minlength=len(COLOURS))
            wanted = list(COLOURS).index(str(card["colour"]))
            assert shown[wanted] > 200, f"picture {i}: no {card['colour']} in {row}, {column}"
        cover = drawn.covered[i].view(4, 4, 4, 4).amax((1, 3))
        word = torch.zeros(16, dtype=torch.bool)
        if drawn.scenes.has_word[i]:
            word[drawn.scenes.word_cell[i]] = True
        assert torch.equal(cover > 0, used | word.view(4, 4))


def test_draws_repeat(drawn: Samples) -> None:
    again = fixed_set(100, SEED, CPU)
    for a, b in ((again.pictures, drawn.pictures), (again.dialogues.text, drawn.dialogues.text)):
        assert torch.equal(a, b)
    other = fixed_set(50, SEED + 1, CPU)
    assert not torch.equal(other.dialogues.text, drawn.dialogues.text[:50])
    assert not torch.equal(other.pictures, drawn.pictures[:50])
    assert torch.equal(fixed_set(150, SEED, CPU).pictures[:100], drawn.pictures)


def test_pictures_and_text_are_the_same_on_every_machine(drawn: Samples) -> None:
    """Digests of what was drawn where the checkpoint was made."""
    assert drawn.pictures.shape == (100, 3, SIDE, SIDE)
    assert drawn.pictures.dtype == torch.uint8
    assert drawn.covered.shape == (100, PATCHES)
    digests = [
        hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]
        for x in (drawn.pictures, drawn.dialogues.text)
    ]
    assert digests == ["a72c4f13edd3f994", "1a3aaf20acee765c"]


def test_rendering_needs_only_the_scene_and_its_generator() -> None:
    world = World(CPU)
    scenes = world.scenes(3, torch.Generator().manual_seed(4))
    first, covered = Renderer(CPU)(scenes, torch.Generator().manual_seed(5))
    second, _ = world.render(scenes, torch.Generator().manual_seed(5))
    third, same = world.render(scenes, torch.Generator().manual_seed(6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(covered, same)
