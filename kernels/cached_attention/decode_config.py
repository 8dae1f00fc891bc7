"""How decode attention is cut into programs and tiles: a plain function of shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..triton_support import cdiv, next_power_of_2, processors

MAX_SPLITS = 256
_TILE_BYTES = 16384


@dataclass(frozen=True)
class Config:
    """How a call is cut.

    block_n: keys a tile; warps: of a program; stages: of the loop over tiles, 1 for one tile read
    through registers; splits: shares of a group's keys; run: neighbouring slots of the index that
    stay together when slots are dealt out.
    """

    block_n: int
    warps: int
    stages: int
    splits: int
    run: int = 8


def slots_of_a_share(indexed: int, splits: int, run: int) -> int:
    """Slots of the index to a program at most."""
    return cdiv(indexed, splits * run) * run


def _tile_memory(device: torch.device) -> int:
    """Bytes for tiles: what a program may have, less the little that is not tiles."""
    if device.type != "cuda":
        return 220 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 8192


def _splits(groups: int, tiles: int, at_least: float, processors_: int) -> int:
    """How many shares a group's keys are cut into, none without a tile at full cache.

    Those that keep most processors at work, when the fullest gets ceil(programs / processors);
    another program a processor must gain 3 %. From ``at_least`` to five programs a processor.
    """

    def worth(shares: int) -> float:
        programs = groups * shares
        each = cdiv(programs, processors_)
        return round(programs / (each * processors_) - 0.03 * each, 3)

    most = max(1, min(tiles, 5 * processors_ // groups, MAX_SPLITS))
    fewest = min(math.ceil(at_least * processors_ / groups), most)
    return max(range(fewest, most + 1), key=lambda shares: (worth(shares), -shares))


def configure(
    batch: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, keys: int, indexed: bool,
    device: torch.device,
) -> Config:  # fmt: skip
    """Measured on an H200 (2026-11). ``keys``: slots of the index, or else capacity of the cache."""
    count, groups = processors(device), batch * kv_heads
    row = max(128, next_power_of_2(dim) * dtype.itemsize)
    block_n = _TILE_BYTES // row
    if dtype == torch.float32:
        return Config(block_n, 4, 2, _splits(groups, cdiv(keys, block_n), 0.9, count))
    # A group of more than eight query heads takes wgmma, whose operands are held a tile longer.
    stages = min(4, _tile_memory(device) // (2 * _TILE_BYTES) + (group <= 8))
    if not indexed:  # one program a processor, with as many tiles under way as go in
        return Config(block_n, 4, stages, _splits(groups, cdiv(keys, block_n), 0.9, count))
    if group <= 8:
        # If a share is one tile, its way through registers is shorter than through a pipeline; and
        # the fewer the shares, the less there is to combine.
        for programs, block in (
            (count, block_n),
            (count, 2 * block_n),
            (2 * count, block_n),
            (2 * count, 2 * block_n),
            (3 * count, 2 * block_n),
        ):
            splits = min(programs // groups, MAX_SPLITS)
            if splits > 0 and slots_of_a_share(keys, splits, Config.run) + Config.run <= block:
                return Config(block, 4, 1, splits)
    return Config(block_n, 4, min(stages, 3), _splits(groups, cdiv(keys, block_n), 1.5, count))
