"""When :mod:`.direct_rows` takes a linear, with what sizes, and its launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dependent_launch import launch_options
from ..triton_support import cdiv, next_power_of_2
from .direct_rows import direct_rows
from .mid_rows import sum_splits
from .stream import LONG, WIDE
from .stream_rows import layouts

STEPS = 16
"""Steps of a program at most: they are laid out one after the other."""


class DirectTiles(NamedTuple):
    """Sizes of :func:`.direct_rows.direct_rows`; named as there."""

    tokens: int  # A
    eights: int  # R
    warps: int
    splits: int
    ahead: bool

    @property
    def outputs(self) -> int:
        """Rows of the weight that a program takes."""
        return self.eights * self.tokens

    def share(self, groups: int) -> int:
        """Groups of a program."""
        return cdiv(groups, self.splits)

    def steps(self, groups: int) -> int:
        return cdiv(self.share(groups), self.warps * 8 // self.tokens)


def direct_tiles(rows: int, outputs: int, groups: int) -> DirectTiles | None:
    """Sizes for ``rows`` tokens and a weight of ``outputs`` rows of ``groups`` groups; measured.

    None where another kernel is faster, or there are too few outputs for a tile. Shorter rows of the
    weight are faster here too one linear at a time, but a decode step of long caches that took all of
    its linears so was slower: :mod:`.few_rows` and :mod:`.stream_rows` ask for theirs earlier.
    """
    tokens = next_power_of_2(rows)
    if tokens == 1 or outputs >= WIDE or groups < LONG:
        return None
    splits = {2: cdiv(groups, 32), 4: cdiv(groups, 80), 8: 8}[tokens]
    tiles = DirectTiles(tokens, 4 if tokens == 8 else 8, 4, splits, tokens == 8)
    return tiles if tiles.outputs <= outputs and tiles.steps(groups) <= STEPS else None


def direct(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: DirectTiles,
) -> None:
    """Launch with those sizes. All contiguous, the stored ones at multiples of 16 bytes."""
    outputs, groups = scales.shape
    rows, share = x.shape[0], tiles.share(groups)
    splits = cdiv(groups, share)
    columns = tiles.warps * 8 // tiles.tokens
    parts = out
    if splits > 1:
        parts = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
    held = layouts(tiles.tokens, tiles.eights, tiles.warps)
    direct_rows[(cdiv(outputs, tiles.outputs), splits)](
        x,
        qweight.view(torch.int16),
        scales,
        zero_points,
        out if bias is None else bias,
        parts,
        rows,
        outputs,
        x.stride(0),
        GROUPS=groups,
        SHARE=share,
        EVEN=groups == splits * share and share % columns == 0,
        FULL=rows == tiles.tokens,
        AHEAD=tiles.ahead,
        HAS_BIAS=bias is not None and splits == 1,
        A=tiles.tokens,
        R=tiles.eights,
        W=tiles.warps,
        CODES=held["CODES"],
        SCALES=held["SCALES"],
        TOKENS=held["TOKENS"],
        num_warps=tiles.warps,
        **launch_options(x.device),
    )
    if splits > 1:
        sum_splits(parts, bias, out)
