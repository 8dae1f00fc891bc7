"""What the kernels of ``column_reduce`` share: tiles of queries and keys, their product, segments.

The rows of the query heads that share a key head are one list, ``r = i * HEADS + h`` with the row
``i`` slow, so that a key is loaded once for the whole group. A head dim that is no power of two is
taken in two parts (80 = 64 + 16): the tensor cores then do no work for padding.
"""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import dot, next_power_of_2, tl, triton

SEGMENTS_AT_ONCE = 1024
"""Segments looked through at a time by a program that seeks its own."""

SIZES = [
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "batch", "rows", "keys", "width"),
    *("weights_batch", "weights_row", "columns_batch", "columns_row", "lse_group", "norm"),
    *("segments", "slots", "programs", "count", "batch_stride", "head", "row"),
]
"""Arguments by whose values Triton is not to compile anew: they change from prompt to prompt."""

LSE_UNIT = tl.constexpr(16)
"""Every group's log-sum-exps start at a multiple of this, so that they are copied in wide steps."""


def split_dim(dim: int) -> tuple[int, int]:
    """Widths, powers of two of at least 16 (or 0), of the two parts that hold ``dim`` values."""
    whole = max(16, next_power_of_2(dim))
    first = whole if whole in (dim, 16) else whole // 2
    second = max(16, next_power_of_2(dim - first)) if dim > first else 0
    return (whole, 0) if first + second >= whole else (first, second)


@triton.jit
@no_type_check
def first_of(b, batch_stride, head, head_stride, UNIT: tl.constexpr):
    """Offset of a batch entry's head, in 64 bits: strides are 32-bit numbers of units, which times
    UNIT may not be."""
    return (b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * UNIT


@triton.jit
@no_type_check
def step_of(stride, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """A stride in values. WIDE: in 64 bits, as is then whatever it is multiplied by."""
    if WIDE:
        step = stride.to(tl.int64) * UNIT
    else:
        step = stride * UNIT
    return step


@triton.jit
@no_type_check
def place(r, HEADS: tl.constexpr, head, row):
    """Offset of entry ``r`` of the list of rows: head ``r % HEADS`` and row ``r // HEADS``."""
    if HEADS == 1:
        return r * row
    return (r // HEADS) * row + (r % HEADS) * head


@triton.jit
@no_type_check
def load_part(
    base,
    offset,
    exists,
    stride,
    ALL: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[WIDTH, n]: values FIRST to FIRST + WIDTH of the n vectors at ``offset``, 0 beyond DIM.

    ALL: every vector exists, which is known beforehand: a loop over such tiles has no masks.
    """
    d = FIRST + tl.arange(0, WIDTH)
    pointers = base + offset[None, :] + d[:, None] * stride
    if FIRST + WIDTH <= DIM:
        if ALL:
            return tl.load(pointers)
        return tl.load(pointers, mask=exists[None, :], other=0.0)
    if ALL:
        return tl.load(pointers, mask=(d < DIM)[:, None], other=0.0)
    return tl.load(pointers, mask=exists[None, :] & (d < DIM)[:, None], other=0.0)


@triton.jit
@no_type_check
def load_held(
    base,
    offset,
    exists,
    stride,
    ALL: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """As ``load_part``, but [n, WIDTH]; without a second part (WIDTH 0) something unused."""
    if WIDTH > 0:
        d = FIRST + tl.arange(0, WIDTH)
        pointers = base + offset[:, None] + d[None, :] * stride
        if ALL and FIRST + WIDTH <= DIM:
            held = tl.load(pointers)
        elif ALL:
            held = tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
        else:
            held = tl.load(pointers, mask=exists[:, None] & (d < DIM)[None, :], other=0.0)
    else:
        held = offset
    return held


@triton.jit
@no_type_check
def scores(
    held,
    held_more,
    zeros,
    base,
    offset,
    exists,
    stride,
    ALL: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``held @ tile`` [h, n], where the tile of n vectors is loaded from ``base + offset``."""
    s = dot(held, load_part(base, offset, exists, stride, ALL, DIM, 0, PART), zeros, PRECISION)
    if MORE > 0:
        more = load_part(base, offset, exists, stride, ALL, DIM, PART, MORE)
        s = dot(held_more, more, s, PRECISION)
    return s


@triton.jit
@no_type_check
def to_registers(held, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """``held @ identity``: the same values, laid out as a result of the tensor cores, so that they
    stay in registers as an operand and are not read from shared memory for every product."""
    d = tl.arange(0, WIDTH)
    identity = tl.where(d[:, None] == d[None, :], 1.0, 0.0).to(held.dtype)
    zeros = tl.zeros([held.shape[0], WIDTH], tl.float32)
    return dot(held, identity, zeros, PRECISION).to(held.dtype)


@triton.jit
@no_type_check
def narrow(x, HELD: tl.constexpr, STREAMED: tl.constexpr):
    """[HELD, STREAMED] summed to [HELD, 8]: values that one thread holds, so nothing moves."""
    return tl.sum(tl.reshape(x, [HELD, STREAMED // 8, 8]), 1)


@triton.jit
@no_type_check
def find_segment(
    bounds,
    segments,
    slot,
    slots,
    rows,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """(first, end, tile): the segment of a slot, in rows, and which of its tiles the slot is.

    Segment s has the slots from ``bounds[s] * HEADS // BLOCK + s`` on, never fewer than it has
    tiles: so neither a scan nor a value on the host is needed. A slot too many gives a tile beyond
    the segment's end; a slot of no segment, an empty segment.
    """
    # Segments of one size are found by a division, others by looking at all of them.
    at = (slot.to(tl.int64) * segments // slots).to(tl.int32)
    first = tl.load(bounds + at).to(tl.int32)
    end = tl.load(bounds + at + 1).to(tl.int32)
    if (first * HEADS // BLOCK + at > slot) | (end * HEADS // BLOCK + at + 1 <= slot):
        before = 0
        for s0 in range(0, segments, AT_ONCE):
            s = s0 + tl.arange(0, AT_ONCE)
            bound = tl.load(bounds + s, mask=s < segments, other=0).to(tl.int32)
            mine = (bound * HEADS // BLOCK + s <= slot) & (s < segments)
            before += tl.sum(mine.to(tl.int32), 0)
        at = tl.maximum(before - 1, 0)
        first = tl.load(bounds + at).to(tl.int32)
        end = tl.where(before > 0, tl.load(bounds + at + 1).to(tl.int32), first)
    tile = slot - (first * HEADS // BLOCK + at)
    return tl.maximum(first, 0), tl.minimum(end, rows), tile
