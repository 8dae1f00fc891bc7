"""When :mod:`.stream_rows` takes a linear, with what sizes, and its launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dependent_launch import launch_options
from ..gluon_support import descriptor, hopper_only
from ..triton_support import cdiv, next_power_of_2
from .stream_rows import GROUP, layouts, stream_rows

WIDE = 16384
"""Outputs from which on more than one row of x is worth it."""

LONG = 64
"""Groups from which on a row of the weight is too long for two rows of x."""

WARPS = 36
"""Warps of all programs for each processor, about half of which run at a time, for one row of x."""


class StreamTiles(NamedTuple):
    """Sizes of :func:`.stream_rows.stream_rows`; named as there."""

    tokens: int  # A
    eights: int  # R
    warps: int
    stages: int
    share: int

    @property
    def outputs(self) -> int:
        """Rows of the weight in a tile."""
        return self.eights * self.tokens


def stream_tiles(rows: int, outputs: int, groups: int, multiprocessors: int) -> StreamTiles | None:
    """Sizes for ``rows`` tokens and a weight of ``outputs`` rows of ``groups`` groups; measured.

    None where another kernel is faster, or there are too few outputs for a tile.
    """
    tokens = next_power_of_2(rows)
    if groups % 4:  # zero points are copied four at a time
        return None
    if tokens == 1:
        # Four warps take 32 groups at a time, unless that leaves many of the last ones idle.
        eights, warps = 8, 4 if 32 * cdiv(groups, 32) <= 1.2 * groups else 2
    elif outputs >= WIDE:
        eights, warps = {2: (8, 2), 4: (4, 2), 8: (4, 4)}[tokens]
    elif tokens == 2 and groups < LONG:
        eights, warps = 4, 4
    else:
        return None
    tile = eights * tokens
    if tile > outputs:
        return None
    programs = WARPS * multiprocessors // warps if tokens == 1 else cdiv(outputs, tile)
    share = min(outputs, tile * cdiv(outputs, tile * programs))
    return StreamTiles(tokens, eights, warps, 2, share)


def streams(device: torch.device, dtype: torch.dtype, group_size: int) -> bool:
    """Whether this kernel and :mod:`.direct_rows` run at all: else :mod:`.few_rows` does."""
    return (
        hopper_only(device) is None
        and dtype in (torch.bfloat16, torch.float16)
        and group_size == GROUP
    )


def stream(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: StreamTiles,
) -> None:
    """Launch with those sizes. All contiguous, the stored ones at multiples of 16 bytes."""
    outputs, groups = scales.shape
    codes = qweight.view(torch.int16)
    groups_of_tile = tiles.warps * 8 // tiles.tokens
    stream_rows[(cdiv(outputs, tiles.share),)](
        x,
        descriptor(codes, (tiles.outputs, 32 * groups_of_tile), plain=True),
        scales,
        zero_points,
        out if bias is None else bias,
        out,
        x.shape[0],
        outputs,
        x.stride(0),
        tiles.share,
        GROUPS=groups,
        HAS_BIAS=bias is not None,
        A=tiles.tokens,
        R=tiles.eights,
        W=tiles.warps,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        **layouts(tiles.tokens, tiles.eights, tiles.warps),
        **launch_options(x.device),
    )
