"""What the tower and projector are trained to show, before any language model.

Three objectives, each with heads that exist in training only:

- *presence*: the class token tells which letters, colours, shapes and word letters are in the
  picture, so its attention in the last layer goes to the patches that hold them;
- *patch contents*: each patch's feature tells what covers it, and its card's neighbours' letters;
- *alignment*: each projected visual token points, by cosine, at the language model's embeddings of
  the words for what it shows. A card's letter, colour and shape are read off the token itself, the
  others (neighbours, row, column, a second letter of the word) after a linear map of their own.

Background patches must say "nothing", which keeps the tower from storing notes in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from examples.cards.batches import Batch
from examples.cards.render import GRID, LONGEST_WORD, PATCH, PATCHES, SIDE, WORD_BOX
from examples.cards.vocabulary import (
    COLOURS,
    FIRST_COLOUR,
    FIRST_GLYPH,
    FIRST_NUMBER,
    FIRST_SHAPE,
    GLYPHS,
    LETTERS,
    SHAPES,
)
from examples.cards.world import Samples

COVERED = 0.35  # a patch with this share of card or more belongs to it
PER_CELL = SIDE // GRID // PATCH  # patches a side of a cell
NONE = -100  # cross_entropy's ignore_index
CARD_PRESENCE = len(GLYPHS) + len(COLOURS) + len(SHAPES)
WORD_PRESENCE = len(LETTERS) + 1
COSINE_SCALE = 20.0


@dataclass(frozen=True)
class Note:
    """Something a token tells: classes first_token .. first_token + classes - 1."""

    first_token: int
    classes: int
    mapped: bool  # read through a linear map of its own


NOTES: dict[str, Note] = {
    "letter": Note(FIRST_GLYPH, len(GLYPHS), False),
    "colour": Note(FIRST_COLOUR, len(COLOURS), False),
    "shape": Note(FIRST_SHAPE, len(SHAPES), False),
    "word_letter": Note(FIRST_GLYPH, len(LETTERS), False),
    "left": Note(FIRST_GLYPH, len(GLYPHS), True),
    "right": Note(FIRST_GLYPH, len(GLYPHS), True),
    "above": Note(FIRST_GLYPH, len(GLYPHS), True),
    "below": Note(FIRST_GLYPH, len(GLYPHS), True),
    "row": Note(FIRST_NUMBER + 1, GRID, True),
    "column": Note(FIRST_NUMBER + 1, GRID, True),
    "word_second": Note(FIRST_GLYPH, len(LETTERS), True),  # a patch can hold two letters
}
NEIGHBOURS = ("left", "right", "above", "below")
#: the notes a patch feature must tell too; there, one more class says "nothing"
PATCH_NOTES = ("letter", "colour", "shape", "word_letter", "word_second", *NEIGHBOURS)


@dataclass
class Targets(Batch):
    """Labels of n pictures."""

    presence: Tensor  # float32 [n, CARD_PRESENCE + WORD_PRESENCE]
    notes: Tensor  # int64 [n, PATCHES, len(NOTES)]; NONE where there is nothing to tell


def _spread(cells: Tensor) -> Tensor:
    """A value a cell, [n, GRID * GRID], on every patch of the cell: [n, PATCHES]."""
    board = cells.view(-1, GRID, GRID)
    return board.repeat_interleave(PER_CELL, 1).repeat_interleave(PER_CELL, 2).flatten(1)


def make_targets(samples: Samples) -> Targets:
    """Labels from the scenes."""
    s = samples.scenes
    n, device = len(s), s.cell.device
    slots = torch.arange(LONGEST_WORD, device=device)
    in_word = s.has_word[:, None] & (slots < s.word_length[:, None])

    def seen(classes: int, which: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(n, classes, device=device).scatter_reduce(
            1, which, where.float(), "amax"
        )

    presence = torch.cat(
        [
            seen(len(GLYPHS), s.glyph, s.present),
            seen(len(COLOURS), s.colour, s.present),
            seen(len(SHAPES), s.shape, s.present),
            seen(len(LETTERS), s.word, in_word),
            s.has_word[:, None].float(),
        ],
        1,
    )

    has_card = _spread(s.by_cell(torch.ones_like(s.cell), 0)) > 0
    on_card = (samples.covered > COVERED) & has_card
    per_card = {
        "letter": s.glyph,
        "colour": s.colour,
        "shape": s.shape,
        "row": s.cell // GRID,
        "column": s.cell % GRID,
    }
    for i, side in enumerate(NEIGHBOURS):
        letter = s.glyph.gather(1, s.neighbour[:, :, i])
        per_card[side] = torch.where(s.has_neighbour[:, :, i], letter, NONE)
    notes = {
        k: torch.where(on_card, _spread(s.by_cell(v, NONE)), NONE) for k, v in per_card.items()
    }
    notes |= _word_notes(samples, in_word)
    return Targets(presence, torch.stack([notes[k] for k in NOTES], 2))


def _word_notes(samples: Samples, in_word: Tensor) -> dict[str, Tensor]:
    """Letters of the word whose centres lie in a patch's columns, on the patch rows they touch."""
    s = samples.scenes
    device = s.cell.device
    slots = torch.arange(LONGEST_WORD, device=device)
    patch = torch.arange(PER_CELL, device=device)
    centre = s.word_x[:, None] + WORD_BOX[1] * slots + WORD_BOX[1] // 2
    hit = in_word[:, None, :] & (centre[:, None, :] // PATCH == patch[:, None])  # [n, column, slot]
    middle = s.word_y + WORD_BOX[0] // 2
    level = (patch * PATCH + PATCH // 2 - middle[:, None]).abs() < 10  # [n, row]
    first = hit.long().argmax(2)
    later = hit & (slots != first[:, :, None])

    def board(value: Tensor, where: Tensor) -> Tensor:
        """[n, column] on the patches of the word's cell."""
        cell = torch.where(where[:, None, :] & level[:, :, None], value[:, None, :], NONE)
        own = torch.zeros(len(s), GRID * GRID, dtype=torch.bool, device=device)
        own = _spread(own.scatter(1, s.word_cell[:, None], True))
        return torch.where(own, cell.repeat(1, GRID, GRID).flatten(1), NONE)

    return {
        "word_letter": board(s.word.gather(1, first), hit.any(2)),
        "word_second": board(s.word.gather(1, later.long().argmax(2)), later.any(2)),
    }


class TrainingHeads(nn.Module):
    """Heads for the three objectives; saved for resuming, never part of the exported model."""

    def __init__(self, tower_width: int, text_width: int) -> None:
        super().__init__()
        self.presence = nn.Linear(tower_width, CARD_PRESENCE + WORD_PRESENCE)
        self.patch = nn.Linear(tower_width, sum(NOTES[k].classes + 1 for k in PATCH_NOTES))
        mapped = [k for k, note in NOTES.items() if note.mapped]
        self.maps = nn.ModuleDict(
            {k: nn.Linear(text_width, text_width, bias=False) for k in mapped}
        )

    def presence_loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy; the word's letters weigh as much as all cards together."""
        loss = F.binary_cross_entropy_with_logits(
            self.presence(pooled).float(), labels, reduction="none"
        )
        return loss[:, :CARD_PRESENCE].mean() + loss[:, CARD_PRESENCE:].mean()

    def patch_loss(self, features: Tensor, notes: Tensor) -> Tensor:
        """Cross-entropy of every patch note; background counts a fifth, since most patches are."""
        logits = self.patch(features).float().flatten(0, 1)
        assert logits.shape[0] == notes.shape[0] * PATCHES
        parts = logits.split([NOTES[k].classes + 1 for k in PATCH_NOTES], 1)
        total = logits.new_zeros(())
        for name, part in zip(PATCH_NOTES, parts, strict=True):
            label = notes[:, :, list(NOTES).index(name)].flatten()
            nothing = NOTES[name].classes
            weight = torch.ones(nothing + 1, device=part.device)
            weight[-1] = 0.2
            label = torch.where(label == NONE, nothing, label)
            total = total + F.cross_entropy(part, label, weight=weight)
        return total

    def note_logits(self, name: str, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """Cosine x COSINE_SCALE of float32 visual tokens [m, width] and a note's words."""
        note = NOTES[name]
        words = embeddings[note.first_token : note.first_token + note.classes].float()
        if note.mapped:
            tokens = self.maps[name](tokens)
        return COSINE_SCALE * F.normalize(tokens, dim=-1) @ F.normalize(words, dim=-1).t()

    def alignment(self, tokens: Tensor, embeddings: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
        """Alignment of projected tokens [n, PATCHES, width].

        Returns the loss, and the share of right notes, float32 [len(NOTES)] (0 where none is due).
        """
        told = (notes != NONE).any(2)
        tokens, notes = tokens[told].float(), notes[told]
        total = tokens.new_zeros(())
        right = []
        with torch.autocast(tokens.device.type, enabled=False):  # cosines need their precision
            for i, name in enumerate(NOTES):
                label = notes[:, i]
                due = (label != NONE).sum().clamp_min(1)
                logits = self.note_logits(name, tokens, embeddings)
                loss = F.cross_entropy(logits, label, ignore_index=NONE, reduction="sum") / due
                total = total + (1.0 if NOTES[name].mapped else 2.0) * loss
                right.append((logits.argmax(1) == label).sum() / due)
        return total, torch.stack(right)
