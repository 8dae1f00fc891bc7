"""The kernel for one to eight rows of x on Hopper, in Gluon: it keeps the memory busy throughout.

As :mod:`.few_rows`, the weight goes from stored codes to the operand of ``mma.m16n8k16`` in registers
and passes through no shuffle. What differs is who loads, and when. Each program takes a contiguous run
of rows of the weight and copies its codes (by the tensor memory accelerator), scales and zero points through
a ring in shared memory, always ``STAGES - 1`` tiles ahead, for long products all programs at once. What comes first is asked for before the kernel that makes x has ended: weights depend on
nothing, so in a chain of kernels the memory does not stand still in between.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, no_type_check

from ..dependent_launch import begin, wait
from ..gluon_support import HAVE_GLUON, gl, gluon, mbarrier, tma
from ..triton_support import triton
from .codes import unpack

async_copy: Any = triton
mma_v2: Any = triton
if HAVE_GLUON:
    _ampere = importlib.import_module("triton.experimental.gluon.language.nvidia.ampere")
    async_copy, mma_v2 = _ampere.async_copy, _ampere.mma_v2

GROUP = 128
"""The group size that the kernel is for: 16 bytes of a group's codes to each of four threads."""


def _powers(first: int, count: int) -> list[int]:
    """``first``, doubled up to below ``first * count``."""
    return [first << i for i in range(count.bit_length() - 1)]


