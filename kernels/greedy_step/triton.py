"""``greedy_step`` in Triton: each program finds the best of a stretch of logits, then one a row the rest.

Torch's operations for the same are a dozen launches a token, and its argmax reads a single row with
a few processors.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from ..dependent_launch import begin, launch_options, wait
from ..triton_support import Reason, cdiv, check_launch, next_power_of_2, on_device, tl, triton
from .reference import check_arguments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 2048


def triton_supports(
    logits: Tensor,
    tokens: Tensor,
    alive: Tensor,
    lens: Tensor,
    positions: Tensor,
    ends: Tensor,
    pad: Tensor,
) -> Reason:
    """Why the kernels cannot take these arguments, or None."""
    return None if logits.dtype in _DTYPES else f"needs half or float32, not {logits.dtype}"


@triton.jit
@no_type_check
def _best_of_stretch(
    logits,  # [B, V], rows stride apart
    best,  # float32 [B, STRETCHES]
    where,  # int32 [B, STRETCHES]
    V,
    stride,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row, stretch = tl.program_id(1).to(tl.int64), tl.program_id(0)
    v = stretch * BLOCK + tl.arange(0, BLOCK)
    wait(EARLY)
    value = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
    top, at = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    to = row * tl.num_programs(0) + stretch
    tl.store(best + to, top)
    tl.store(where + to, stretch * BLOCK + at)


@triton.jit
@no_type_check
def _advance(
    best,
    where,
    tokens,
    alive,
    lens,
    positions,
    ends,
    pad,
    stretches,
    n,
    tokens_stride,
    positions_stride,
    WIDTH: tl.constexpr,  # >= stretches
    ENDS: tl.constexpr,  # >= n
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i, e = tl.arange(0, WIDTH), tl.arange(0, ENDS)
    wait(EARLY)
    value = tl.load(best + row * stretches + i, mask=i < stretches, other=-float("inf"))
    # The first of equals: stretches are in order, and so is each one's first.
    chosen = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)[1]
    token = tl.load(where + row * stretches + chosen).to(tl.int64)
    lives = tl.load(alive + row)
    token = tl.where(lives != 0, token, tl.load(pad))
    ended = tl.max((tl.load(ends + e, mask=e < n, other=-1) == token).to(tl.int32) * (e < n), 0)
    place, at = positions + row * positions_stride, lens + row
    tl.store(place, tl.load(place) + lives)
    tl.store(at, tl.load(at) + lives)
    tl.store(tokens + row * tokens_stride, token)
    tl.store(alive + row, lives * (1 - ended))


def greedy_step_triton(
    logits: Tensor,
    tokens: Tensor,
    alive: Tensor,
    lens: Tensor,
    positions: Tensor,
    ends: Tensor,
    pad: Tensor,
) -> None:
    """As the reference; ``alive`` and ``lens`` must be contiguous."""
    check_arguments(logits, tokens, alive, lens, positions, ends, pad)
    check_launch("greedy_step", logits)
    if not alive.is_contiguous() or not lens.is_contiguous():
        raise ValueError("alive and lens must be contiguous")
    rows, vocabulary = logits.shape
    if not rows:
        return
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    stretches = cdiv(vocabulary, _BLOCK)
    best = torch.empty((rows, stretches), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, stretches), dtype=torch.int32, device=logits.device)
    early = launch_options(logits.device)
    with on_device(logits):
        _best_of_stretch[(stretches, rows)](
            logits, best, where, vocabulary, logits.stride(0), BLOCK=_BLOCK, num_warps=4, **early
        )
        _advance[(rows,)](
            best,
            where,
            tokens,
            alive,
            lens,
            positions,
            ends.contiguous(),
            pad,
            stretches,
            len(ends),
            tokens.stride(0),
            positions.stride(0),
            WIDTH=next_power_of_2(stretches),
            ENDS=next_power_of_2(len(ends)),
            num_warps=1,
            **early,
        )
