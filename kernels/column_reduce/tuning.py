"""Tile shapes of ``column_reduce``, by measurement on an H200, and how work is split."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..triton_support import cdiv, next_power_of_2
from .tiles import split_dim

Tile = dict[str, int]
"""Constants of a kernel: BLOCK_R, BLOCK_N, STAGES, maybe REGISTERS, and options of the launch."""


def is_hopper(device: torch.device) -> bool:
    """Whether tiles are Hopper's; the interpreter runs them too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def few_rows_of(columns: int) -> int:
    """Up to how many rows (times heads that share a key) are held while keys are streamed."""
    return min(1024, columns // 4)


def lse_tile(rows: int, dim: int, dtype: torch.dtype, hopper: bool) -> Tile:
    """First pass: ``BLOCK_R`` rows held, ``BLOCK_N`` keys loaded at a time."""
    if dtype == torch.float32 or dim > 128 or not hopper:
        return _plain_tile(rows, dim, dtype) | {"REGISTERS": 0}
    tile = {"BLOCK_R": 128, "BLOCK_N": 64, "STAGES": 3, "REGISTERS": 0, "num_warps": 4}
    return tile | ({"maxnreg": 128} if dim <= 80 else {})  # four programs a processor


def sums_tile(rows: int, dim: int, dtype: torch.dtype, hopper: bool) -> Tile:
    """Second pass: ``BLOCK_N`` columns held, ``BLOCK_R`` of the ``rows`` that see one loaded."""
    if dtype == torch.float32 or dim > 128 or not hopper:
        return _plain_tile(rows, dim, dtype) | {"REGISTERS": 0}
    tile = {"BLOCK_R": 64, "BLOCK_N": 128, "num_warps": 4}
    if rows < 1024:
        return tile | {"STAGES": 2, "REGISTERS": 0}
    # Putting the columns into registers pays where it is done once for many rows. Triton 3.6 makes
    # wrong code of it, for reasons not found, where the second part is 32 wide (dims 81 to 96).
    return tile | {"STAGES": 3, "REGISTERS": int(split_dim(dim)[1] != 32)}


def few_rows_tile(rows: int, dim: int, dtype: torch.dtype, hopper: bool, gather: bool) -> Tile:
    """Second pass for few rows: ``BLOCK_R`` rows held, ``BLOCK_N`` columns loaded at a time."""
    if dtype == torch.float32 or dim > 128 or not hopper:
        return _plain_tile(rows, dim, dtype)
    # Where the columns' numbers are loaded first, half of the stages are theirs.
    return {"BLOCK_R": 128, "BLOCK_N": 64, "STAGES": 6 if gather else 4, "num_warps": 4}


def _plain_tile(rows: int, dim: int, dtype: torch.dtype) -> Tile:
    """What fits any GPU of compute capability 8.0 and up without spilling."""
    if dtype == torch.float32:  # full float32 products hold whole operands in registers
        block_r = min(32, max(16, next_power_of_2(rows)))
        return {
            "BLOCK_R": block_r,
            "BLOCK_N": 32 if dim <= 128 else 16,
            "STAGES": 1,
            "num_warps": 4,
        }
    return {"BLOCK_R": 64, "BLOCK_N": 64 if dim <= 128 else 32, "STAGES": 2, "num_warps": 4}


def resident(tile: Tile, held: str, dim: int) -> int:
    """Programs that a processor with 227 KB of shared memory runs at a time."""
    streamed = "BLOCK_N" if held == "BLOCK_R" else "BLOCK_R"
    values = tile[held] + tile["STAGES"] * tile[streamed]
    most = 2 if tile["num_warps"] > 4 else 3 if tile["REGISTERS"] else 4
    return max(1, min(most, 227 * 1024 // (2 * values * dim + 2048)))


@lru_cache
def splits_of(programs: int, blocks: int, slots: int, most: int) -> int:
    """Over how many parts of the loaded operand to spread each tile, ``most`` at most.

    Programs run ``slots`` at a time, each for as long as its blocks take and about three more.
    """

    def time(splits: int) -> int:
        return cdiv(programs * splits, slots) * (cdiv(blocks, splits) + 3)

    return min(range(1, min(most, max(1, blocks // 2)) + 1), key=time)