@functools.cache
def layouts(tokens: int, eights: int, warps: int) -> dict[str, Any]:
    """Which thread holds what of a tile; the same for loading and for multiplying.

    Of the eight rows of an operand that a warp's lanes spread over in fours, ``tokens`` are rows of
    the weight (tokens, of x) and the rest neighbouring groups; warps take groups after those.
    """
    side, rows = 8 // tokens, eights * tokens
    groups = side * warps
    in_eights = [[r, 0] for r in _powers(tokens, eights)]
    a = _powers(1, tokens)

    def lanes(quarter: int, group: int) -> list[list[int]]:
        return [
            *([0, quarter], [0, 2 * quarter]),
            *([0, c] for c in _powers(group, side)),
            *([r, 0] for r in a),
        ]

    def across(group: int) -> list[list[int]]:
        return [[0, c] for c in _powers(group * side, warps)]

    def linear(registers: list[list[int]], group: int, quarter: int, shape: list[int]) -> Any:
        return gl.DistributedLinearLayout(
            registers, lanes(quarter, group), across(group), [], shape
        )

    copied = min(4, groups)
    columns = min(32, groups // copied)
    return {
        "CODES": linear([[0, 1], [0, 2], [0, 4], *in_eights], 32, 8, [rows, 32 * groups]),
        "SCALES": linear(in_eights, 1, 0, [rows, groups]),
        "TOKENS": linear([[0, c] for c in _powers(1, 32)], 128, 32, [tokens, 128 * groups]),
        "COPIED": gl.BlockedLayout([1, copied], [32 // columns, columns], [warps, 1], [1, 0]),
    }


@gluon.jit
@no_type_check
def _fetch(
    ring, slot, codes, scales, zero_points, first, row, step,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUPS: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """Start copying the tile of ROWS rows from ``first + row`` on and the step's COLUMNS groups.

    scales and zero_points begin at row ``first``.
    """
    ring_codes, ready, ring_scales, ring_zeros = ring
    mbarrier.expect(ready.index(slot), ROWS * COLUMNS * 64)
    tma.async_copy_global_to_shared(
        codes, [first + row, step * (COLUMNS * 32)], ready.index(slot), ring_codes.index(slot)
    )
    left = GROUPS - step * COLUMNS
    r = gl.arange(0, ROWS, gl.SliceLayout(1, COPIED))[:, None]
    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, COPIED))[None, :]
    at = (row * GROUPS + step * COLUMNS) + (r * GROUPS + c)
    inside = (c + 0 * r) < left
    async_copy.async_copy_global_to_shared(ring_scales.index(slot), scales + at, mask=inside)
    async_copy.async_copy_global_to_shared(ring_zeros.index(slot), zero_points + at, mask=inside)


@gluon.jit
@no_type_check
def _tokens(
    x, M, stride_xm, step,
    A: gl.constexpr, W: gl.constexpr, GROUPS: gl.constexpr,
    TOKENS: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """The step's channels of x as an operand [W, channel, 8 (token, group)], in the codes' order."""
    S: gl.constexpr = 8 // A
    WIDTH: gl.constexpr = W * S * 128
    m = gl.arange(0, A, gl.SliceLayout(1, TOKENS))[:, None]
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, TOKENS))[None, :]
    inside = (m < M) & (c < GROUPS * 128 - step * WIDTH)
    value = gl.load(x + step * WIDTH + (m * stride_xm + c), mask=inside, other=0.0)
    # [A, W, S, quarter, pair of half-words, half-word of it, nibble]
    value = value.reshape(A, W, S, 4, 4, 2, 4).permute(1, 4, 6, 3, 5, 0, 2)
    return gl.convert_layout(value.reshape(W, 128, 8), OPERAND, assert_trivial=True)


@gluon.jit
@no_type_check
def store_tile(
    acc, meant, bias, out, row, M, N,
    HAS_BIAS: gl.constexpr, A: gl.constexpr, R: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Add up what the threads hold of a tile's sums, and write them."""
    S: gl.constexpr = 8 // A
    meant_acc = gl.where(meant, acc, 0.0)
    if A == 1:
        # Two columns in a thread; the rest goes through shared memory once, not lane by lane.
        SPREAD: gl.constexpr = 32 * W // R
        ROW_BY_ROW: gl.constexpr = gl.BlockedLayout([1, R], [32 // SPREAD, SPREAD], [W, 1], [1, 0])
        parts = gl.sum(meant_acc.reshape(W, 8 * R, 4, 2), 3).reshape(W, R, 32)
        parts = parts.permute(1, 0, 2).reshape(R, W * 32)
        result = gl.expand_dims(gl.sum(gl.convert_layout(parts, ROW_BY_ROW), 1), 1)
    else:
        parts = meant_acc.reshape(W, R, A, S, A, S)
        result = gl.sum(gl.sum(gl.sum(parts, 5), 3), 0).reshape(R * A, A)
    n = row + gl.arange(0, R * A, gl.SliceLayout(1, result.type.layout))[:, None]
    m = gl.arange(0, A, gl.SliceLayout(0, result.type.layout))[None, :]
    if HAS_BIAS:
        result += gl.load(bias + n).to(gl.float32)
    at = m.to(gl.int64) * N + n
    gl.store(out + at, result.to(out.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit
@no_type_check
def stream_rows(
    x,  # [M, K], rows stride_xm apart
    codes,  # descriptor of int16 [N, K // 4], blocks [R * A, W * 8 // A * 32]
    scales,  # [N, GROUPS]
    zero_points,  # uint8 [N, GROUPS]
    bias,  # [N] or unused
    out,  # [M, N]
    M,
    N,
    stride_xm,
    share,  # rows of the weight that a program takes; at least R * A, at most N
    GROUPS: gl.constexpr,  # K // 128, a multiple of 4
    HAS_BIAS: gl.constexpr,
    A: gl.constexpr,  # at least M: 1, 2, 4 or 8; as many rows of the weight side by side
    R: gl.constexpr,  # rows of the weight are taken R * A at a time; R is even
    W: gl.constexpr,  # warps, one after the other along input channels
    STAGES: gl.constexpr,  # tiles that the ring holds
    CODES: gl.constexpr,
    SCALES: gl.constexpr,
    TOKENS: gl.constexpr,
    COPIED: gl.constexpr,  # as `layouts` says
    EARLY: gl.constexpr,  # start before the kernel that makes x has ended
):
    S: gl.constexpr = 8 // A  # neighbouring groups side by side
    ROWS: gl.constexpr = R * A
    COLUMNS: gl.constexpr = W * S
    STEPS: gl.constexpr = (GROUPS + COLUMNS - 1) // COLUMNS
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    begin(EARLY)
    first = gl.minimum(gl.program_id(0) * share, N - share)
    scales += first.to(gl.int64) * GROUPS
    zero_points += first.to(gl.int64) * GROUPS
    ring_codes = gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, COLUMNS * 32], codes.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    ring_scales = gl.allocate_shared_memory(scales.dtype.element_ty, [STAGES, ROWS, COLUMNS], PLAIN)
    ring_zeros = gl.allocate_shared_memory(gl.uint8, [STAGES, ROWS, COLUMNS], PLAIN)
    ring = (ring_codes, ready, ring_scales, ring_zeros)
    total = ((share + ROWS - 1) // ROWS) * STEPS
    last = share - ROWS  # the last tile may take rows again
    next_row = 0
    next_step = 0
    for slot in gl.static_range(STAGES - 1):
        if slot < total:
            _fetch(
                ring, slot, codes, scales, zero_points, first, gl.minimum(next_row, last), next_step,
                ROWS, COLUMNS, GROUPS, COPIED,
            )  # fmt: skip
        async_copy.commit_group()
        next_step += 1
        if next_step == STEPS:
            next_step = 0
            next_row += ROWS
    # Of the product only entries whose row and column are of the same group are meant.
    row_group = gl.arange(0, 8 * R, gl.SliceLayout(0, gl.SliceLayout(2, PRODUCT))) % S
    column_group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, PRODUCT))) % S
    meant = gl.expand_dims(gl.expand_dims(row_group, 0), 2) == gl.expand_dims(
        gl.expand_dims(column_group, 0), 1
    )
    wait(EARLY)
    if STEPS == 1:
        tokens = _tokens(x, M, stride_xm, 0, A, W, GROUPS, TOKENS, OPERAND)
    acc = gl.zeros((W, 8 * R, 8), gl.float32, PRODUCT)
    row = 0
    step = 0
    slot = 0
    phase = 0
    free = STAGES - 1
    for tile in range(total):
        if STEPS > 1:
            tokens = _tokens(x, M, stride_xm, step, A, W, GROUPS, TOKENS, OPERAND)
        if tile + (STAGES - 1) < total:
            _fetch(
                ring, free, codes, scales, zero_points, first, gl.minimum(next_row, last), next_step,
                ROWS, COLUMNS, GROUPS, COPIED,
            )  # fmt: skip
        async_copy.commit_group()
        next_step += 1
        if next_step == STEPS:
            next_step = 0
            next_row += ROWS
        free = gl.where(free == STAGES - 1, 0, free + 1)
        async_copy.wait_group(STAGES - 1)
        mbarrier.wait(ready.index(slot), phase)
        words = ring_codes.index(slot).load(CODES).reshape(ROWS, COLUMNS, 32)
        scale = ring_scales.index(slot).load(SCALES)
        zeros = ring_zeros.index(slot).load(SCALES)
        phase = gl.where(slot == STAGES - 1, 1 - phase, phase)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        PER_GROUP: gl.constexpr = gl.SliceLayout(2, words.type.layout)
        zeros = gl.expand_dims(gl.convert_layout(zeros, PER_GROUP, assert_trivial=True), 2)
        weight = unpack(words, zeros, x.dtype.element_ty)
        # [R, A, W, S, quarter, pair of half-words, half-word of it, nibble]
        weight = weight.reshape(R, A, W, S, 4, 4, 2, 4).permute(2, 0, 1, 3, 5, 7, 4, 6)
        weight = gl.convert_layout(weight.reshape(W, 8 * R, 128), WEIGHT, assert_trivial=True)
        product = mma_v2(weight, tokens, gl.zeros((W, 8 * R, 8), gl.float32, PRODUCT))
        scale = scale.reshape(R, A, W, S).permute(2, 0, 1, 3).reshape(W, 8 * R).to(gl.float32)
        scale = gl.convert_layout(scale, gl.SliceLayout(2, PRODUCT), assert_trivial=True)
        acc += product * gl.expand_dims(scale, 2)
        step += 1
        if step == STEPS:
            store_tile(
                acc, meant, bias, out, first + gl.minimum(row, last), M, N, HAS_BIAS, A, R, W
            )
            acc = gl.zeros((W, 8 * R, 8), gl.float32, PRODUCT)
            step = 0
            row += ROWS
