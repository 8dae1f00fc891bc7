"""The card world: scenes of lettered, coloured cards, and dialogues about them.

A scene has 4 to 8 cards on a 4 x 4 grid, each with a letter of its own, a colour and a shape; half
of the scenes also hold a small printed word of 3 to 5 letters in a free cell. A dialogue is four
questions of different types about one picture, and questions about single cards name different
cards. Everything is drawn in batch from one torch generator; on a CPU generator the draws are the
same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.cards.batches import Batch
from examples.cards.render import CELL, GRID, JITTER, LONGEST_WORD, WORD_BOX, Renderer
from examples.cards.vocabulary import (
    COLOURS,
    DIRECTIONS,
    EOS,
    FIRST_COLOUR,
    FIRST_GLYPH,
    FIRST_NUMBER,
    FIRST_PLURAL,
    FIRST_SHAPE,
    GLYPHS,
    LETTERS,
    PAD,
    PHRASINGS,
    SHAPES,
    SLOTS,
    TOKEN,
    TYPE_WEIGHTS,
    TYPES,
    phrasings,
)

MOST_CARDS = 8
TURNS = 4
ABOUT_A_CARD = ("letter", "colour", "shape", "where", "relation")


@dataclass
class Scenes(Batch):
    """Scenes [n]; a card slot k < MOST_CARDS is in use where `present`."""

    present: Tensor  # bool [n, k]
    cell: Tensor  # int64 [n, k], row * GRID + column
    glyph: Tensor  # int64 [n, k]
    colour: Tensor  # int64 [n, k]
    shape: Tensor  # int64 [n, k]
    size: Tensor  # int64 [n, k]
    jitter: Tensor  # int64 [n, k]
    neighbour: Tensor  # int64 [n, k, 4]: nearest card left, right, above, below
    has_neighbour: Tensor  # bool [n, k, 4]
    has_word: Tensor  # bool [n]
    word: Tensor  # int64 [n, LONGEST_WORD]
    word_length: Tensor  # int64 [n]
    word_cell: Tensor  # int64 [n]
    word_x: Tensor  # int64 [n], left edge in its cell, pixels
    word_y: Tensor  # int64 [n], top edge in its cell, pixels

    def by_cell(self, value: Tensor, empty: int) -> Tensor:
        """Values of the cards [n, k] laid out on the grid [n, GRID * GRID]."""
        board = torch.full((len(self), GRID * GRID), empty, device=value.device, dtype=value.dtype)
        return board.scatter(1, self.cell, torch.where(self.present, value, empty))

    def listed(self, i: int) -> list[dict[str, str | int]]:
        """The cards of scene i in plain words, rows and columns from 0."""
        return [
            {
                "letter": GLYPHS[int(self.glyph[i, k])],
                "colour": list(COLOURS)[int(self.colour[i, k])],
                "shape": SHAPES[int(self.shape[i, k])],
                "row": int(self.cell[i, k]) // GRID,
                "column": int(self.cell[i, k]) % GRID,
            }
            for k in range(MOST_CARDS)
            if self.present[i, k]
        ]

    def printed(self, i: int) -> str | None:
        """The printed word of scene i, or None."""
        if not self.has_word[i]:
            return None
        return "".join(LETTERS[c] for c in self.word[i, : int(self.word_length[i])].tolist())


@dataclass
class Dialogues(Batch):
    """Text of dialogues [n]: question, answer, </s>, question, ...; padding at the end."""

    text: Tensor  # int64 [n, TEXT]
    is_answer: Tensor  # bool [n, TEXT]: answers and their </s>
    turn: Tensor  # int64 [n, TEXT]; -1 on padding
    kind: Tensor  # int64 [n, turns], index into TYPES
    answer_tokens: Tensor  # int64 [n, turns], without </s>

    def trimmed(self) -> Dialogues:
        """The same without the columns that are padding in every row."""
        used = int((self.turn >= 0).sum(1).max())
        cut = {k: getattr(self, k)[:, :used] for k in ("text", "is_answer", "turn")}
        return replace(self, **cut)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Text rows of each turn's question, and those that decode feeds: answers without </s>.

        Both bool [n, turns, text]. An answer's </s> is fed with the next question.
        """
        turns = torch.arange(self.kind.shape[1], device=self.text.device)
        here = self.turn[:, None, :] == turns[:, None]
        asking = here & ~self.is_answer[:, None]
        return asking, here & (self.is_answer & (self.text != EOS))[:, None]

    def turn_ids(self, i: int, turn: int, answer: bool) -> list[int]:
        """Token ids of one question, or of one answer without its </s>."""
        chosen = (self.turn[i] == turn) & (self.is_answer[i] == answer) & (self.text[i] != EOS)
        return self.text[i][chosen].tolist()


