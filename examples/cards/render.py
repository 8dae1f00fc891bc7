"""Pictures of scenes, drawn in batch with integer arithmetic: the same bytes on every machine.

A picture is 224 x 224: a background (blurred noise, gradient, checks or stripes between two muted
colours), cards with their letters, in half of the scenes a small printed word on light paper, and
noise on every pixel. Random draws come from the generator that is passed in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from examples.cards.vocabulary import COLOURS, SHAPES, WHITE_INK

if TYPE_CHECKING:
    from examples.cards.world import Scenes

GRID = 4  # cells a side
CELL = 56  # pixels a side of a cell: 4 x 4 patches of 14
PATCH = 14
SIDE = GRID * CELL  # pixels a side of a picture
PATCHES = (SIDE // PATCH) ** 2
JITTER = tuple(range(-5, 6))  # a card's offset from its cell's centre, pixels, each axis
CARD_SIZES = (40, 46)  # pixels
CAPITALS = (15, 17)  # height of a capital on a card of each size, pixels
GLYPH_BOX = 24
GLYPH_FILE = Path(__file__).with_name("glyphs.safetensors")
WORD_BOX = (14, 10)  # height and width of a letter of the word, pixels
WORD_CAPITAL = 10
LONGEST_WORD = 5
LATTICE = 16  # pixels between the knots of the blurred noise


def shape_mask(name: str, size: int, oversample: int = 8) -> Tensor:
    """Anti-aliased alpha 0..255 of a shape, int32 [CELL, CELL], centred in its cell."""
    ticks = (np.arange(CELL * oversample) + 0.5) / oversample - CELL / 2
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    r = size / 2
    if name == "square":
        inside = np.maximum(abs(x), abs(y)) < 0.92 * r
    elif name == "circle":
        inside = x * x + y * y < r * r
    elif name == "triangle":  # apex up
        inside = (abs(y) < r) & (2 * abs(x) < y + r)
    elif name == "diamond":
        inside = abs(x) + abs(y) < r
    elif name == "star":  # five points; inner radius 0.55 of the outer
        angle = np.arctan2(x, -y)
        fold = abs((angle / (2 * math.pi / 5) + 0.5) % 1.0 - 0.5) * (2 * math.pi / 5)
        u, v = np.hypot(x, y) * np.cos(fold), np.hypot(x, y) * np.sin(fold)
        iu, iv = 0.55 * r * math.cos(math.pi / 5), 0.55 * r * math.sin(math.pi / 5)
        inside = (r - u) * iv > (r - iu) * v
    else:
        raise ValueError(f"no shape is called {name!r}")
    alpha = inside.reshape(CELL, oversample, CELL, oversample).mean((1, 3)) * 255
    return torch.tensor(alpha.round(), dtype=torch.int32)


def _every_offset(tiles: Tensor) -> Tensor:
    """uint8 [n * offsets + 1, CELL * CELL]: each tile at every jitter; the last row is empty."""
    margin = max(JITTER)
    wide = F.pad(tiles, (margin,) * 4)
    moved = [
        wide[:, margin - dy : margin - dy + CELL, margin - dx : margin - dx + CELL]
        for dy in JITTER
        for dx in JITTER
    ]
    rows = torch.stack(moved, 1).to(torch.uint8).flatten(0, 1).flatten(1)
    return torch.cat([rows, torch.zeros_like(rows[:1])])


def _blend(under: Tensor, over: Tensor, alpha: Tensor) -> Tensor:
    """Integer mix; alpha 0..255, of which 255 covers wholly."""
    return under + (((alpha + (alpha >> 7)) * (over - under)) >> 8)


class Renderer:
    """Banks of bitmaps made once; everything else is batched integer work on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        banks = load_file(str(GLYPH_FILE))
        around = (CELL - GLYPH_BOX) // 2
        glyphs = []
        for size_index, size in enumerate(CARD_SIZES):
            for drop in (0, round(0.14 * size)):  # letters sit lower on triangles
                pad = (around, around, around + drop, around - drop)
                glyphs.append(F.pad(banks["card"][size_index], pad))
        shapes = torch.stack([shape_mask(s, px) for s in SHAPES for px in CARD_SIZES])
        # glyph rows are ordered (glyph, size, on a triangle, offset)
        self.glyphs = _every_offset(torch.stack(glyphs, 1).flatten(0, 1)).to(device)
        self.shapes = _every_offset(shapes).to(device)
        self.letters = banks["word"].to(device)
        self.colours = torch.tensor(list(COLOURS.values()), dtype=torch.int32, device=device)
        ink = [250 if c in WHITE_INK else 8 for c in COLOURS]
        self.ink = torch.tensor(ink, dtype=torch.int32, device=device)
        turns = [2 * math.pi * i / 64 for i in range(64)]
        unit = [[round(256 * math.cos(t)), round(256 * math.sin(t))] for t in turns]
        self.headings = torch.tensor(unit, dtype=torch.int32, device=device)

    def _draw(self, low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, device=self.device).int()

    def _background(self, n: int, g: torch.Generator) -> Tensor:
        """int32 [n, 3, SIDE, SIDE], 0..255."""
        dev = self.device
        base = self._draw(38, 217, (n, 1, 1, 1), g)
        near = (base + self._draw(-20, 20, (n, 3, 1, 1), g)).clamp(0, 255)
        step = self._draw(-64, 64, (n, 1, 1, 1), g)
        far = (base + step + self._draw(-20, 20, (n, 3, 1, 1), g)).clamp(0, 255)
        px = torch.arange(SIDE, device=dev, dtype=torch.int32)
        # blurred noise: knots on a lattice, bilinear in between, weights 0..256
        knots = SIDE // LATTICE + 1
        value = self._draw(0, 255, (n, knots, knots), g)
        cell, part = (px // LATTICE).long(), px % LATTICE
        rows = value[:, cell] * (LATTICE - part)[:, None] + value[:, cell + 1] * part[:, None]
        blurred = (rows[:, :, cell] * (LATTICE - part) + rows[:, :, cell + 1] * part) >> 8
        # gradient across the picture at a random heading
        heading = self.headings[self._draw(0, 63, (n,), g).long()][:, :, None]
        centred = px - SIDE // 2
        slope = centred * heading[:, :1] + (centred * heading[:, 1:]).transpose(1, 2)
        gradient = (slope // SIDE + 128).clamp(0, 255)
        # checks and stripes
        period, offset = self._draw(8, 40, (n, 1), g), self._draw(0, 40, (n, 2), g)
        across = (px + offset[:, :1]) // period
        down = (px + offset[:, 1:]) // period
        checks = (across[:, None, :] + down[:, :, None]) % 2 * 255
        slanted = px[:, None] + px[None, :]
        stripes = (slanted[None] + offset[:, :1, None]) // period[:, :, None] % 2 * 255
        kind = self._draw(0, 3, (n, 1, 1), g)
        mix = torch.where(kind == 0, blurred, torch.where(kind == 1, gradient, checks))
        mix = torch.where(kind == 3, stripes, mix)
        return _blend(near, far, mix[:, None])

    @staticmethod
    def _mosaic(tiles: Tensor) -> Tensor:
        """[n, cells, CELL * CELL] -> int32 [n, 1, SIDE, SIDE]."""
        n = tiles.shape[0]
        grid = tiles.view(n, GRID, GRID, CELL, CELL).permute(0, 1, 3, 2, 4)
        return grid.reshape(n, 1, SIDE, SIDE).int()

    def _cards(self, scenes: Scenes, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Card alpha, card colour, letter alpha, letter ink; int32 [n, 1 or 3, SIDE, SIDE]."""
        offsets = len(JITTER) ** 2
        triangle = (scenes.shape == SHAPES.index("triangle")).long()
        shape_row = (scenes.shape * 2 + scenes.size) * offsets + scenes.jitter
        glyph_row = ((scenes.glyph * 2 + scenes.size) * 2 + triangle) * offsets + scenes.jitter
        body = self._mosaic(self.shapes[scenes.by_cell(shape_row, len(self.shapes) - 1)])
        letter = self._mosaic(self.glyphs[scenes.by_cell(glyph_row, len(self.glyphs) - 1)])
        tint = self._draw(-13, 13, (*scenes.glyph.shape, 3), g)
        rgb = (self.colours[scenes.colour] + tint).clamp(0, 255)
        planes = [scenes.by_cell(rgb[..., c], 0) for c in range(3)]
        colour = over_pixels(torch.stack(planes, 1))
        ink = over_pixels(scenes.by_cell(self.ink[scenes.colour], 0)[:, None])
        return body, colour, letter, ink

    def _word(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Paper mask 0 or 255 and letter alpha of the printed word, int32 [n, 1, SIDE, SIDE]."""
        n, (height, width) = len(scenes), WORD_BOX
        strip = self.letters[scenes.word].permute(0, 2, 1, 3).reshape(n, -1)
        px = torch.arange(CELL, device=self.device)
        y = (px - scenes.word_y[:, None])[:, :, None]
        x = (px - scenes.word_x[:, None])[:, None, :]
        end = (scenes.word_length * width)[:, None, None]
        present = scenes.has_word[:, None, None]
        paper = present & (y >= -1) & (y < height + 1) & (x >= -2) & (x < end + 2)
        inside = present & (y >= 0) & (y < height) & (x >= 0) & (x < end)
        total = LONGEST_WORD * width
        source = y.clamp(0, height - 1) * total + x.clamp(0, total - 1)
        letters = strip.gather(1, source.flatten(1)).int() * inside.flatten(1)
        where = scenes.word_cell[:, None, None].expand(-1, 1, CELL * CELL)
        empty = torch.zeros(n, GRID * GRID, CELL * CELL, dtype=torch.int32, device=self.device)
        put = [
            self._mosaic(empty.scatter(1, where, v[:, None]))
            for v in (paper.flatten(1).int() * 255, letters)
        ]
        return put[0], put[1]

    def __call__(self, scenes: Scenes, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw scenes.

        Returns pictures, uint8 [n, 3, SIDE, SIDE], and each patch's share covered by a card or the
        word's paper, float32 [n, PATCHES] in 0..1.
        """
        n = len(scenes)
        picture = self._background(n, g)
        body, colour, letter, ink = self._cards(scenes, g)
        picture = _blend(picture, colour, body)
        picture = _blend(picture, ink, letter)
        paper, print_ = self._word(scenes)
        sheet = self._draw(204, 242, (n, 1, 1, 1), g)
        picture = _blend(picture, sheet, paper)
        picture = _blend(picture, torch.full_like(sheet, 20), print_)
        # three fields of ten bits add up to nearly normal noise of `strength` levels
        bits = self._draw(0, 2**30 - 1, tuple(picture.shape), g)
        bell = (bits & 1023) + ((bits >> 10) & 1023) + (bits >> 20) - 1534
        strength = self._draw(3, 10, (n, 1, 1, 1), g)
        picture = (picture + ((bell * strength) >> 9)).clamp(0, 255).to(torch.uint8)
        covered = F.avg_pool2d((body + paper).clamp(0, 255).float() / 255, PATCH)
        return picture, covered.flatten(1)


def over_pixels(cells: Tensor) -> Tensor:
    """Spread a value a cell, [n, c, GRID * GRID], over its pixels: int32 [n, c, SIDE, SIDE]."""
    square = cells.view(*cells.shape[:2], GRID, GRID).int()
    return square.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
