"""``select_tokens`` in Triton: one program per segment, radix selection, ordered compaction."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from ..triton_support import Reason, check_launch, next_power_of_2, on_device, tl, triton
from .reference import check_arguments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_supports(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor, total: int
) -> Reason:
    """Why the kernel cannot take these arguments, or None."""
    if scores.dtype not in _DTYPES:
        return f"needs half or float32 scores, not {scores.dtype}"
    return None


@triton.jit
@no_type_check
def _load_keys(scores, stride, n, inside):
    """Unsigned integers that compare as the scores do, equal zeros equal, NaN 0 and so least."""
    x = tl.load(scores + n * stride, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    # Sign set: all bits turned, more negative is less. Sign clear: the sign bit set, above those.
    key = bits ^ ((bits >> 31) | -0x80000000)
    return tl.where(x == x, key, 0).to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def _select(
    scores,
    starts,
    lengths,
    keep,
    offsets,
    out,
    stride,
    count,
    total,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(starts + segment).to(tl.int64)
    # Out-of-range segments are the caller's fault; they must not become out-of-range accesses.
    length = tl.minimum(tl.load(lengths + segment).to(tl.int64), count - start)
    length = tl.where(start >= 0, length, 0).to(tl.int32)
    kept = tl.minimum(tl.load(keep + segment).to(tl.int64), length).to(tl.int32)
    offset = tl.load(offsets + segment).to(tl.int64)
    if kept <= 0:
        return

    # The kept-th highest key, eight bits at a time from the top: `least` holds the bits found so
    # far, `wanted` how many of the keys that share them are still to be chosen.
    digits = tl.arange(0, 256)
    least = tl.zeros([], tl.uint32)
    wanted = kept
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for n0 in range(0, length, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            key = _load_keys(scores, stride, start + n, n < length)
            # Two shifts: a shift by all 32 bits at once is undefined.
            alike = ((key ^ least) >> shift) >> 8 == 0
            digit = ((key >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=alike & (n < length))
        at_least = tl.cumsum(counts, 0, reverse=True)
        highest = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
        wanted -= tl.sum(tl.where(digits > highest, counts, 0), 0)
        least = least | (highest.to(tl.uint32) << shift)

    # Everything above, and the first `wanted` that are equal.
    written = 0
    for n0 in range(0, length, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        key = _load_keys(scores, stride, start + n, n < length)
        tie = ((key == least) & (n < length)).to(tl.int32)
        first = tl.cumsum(tie, 0) <= wanted
        chosen = ((key > least) & (n < length)).to(tl.int32) + tl.where(first, tie, 0)
        slot = offset + written + tl.cumsum(chosen, 0) - 1
        tl.store(out + slot, start + n, mask=(chosen > 0) & (slot >= 0) & (slot < total))
        written += tl.sum(chosen, 0)
        wanted -= tl.sum(tie, 0)


def select_tokens_triton(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor, total: int
) -> Tensor:
    """As the reference, without reading any value on the host. Integers only: always the same.

    Raises:
        ValueError: wrong ranks or dtypes, or tensors of unequal length.
    """
    check_arguments(scores, starts, lengths, keep, offsets)
    reason = triton_supports(scores, starts, lengths, keep, offsets, total)
    if reason is not None:
        raise ValueError(f"select_tokens/triton: {reason}")
    segments = starts.shape[0]
    if any(x.shape[0] != segments for x in (lengths, keep, offsets)):
        raise ValueError("select_tokens: starts, lengths, keep and offsets differ in length")
    check_launch("select_tokens", scores)
    out = torch.full((total,), -1, dtype=torch.int64, device=scores.device)
    if segments and total and scores.shape[0]:
        block = min(8192, max(256, next_power_of_2(scores.shape[0] // segments)))
        with on_device(scores):
            _select[(segments,)](
                scores,
                *(x.contiguous() for x in (starts, lengths, keep, offsets)),
                out,
                scores.stride(0),
                scores.shape[0],
                total,
                BLOCK=block,
                num_warps=max(4, block // 512),
            )
    return out