@dataclass
class Samples(Batch):
    """Pictures with their scenes and dialogues."""

    scenes: Scenes
    dialogues: Dialogues
    pictures: Tensor  # uint8 [n, 3, SIDE, SIDE]
    covered: Tensor  # float32 [n, PATCHES]


def _pad(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor([r + [PAD] * (width - len(r)) for r in rows], device=device)


class World:
    """Draws scenes, dialogues and pictures on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.render = Renderer(device)
        asked, answered = [], []
        for kind in TYPES:
            for direction in DIRECTIONS:
                for question, answer in phrasings(kind, direction):
                    asked.append([SLOTS.get(w, TOKEN.get(w, 0)) for w in question.split()])
                    reply = [SLOTS.get(w, TOKEN.get(w, 0)) for w in answer.split()]
                    if reply[-1] == SLOTS["{W}"]:  # one slot a letter: -8, -9, ...
                        reply[-1:] = [SLOTS["{W}"] - j for j in range(LONGEST_WORD)]
                    answered.append(reply)
        self.longest_question = max(map(len, asked))
        self.longest_answer = max(map(len, answered))
        self.questions = _pad(asked, self.longest_question, device)
        self.question_length = torch.tensor([len(r) for r in asked], device=device)
        self.answers = _pad(answered, self.longest_answer, device)
        self.answer_length = torch.tensor([len(r) for r in answered], device=device)
        self.weights = torch.tensor([TYPE_WEIGHTS[t] for t in TYPES], device=device)
        # the longest dialogue: four different types, each at its longest phrasing
        whole = (self.question_length + self.answer_length + 1).view(len(TYPES), -1).amax(1)
        self.text_length = -(-int(whole.sort().values[-TURNS:].sum()) // 8) * 8

    def _upto(self, high: int | Tensor, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        """int64 draws from 0 to high - 1; `high` broadcasts."""
        draw = torch.rand(shape, generator=g, device=self.device) * high
        limit = torch.as_tensor(high, device=self.device) - 1
        return torch.minimum(draw.long(), limit)

    def scenes(self, n: int, g: torch.Generator, fewest: int = 4, most: int = MOST_CARDS) -> Scenes:
        """Draw n scenes of `fewest` to `most` cards."""
        k = MOST_CARDS

        def shuffled(items: int) -> Tensor:
            return torch.rand(n, items, generator=g, device=self.device).argsort(1)

        count = fewest + self._upto(most - fewest + 1, (n,), g)
        cells = shuffled(GRID * GRID)
        present = torch.arange(k, device=self.device) < count[:, None]
        looks = []
        for kinds in (len(COLOURS), len(SHAPES)):  # each picture uses a palette of two or more
            palette = 2 + self._upto(kinds - 1, (n, 1), g)
            looks.append(shuffled(kinds).gather(1, self._upto(palette, (n, k), g)))
        length = 3 + self._upto(LONGEST_WORD - 2, (n,), g)
        height, width = WORD_BOX
        neighbour, has_neighbour = self._neighbours(cells[:, :k], present)
        return Scenes(
            present=present,
            cell=cells[:, :k],
            glyph=shuffled(len(GLYPHS))[:, :k],
            colour=looks[0],
            shape=looks[1],
            size=self._upto(2, (n, k), g),
            jitter=self._upto(len(JITTER) ** 2, (n, k), g),
            neighbour=neighbour,
            has_neighbour=has_neighbour,
            has_word=self._upto(2, (n,), g) == 0,
            word=self._upto(len(LETTERS), (n, LONGEST_WORD), g),
            word_length=length,
            word_cell=cells[:, k],
            word_x=(CELL - width * length) // 2 + self._upto(7, (n,), g) - 3,
            word_y=(CELL - height) // 2 + self._upto(33, (n,), g) - 16,
        )

    @staticmethod
    def _neighbours(cell: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest card in the same row (left, right) or column (above, below) of each card."""
        row, column = cell // GRID, cell % GRID
        both = present[:, :, None] & present[:, None, :]
        found, exists = [], []
        for line, along, sign in (
            (row, column, 1),
            (row, column, -1),
            (column, row, 1),
            (column, row, -1),
        ):
            gap = (along[:, :, None] - along[:, None, :]) * sign  # > 0 on the asked side
            on_line = both & (line[:, :, None] == line[:, None, :]) & (gap > 0)
            found.append(gap.masked_fill(~on_line, GRID).argmin(2))
            exists.append(on_line.any(2))
        return torch.stack(found, 2), torch.stack(exists, 2)

    def dialogues(self, s: Scenes, g: torch.Generator, rounds: int = 1) -> Dialogues:
        """Draw `rounds` dialogues of four turns a scene, written one after the other."""
        parts = []
        for r in range(rounds):
            used = torch.zeros_like(s.present)
            asked = torch.zeros(len(s), len(TYPES), dtype=torch.bool, device=self.device)
            for t in range(TURNS):
                parts.append(self._turn(s, g, used, asked, r * TURNS + t))
        text, valid, is_answer, turn = (
            torch.cat([p[j].expand_as(p[0]) for p in parts], 1) for j in range(4)
        )
        end = self.text_length * rounds
        at = torch.where(valid, valid.long().cumsum(1) - 1, end)

        def packed(values: Tensor, fill: int) -> Tensor:
            board = torch.full((len(s), end + 1), fill, dtype=values.dtype, device=self.device)
            return board.scatter(1, at, values)[:, :-1]

        return Dialogues(
            text=packed(text, PAD),
            is_answer=packed(is_answer, 0),
            turn=packed(turn, -1),
            kind=torch.stack([p[4] for p in parts], 1),
            answer_tokens=torch.stack([p[5] for p in parts], 1),
        )

    def _turn(
        self, s: Scenes, g: torch.Generator, used: Tensor, asked: Tensor, turn: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One question and answer a scene; marks `used` cards [n, k] and `asked` types in place.

        Returns tokens, which of them count, which are answer, the turn, the type, answer lengths.
        """
        n, k = s.present.shape
        every = torch.arange(n, device=self.device)
        free = s.present & ~used
        look = torch.where(s.present, s.colour * len(SHAPES) + s.shape, -1)
        alone = (look[:, :, None] == look[:, None, :]).sum(2) == 1
        partner_free = free.gather(1, s.neighbour.flatten(1)).view(n, k, 4)
        pairs = (s.has_neighbour & free[:, :, None] & partner_free).flatten(1)
        possible = {
            "letter": (free & alone).any(1),
            "colour": free.any(1),
            "shape": free.any(1),
            "where": free.any(1),
            "relation": pairs.any(1),
            "word": s.has_word,
        }
        always = s.present.any(1)
        allowed = torch.stack([possible.get(t, always) for t in TYPES], 1) & ~asked
        ladder = (self.weights * allowed).cumsum(1)
        kind = (ladder <= self._upto(ladder[:, -1], (n,), g)[:, None]).sum(1)
        asked[every, kind] = True

        def is_kind(*names: str) -> Tensor:
            return torch.stack([kind == TYPES.index(x) for x in names]).any(0)

        def one_of(pool: Tensor) -> Tensor:
            lots = torch.rand(pool.shape, generator=g, device=self.device)
            return lots.masked_fill(~pool, -1).argmax(1)

        relation = is_kind("relation")
        card = one_of(torch.where(is_kind("letter")[:, None], free & alone, free))
        pair = one_of(pairs)
        card = torch.where(relation, pair // 4, card)
        direction = torch.where(relation, pair % 4, 0)
        other = s.neighbour[every, card, direction]
        used[every, card] |= is_kind(*ABOUT_A_CARD)
        used[every, other] |= relation

        # what is counted: mostly the look of a card not asked about yet, sometimes any
        stray = self._upto(20, (n,), g) < 3
        colour = torch.where(
            stray & is_kind("count_colour"),
            self._upto(len(COLOURS), (n,), g),
            s.colour[every, card],
        )
        shape = torch.where(
            stray & is_kind("count_shape"), self._upto(len(SHAPES), (n,), g), s.shape[every, card]
        )
        glyph, cell = s.glyph[every, card], s.cell[every, card]
        word_for = {
            "letter": FIRST_GLYPH + glyph,
            "colour": FIRST_COLOUR + colour,
            "shape": FIRST_SHAPE + shape,
            "count_colour": FIRST_NUMBER + (s.present & (s.colour == colour[:, None])).sum(1),
            "count_shape": FIRST_NUMBER + (s.present & (s.shape == shape[:, None])).sum(1),
            "count_cards": FIRST_NUMBER + s.present.sum(1),
            "relation": FIRST_GLYPH + s.glyph[every, other],
        }
        nothing = torch.zeros_like(glyph)
        filled = {
            "{C}": FIRST_COLOUR + colour,
            "{S}": FIRST_SHAPE + shape,
            "{P}": FIRST_PLURAL + shape,
            "{G}": FIRST_GLYPH + glyph,
            "{A}": torch.stack([word_for.get(t, nothing) for t in TYPES], 1)[every, kind],
            "{R}": FIRST_NUMBER + 1 + cell // GRID,
            "{L}": FIRST_NUMBER + 1 + cell % GRID,
        }
        # indexed by minus the slot's code; the word's letters come last
        values = torch.stack([nothing, *filled.values()], 1)
        values = torch.cat([values, FIRST_GLYPH + s.word], 1)
        template = (kind * 4 + direction) * PHRASINGS + self._upto(PHRASINGS, (n,), g)

        def fill(tokens: Tensor) -> Tensor:
            return torch.where(tokens < 0, values.gather(1, (-tokens).clamp_min(0)), tokens)

        missing = torch.where(is_kind("word"), LONGEST_WORD - s.word_length, 0)
        length = self.answer_length[template] - missing
        answer = F.pad(fill(self.answers[template]), (0, 1), value=PAD)
        answer[every, length] = EOS
        at_q = torch.arange(self.longest_question, device=self.device)
        at_a = torch.arange(self.longest_answer + 1, device=self.device)
        tokens = torch.cat([fill(self.questions[template]), answer], 1)
        valid = torch.cat(
            [at_q < self.question_length[template][:, None], at_a <= length[:, None]], 1
        )
        is_answer = torch.arange(tokens.shape[1], device=self.device) >= self.longest_question
        turns = torch.full_like(tokens[:1], turn)
        return tokens, valid, is_answer[None], turns, kind, length

    def samples(
        self,
        n: int,
        g: torch.Generator,
        fewest: int = 4,
        most: int = MOST_CARDS,
        rounds: int = 1,
    ) -> Samples:
        """Draw n pictures with dialogues."""
        s = self.scenes(n, g, fewest, most)
        talk = self.dialogues(s, g, rounds)
        pictures, covered = self.render(s, g)
        return Samples(s, talk, pictures, covered)


#: seeds of the sets that training never draws from; training seeds start at 10,000
HELD_OUT_SEED = 990_001
VALIDATION_SEED = 77_001
CALIBRATION_SEED = 55_001
assert min(HELD_OUT_SEED, VALIDATION_SEED, CALIBRATION_SEED) > 50_000


def fixed_set(n: int, seed: int, device: torch.device) -> Samples:
    """The same n samples on every machine: drawn and rendered on the CPU, then moved."""
    world = World(torch.device("cpu"))
    g = torch.Generator().manual_seed(seed)
    sizes = [min(50, n - i) for i in range(0, n, 50)]
    return Samples.cat([world.samples(size, g) for size in sizes]).to(device)


def in_chunks(samples: Samples, size: int) -> Iterator[Samples]:
    """Samples in order, at most `size` at a time."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
