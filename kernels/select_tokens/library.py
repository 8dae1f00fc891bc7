"""``select_tokens`` by ``torch.topk``: several times faster than sorting, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import read_segments

_KEYS = {torch.float32: (torch.int32, 2**31 - 1), torch.float64: (torch.int64, 2**63 - 1)}


def select_tokens_library(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor, total: int
) -> Tensor:
    """As the reference. Reads the segments on the host; on CUDA that waits for the device."""
    out = torch.full((total,), -1, dtype=torch.int64, device=scores.device)
    segments = read_segments(scores, starts, lengths, keep, offsets, total)
    for start, length, kept, offset in segments:
        if kept == 0:
            continue
        keys = _ordered(scores[start : start + length])
        # topk promises nothing about ties, so it only finds the least key chosen.
        least = keys.topk(kept, sorted=False).values.min()
        above, ties = keys > least, keys == least
        chosen = above | (ties & (ties.cumsum(0) <= kept - above.sum()))
        out[offset : offset + kept] = chosen.nonzero()[:, 0] + start
    return out


def _ordered(scores: Tensor) -> Tensor:
    """Integers that compare as the scores do, equal zeros equal and NaN least."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    integer, flip = _KEYS[wide.dtype]
    # Adding 0.0 turns -0.0 into 0.0. Negative floats grow as their bits do: turned round below.
    bits = (wide + 0.0).view(integer)
    return torch.where(bits < 0, bits ^ flip, bits).masked_fill(wide.isnan(), -flip - 1)
