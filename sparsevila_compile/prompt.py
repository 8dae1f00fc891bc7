"""From processor outputs to rows of tokens: which placeholder is which picture, at which position.

This is the host-side glue around the graphs: it finds the pictures of a prompt, computes positions
on the full prompt, and lays out pruning budgets. Nothing here knows caches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsevila_compile import hf
from sparsevila_compile.digest import Digest
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Family, Modality
from sparsevila_compile.program import Program
from sparsevila_compile.prompt_checks import check_grid, check_ids, check_pixels, check_seconds


@dataclass
class Picture:
    """An image or a video of one prompt row.

    Attributes:
        start: index of its first placeholder in the row's ids.
        tokens: placeholders (visual tokens before pruning).
        frames: temporal steps; ``tokens`` is a multiple.
        pixels: ``[1, 3, H, W]``, or its patches ``[patches, values]``.
        grid: (time, height, width) in patches, or None.
        digest: identifies the pixels, so that a cached picture is known again.
        seconds: of a video, seconds a temporal step where they were given.
    """

    modality: Modality
    start: int
    tokens: int
    frames: int
    pixels: torch.Tensor
    grid: tuple[int, int, int] | None
    digest: Digest
    seconds: float | None = None


@dataclass
class Row:
    """One prompt of a batch, without padding.

    Attributes:
        ids: ``[n]``.
        place: computes the positions of the prompt and of one text token more, ``[axes, n + 1]``;
            called when they are first needed, so that a GPU can encode pictures meanwhile.
    """

    ids: torch.Tensor
    pictures: list[Picture]
    place: Callable[[], torch.Tensor]

    @functools.cached_property
    def _placed(self) -> torch.Tensor:
        return self.place()

    @property
    def positions(self) -> torch.Tensor:
        """``[axes, n]``, before pruning."""
        return self._placed[:, :-1]

    @property
    def next(self) -> int:
        """Position of the text token that would follow.

        Not always one past the largest: the time axis of a long video runs ahead of the text
        behind it.
        """
        return int(self._placed[0, -1])

    def settle(self) -> None:
        """Do what was put off: positions and digests."""
        _ = self._placed
        for picture in self.pictures:
            picture.digest.take()

    def visual(self) -> torch.Tensor:
        """Which ids are placeholders: bool ``[n]``."""
        mask = torch.zeros(len(self.ids), dtype=torch.bool)
        for picture in self.pictures:
            mask[picture.start : picture.start + picture.tokens] = True
        return mask


class PromptReader:
    """Reads processor outputs for one program."""

    def __init__(self, program: Program, family: Family) -> None:
        self.family = family
        self.layout = program.layout
        self.config = program.config
        self.tokens: dict[int, Modality] = {}
        for modality in family.modalities:
            name = modality.token
            value = self.config.get(name, self.config.get(name.replace("_id", "_index")))
            if value is None:
                raise UserError(f"config.json has no {name}; placeholders cannot be found")
            self.tokens[int(value)] = modality
        self._rope = hf.RopeIndex(self.config) if family.rope == "mrope" else None

    @property
    def known_inputs(self) -> set[str]:
        """Processor outputs that are understood."""
        names = {"input_ids", "attention_mask", "mm_token_type_ids", "second_per_grid_ts"}
        for modality in self.family.modalities:
            names |= {modality.pixels} | ({modality.grid} if modality.grid else set())
        return names

    def read(self, inputs: dict[str, Any]) -> list[Row]:
        """Split a batch into rows.

        Args:
            inputs: processor outputs: ``input_ids`` ``[batch, length]``, ``attention_mask`` (any
                padding side), pixels and grids; all pictures in prompt order.

        Raises:
            UserError: placeholders and pictures do not fit together.
        """
        vocabulary = int(self.config["text_config"]["vocab_size"])
        row_ids = check_ids(inputs, vocabulary, self.tokens)
        supplies: dict[str, list[Picture]] = {
            m.name: self._supply(m, inputs) for m in self.family.modalities
        }
        videos = len(supplies.get("video", ()))
        seconds = check_seconds(inputs.get("second_per_grid_ts"), videos)
        rows = []
        for ids in row_ids:
            pictures = self._pictures(ids, supplies)
            if seconds is not None:
                count = sum(p.modality.name == "video" for p in pictures)
                _time(pictures, seconds[:count])
                seconds = seconds[count:]
            rows.append(self._row(ids, pictures))
        for name, supply in supplies.items():
            if supply:
                raise UserError(
                    f"{len(supply)} more {name}s than placeholders in the prompt; put one "
                    f"placeholder for each {name} into the text"
                )
        return rows

    def continued(self, ids: torch.Tensor, pictures: list[Picture], new: Row) -> Row:
        """The whole prompt of which ``ids`` and ``pictures`` came before, and ``new`` follows.

        Raises:
            UserError: two pictures now stand side by side where this family cannot have that.
        """
        moved = [replace(p, start=p.start + len(ids)) for p in new.pictures]
        return self._row(torch.cat([ids, new.ids]), [*pictures, *moved])

    def _row(self, ids: torch.Tensor, pictures: list[Picture]) -> Row:
        if self._rope is not None and self._touching(pictures):
            raise UserError(
                "two pictures of one kind stand side by side without a token between them; this family separates them by vision_start and vision_end"
            )
        return Row(ids, pictures, functools.partial(self._positions, ids, pictures))

    def _supply(self, modality: Modality, inputs: dict[str, Any]) -> list[Picture]:
        pixels = inputs.get(modality.pixels)
        if pixels is None:
            return []
        vision = self.config["vision_config"]
        pixels = check_pixels(modality, pixels, vision)
        parts: list[tuple[torch.Tensor, tuple[int, int, int] | None, int, int]] = []
        if modality.grid is None:
            count = self.layout.tokens_per_picture or 0
            parts = [(pixels[i : i + 1], None, count, 1) for i in range(len(pixels))]
        else:
            merge = int(vision["spatial_merge_size"])
            start = 0
            for grid in check_grid(modality, inputs.get(modality.grid), len(pixels), merge):
                size = grid[0] * grid[1] * grid[2]
                part = pixels[start : start + size]
                parts.append((part, grid, size // self.layout.merge_unit, grid[0]))
                start += size
        return [
            Picture(modality, -1, tokens, frames, part, shape, Digest(part, repr(shape)))
            for part, shape, tokens, frames in parts
        ]

    def _pictures(self, ids: torch.Tensor, supplies: dict[str, list[Picture]]) -> list[Picture]:
        found = []
        i, listed = 0, ids.tolist()
        while i < len(listed):
            modality = self.tokens.get(listed[i])
            if modality is None:
                i += 1
                continue
            supply = supplies[modality.name]
            if not supply:
                raise UserError(
                    f"more placeholders than {modality.name}s: token {i} of the prompt stands for "
                    f"{'an' if modality.name == 'image' else 'a'} {modality.name} that was not given"
                )
            picture = supply.pop(0)
            run = listed[i : i + picture.tokens]
            if run.count(listed[i]) < picture.tokens:
                have = next((k for k, t in enumerate(run) if t != listed[i]), len(run))
                raise UserError(
                    f"{modality.name} needs {picture.tokens} placeholders, the prompt has {have} at "
                    f"token {i}; let the processor expand them"
                )
            picture.start = i
            found.append(picture)
            i += picture.tokens
        return found

    def _positions(self, ids: torch.Tensor, pictures: list[Picture]) -> torch.Tensor:
        """Positions on the full prompt and of one text token more, as transformers numbers them.

        Returns ``[axes, n + 1]``.
        """
        if self._rope is None or not pictures:
            return torch.arange(len(ids) + 1).expand(1 if self._rope is None else 3, -1)
        kinds = {"image": 1, "video": 2}
        types = torch.zeros(1, len(ids) + 1, dtype=torch.int64)
        grids: dict[str, list[Any]] = {"image": [], "video": []}
        for p in pictures:
            types[0, p.start : p.start + p.tokens] = kinds[p.modality.name]
            grids[p.modality.name].append(p.grid)
        image, video = (torch.tensor(grids[k]) if grids[k] else None for k in ("image", "video"))
        longer = torch.cat([ids, ids.new_zeros(1)])
        timed = [p.seconds for p in pictures if p.seconds is not None]
        steps = torch.tensor(timed) if timed else None
        return self._rope(longer[None], types, image, video, steps)[:, 0]

    @staticmethod
    def _touching(pictures: list[Picture]) -> bool:
        return any(
            a.start + a.tokens == b.start and a.modality is b.modality
            for a, b in itertools.pairwise(pictures)
        )


def _time(pictures: list[Picture], seconds: list[float]) -> None:
    """A video played at another speed is another video: its positions differ."""
    videos = [p for p in pictures if p.modality.name == "video"]
    for video, step in zip(videos, seconds, strict=True):
        video.seconds = step
        video.digest.add(repr(step))


def compact_positions(
    positions: torch.Tensor, kept: torch.Tensor, pictures: list[Picture], first: int
) -> torch.Tensor:
    """Positions after pruning, moved together.

    Text counts on by one. A picture's kept tokens get, on each axis, the rank of their coordinate
    among those kept: contiguous numbers in 1-D, the smallest regular grid that holds them in mRoPE
    (SparseVILA, section on positions). What follows starts one past the largest.

    Args:
        positions: ``[axes, n]`` of the tokens before pruning.
        kept: bool ``[n]``.
        pictures: with ``start`` relative to ``positions``.
        first: position of the first token.

    Returns:
        ``[axes, kept.sum()]``.
    """
    axes = positions.shape[0]
    parts: list[torch.Tensor] = []
    at, cursor = 0, first

    def text(end: int) -> None:
        nonlocal at, cursor
        count = end - at
        if count > 0:
            parts.append(torch.arange(cursor, cursor + count).expand(axes, -1))
            cursor += count
        at = max(at, end)

    for picture in pictures:
        text(picture.start)
        span = slice(picture.start, picture.start + picture.tokens)
        mine = positions[:, span][:, kept[span]]
        ranks = [torch.unique(axis, return_inverse=True)[1] for axis in mine]
        if mine.shape[1]:
            parts.append(torch.stack(ranks) + cursor)
            cursor += 1 + max(int(r.max()) for r in ranks)
        at = picture.start + picture.tokens
    text(positions.shape[1])
    return torch.cat(parts, dim=1) if parts else positions[:, :0]
