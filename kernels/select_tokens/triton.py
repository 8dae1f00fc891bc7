"""``select_tokens`` in Triton: radix selection, then ordered compaction; integers throughout.

Short segments have one program each, which does everything (``_select``). Long ones are shared by
several programs: four launches of ``_count`` find the least key chosen, eight bits at a time, each
from the counts that the launch before it left, and ``_write`` puts the chosen indices in place.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from ..triton_support import Reason, check_launch, next_power_of_2, on_device, tl, triton
from .reference import check_arguments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PART = 4096
"""Scores of a segment from which on another program shares it."""
_MOST_PARTS = 32
_MOST_PROGRAMS = 256
"""Many segments are split into fewer parts each: five launches of more programs take longer."""


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
def _bounds(starts, lengths, keep, segment, count):
    """First score, length and number to keep of a segment.

    Out-of-range segments are the caller's fault; they must not become out-of-range accesses.
    """
    start = tl.load(starts + segment).to(tl.int64)
    length = tl.minimum(tl.load(lengths + segment).to(tl.int64), count - start)
    length = tl.where(start >= 0, length, 0).to(tl.int32)
    kept = tl.minimum(tl.load(keep + segment).to(tl.int64), length).to(tl.int32)
    return start, length, kept


@triton.jit
@no_type_check
def _count_digits(scores, stride, start, first, end, least, shift, BLOCK: tl.constexpr):
    """How many keys of a range have each value of the 8 bits at ``shift``, [256].

    Only those whose bits above are ``least``'s.
    """
    counts = tl.zeros([256], tl.int32)
    for n0 in range(first, end, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        key = _load_keys(scores, stride, start + n, n < end)
        # Two shifts: a shift by all 32 bits at once is undefined.
        alike = ((key ^ least) >> shift) >> 8 == 0
        digit = ((key >> shift) & 255).to(tl.int32)
        counts += tl.histogram(digit, 256, mask=alike & (n < end))
    return counts


@triton.jit
@no_type_check
def _settle(counts, least, wanted, shift):
    """The next 8 bits of the least key chosen: (them, ``least`` with them, how many of the keys
    that share these bits are still wanted)."""
    digits = tl.arange(0, 256)
    at_least = tl.cumsum(counts, 0, reverse=True)
    highest = tl.max(tl.where(at_least >= wanted, digits, 0), 0)
    wanted -= tl.sum(tl.where(digits > highest, counts, 0), 0)
    return highest, least | (highest.to(tl.uint32) << shift), wanted


@triton.jit
@no_type_check
def _compact(
    scores, stride, start, first, end, least, wanted, out, offset, total, BLOCK: tl.constexpr
):
    """Writes the indices of all keys above ``least`` and of the first ``wanted`` equal to it."""
    written = tl.zeros([], tl.int32)
    for n0 in range(first, end, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        key = _load_keys(scores, stride, start + n, n < end)
        tie = ((key == least) & (n < end)).to(tl.int32)
        among = tl.cumsum(tie, 0) <= wanted
        chosen = ((key > least) & (n < end)).to(tl.int32) + tl.where(among, tie, 0)
        slot = offset + written + tl.cumsum(chosen, 0) - 1
        tl.store(out + slot, start + n, mask=(chosen > 0) & (slot >= 0) & (slot < total))
        written += tl.sum(chosen, 0)
        wanted -= tl.sum(tie, 0)


@triton.jit(do_not_specialize=["count", "total"])
@no_type_check
def _select(scores, starts, lengths, keep, offsets, out, stride, count, total, BLOCK: tl.constexpr):
    """One segment, by one program."""
    segment = tl.program_id(0)
    start, length, wanted = _bounds(starts, lengths, keep, segment, count)
    offset = tl.load(offsets + segment).to(tl.int64)
    if wanted <= 0:
        return
    least = tl.zeros([], tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = _count_digits(scores, stride, start, 0, length, least, shift, BLOCK)
        _, least, wanted = _settle(counts, least, wanted, shift)
    _compact(scores, stride, start, 0, length, least, wanted, out, offset, total, BLOCK)


@triton.jit
@no_type_check
def _fill(out, total, part, parts, BLOCK: tl.constexpr):
    """-1 in one of ``parts`` equal parts of ``out``."""
    per = tl.cdiv(total, parts)
    for i0 in range(0, per, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = part.to(tl.int64) * per + i
        tl.store(out + at, tl.full([BLOCK], -1, tl.int64), mask=(i < per) & (at < total))


@triton.jit
@no_type_check
def _all_counts(counts, segment, PARTS: tl.constexpr):
    """[PARTS, 256] counts of all parts of a segment."""
    part, digit = tl.arange(0, PARTS), tl.arange(0, 256)
    row = segment.to(tl.int64) * PARTS + part
    return tl.load(counts + row[:, None] * 256 + digit[None, :])


@triton.jit(do_not_specialize=["count", "total"])
@no_type_check
def _count(
    scores,
    starts,
    lengths,
    keep,
    counts,
    new_counts,
    state,
    above,
    out,
    stride,
    count,
    total,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """new_counts[segment, part, 256] of the 8 bits of STEP, the highest first.

    state[segment, STEP] receives the bits of the least key chosen known by now and how many keys
    that share them are wanted; above[segment, part], how many keys are chosen for sure.
    """
    part, segment = tl.program_id(0), tl.program_id(1)
    start, length, wanted = _bounds(starts, lengths, keep, segment, count)
    row = segment.to(tl.int64) * PARTS + part
    least = tl.zeros([], tl.uint32)
    if STEP == 0:
        _fill(out, total, segment * PARTS + part, tl.num_programs(1) * PARTS, BLOCK)
    else:
        before = state + (segment.to(tl.int64) * 4 + STEP - 1) * 2
        least = tl.load(before).to(tl.uint32, bitcast=True)
        wanted = tl.load(before + 1)
        sums = tl.sum(_all_counts(counts, segment, PARTS), 0)
        highest, least, wanted = _settle(sums, least, wanted, 32 - 8 * STEP)
        digits = tl.arange(0, 256)
        mine = tl.load(counts + row * 256 + digits)
        sure = tl.sum(tl.where(digits > highest, mine, 0), 0)
        if STEP > 1:
            sure += tl.load(above + row)
        tl.store(above + row, sure)
    if part == 0:
        after = state + (segment.to(tl.int64) * 4 + STEP) * 2
        tl.store(after, least.to(tl.int32, bitcast=True))
        tl.store(after + 1, wanted)
    per = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    first = tl.minimum(part * per, length)
    end = tl.minimum(first + per, length)
    found = _count_digits(scores, stride, start, first, end, least, 24 - 8 * STEP, BLOCK)
    tl.store(new_counts + row * 256 + tl.arange(0, 256), found)


@triton.jit(do_not_specialize=["count", "total"])
@no_type_check
def _write(
    scores,
    starts,
    lengths,
    keep,
    offsets,
    counts,
    state,
    above,
    out,
    stride,
    count,
    total,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chosen indices of one part of a segment, behind those of the parts before it."""
    part, segment = tl.program_id(0), tl.program_id(1)
    start, length, wanted = _bounds(starts, lengths, keep, segment, count)
    if wanted <= 0:
        return
    last = state + (segment.to(tl.int64) * 4 + 3) * 2
    found = _all_counts(counts, segment, PARTS)
    least = tl.load(last).to(tl.uint32, bitcast=True)
    highest, least, wanted = _settle(tl.sum(found, 0), least, tl.load(last + 1), 0)
    digits, parts = tl.arange(0, 256), tl.arange(0, PARTS)
    earlier = parts < part
    sure = tl.load(above + segment.to(tl.int64) * PARTS + parts)
    sure += tl.sum(tl.where(digits[None, :] > highest, found, 0), 1)
    ties = tl.sum(tl.where(digits[None, :] == highest, found, 0), 1)
    ties_before = tl.minimum(tl.sum(tl.where(earlier, ties, 0), 0), wanted)
    offset = tl.load(offsets + segment).to(tl.int64)
    offset += tl.sum(tl.where(earlier, sure, 0), 0) + ties_before
    per = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    first = tl.minimum(part * per, length)
    end = tl.minimum(first + per, length)
    wanted -= ties_before
    _compact(scores, stride, start, first, end, least, wanted, out, offset, total, BLOCK)


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
    if not (segments and total and scores.shape[0]):
        return torch.full((total,), -1, dtype=torch.int64, device=scores.device)
    starts, lengths, keep, offsets = (x.contiguous() for x in (starts, lengths, keep, offsets))
    sizes = (scores.stride(0), scores.shape[0], total)
    mean = scores.shape[0] // segments
    parts = min(_MOST_PARTS, next_power_of_2(mean // _PART))
    while parts > 1 and parts * segments > _MOST_PROGRAMS:
        parts //= 2
    with on_device(scores):
        if parts == 1:
            out = torch.full((total,), -1, dtype=torch.int64, device=scores.device)
            block = min(4096, max(256, next_power_of_2(mean)))
            _select[(segments,)](
                *(scores, starts, lengths, keep, offsets, out, *sizes),
                BLOCK=block,
                num_warps=max(4, block // 512),
            )
            return out
        out = torch.empty((total,), dtype=torch.int64, device=scores.device)

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=scores.device)

        counts = integers(2, segments, parts, 256)
        state, above = integers(segments, 4, 2), integers(segments, parts)
        tiles = {"PARTS": parts, "BLOCK": _PART // 2, "num_warps": 8}
        for step in range(4):
            left, new = counts[(step + 1) % 2], counts[step % 2]
            _count[(parts, segments)](
                *(scores, starts, lengths, keep, left, new, state, above, out, *sizes),
                STEP=step,
                **tiles,
            )
        _write[(parts, segments)](
            *(scores, starts, lengths, keep, offsets, counts[1], state, above, out, *sizes), **tiles
        )
    return out
