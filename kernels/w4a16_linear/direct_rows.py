"""The kernel for two to eight rows of x on Hopper, in Gluon: codes go from memory to registers.

With several rows of x the time goes into instructions, and into reading x again and again, more than
into memory. So there is nothing between a load and its use: no ring, no barrier, no mask where sizes
allow, every step of a program's few laid out in full, codes asked for a step ahead and the first of
them before the kernel that makes x has ended. Threads hold what they hold in :mod:`.stream_rows`.
Where rows of the weight are long, several programs share one, so that each reads a short piece of x
for many rows; their sums are added in a fixed order by :func:`.mid_rows.add_splits`.
"""

from __future__ import annotations

from typing import no_type_check

from ..dependent_launch import begin, wait
from ..gluon_support import gl, gluon
from .codes import unpack
from .stream_rows import GROUP, mma_v2, store_tile


@gluon.jit
@no_type_check
def _stored(
    words_at, scale_at, zero_at, step, left,
    EVEN: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    CODES: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """Codes, scales and zero points of a step's COLUMNS groups, of which ``left`` are there."""
    words_at += step * (COLUMNS * 32)
    scale_at += step * COLUMNS
    zero_at += step * COLUMNS
    if EVEN:
        words = gl.load(words_at, eviction_policy="evict_first")
        scale = gl.load(scale_at)
        zeros = gl.load(zero_at)
    else:
        r = gl.arange(0, ROWS, gl.SliceLayout(1, CODES))[:, None]
        c = gl.arange(0, COLUMNS * 32, gl.SliceLayout(0, CODES))[None, :]
        inside = (c + 0 * r) < (left - step * COLUMNS) * 32
        words = gl.load(words_at, mask=inside, other=0, eviction_policy="evict_first")
        r = gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))[:, None]
        c = gl.arange(0, COLUMNS, gl.SliceLayout(0, SCALES))[None, :]
        inside = (c + 0 * r) < left - step * COLUMNS
        scale = gl.load(scale_at, mask=inside, other=0.0)
        zeros = gl.load(zero_at, mask=inside, other=0)
    return words, scale, zeros


@gluon.jit
@no_type_check
def _tokens(
    x_at, step, M, left,
    FULL: gl.constexpr, A: gl.constexpr, WIDTH: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """The step's WIDTH channels of x [A, WIDTH]; FULL: all of them are there."""
    if FULL:
        value = gl.load(x_at + step * WIDTH)
    else:
        m = gl.arange(0, A, gl.SliceLayout(1, TOKENS))[:, None]
        c = gl.arange(0, WIDTH, gl.SliceLayout(0, TOKENS))[None, :]
        inside = (m < M) & (c < left * 128 - step * WIDTH)
        value = gl.load(x_at + step * WIDTH, mask=inside, other=0.0)
    return value


@gluon.jit
@no_type_check
def _multiply(
    words, scale, zeros, value,
    A: gl.constexpr, R: gl.constexpr, W: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """A step's sums [W, 8 * R, 8]."""
    S: gl.constexpr = 8 // A
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    DTYPE: gl.constexpr = value.dtype
    # [A, W, S, quarter, pair of half-words, half-word of it, nibble]
    tokens = value.reshape(A, W, S, 4, 4, 2, 4).permute(1, 4, 6, 3, 5, 0, 2)
    tokens = gl.convert_layout(tokens.reshape(W, 128, 8), OPERAND, assert_trivial=True)
    words = words.reshape(R * A, W * S, 32)
    PER_GROUP: gl.constexpr = gl.SliceLayout(2, words.type.layout)
    zeros = gl.expand_dims(gl.convert_layout(zeros, PER_GROUP, assert_trivial=True), 2)
    weight = unpack(words, zeros, DTYPE)
    # [R, A, W, S, quarter, pair of half-words, half-word of it, nibble]
    weight = weight.reshape(R, A, W, S, 4, 4, 2, 4).permute(2, 0, 1, 3, 5, 7, 4, 6)
    weight = gl.convert_layout(weight.reshape(W, 8 * R, 128), WEIGHT, assert_trivial=True)
    product = mma_v2(weight, tokens, gl.zeros((W, 8 * R, 8), gl.float32, PRODUCT))
    scale = scale.reshape(R, A, W, S).permute(2, 0, 1, 3).reshape(W, 8 * R).to(gl.float32)
    scale = gl.convert_layout(scale, gl.SliceLayout(2, PRODUCT), assert_trivial=True)
    return product * gl.expand_dims(scale, 2)


@gluon.jit
@no_type_check
def direct_rows(
    x,  # [M, K], rows stride_xm apart
    qweight,  # int16 [N, K // 4]
    scales,  # [N, GROUPS]
    zero_points,  # uint8 [N, GROUPS]
    bias,  # [N] or unused
    out,  # [M, N]; float32 [splits, M, N] where a second dimension of the grid shares out channels
    M,
    N,  # at least R * A
    stride_xm,
    GROUPS: gl.constexpr,  # K // 128
    SHARE: gl.constexpr,  # groups of a program
    EVEN: gl.constexpr,  # every program has so many, and they fill its steps
    FULL: gl.constexpr,  # M is A
    AHEAD: gl.constexpr,  # ask for codes a step ahead
    HAS_BIAS: gl.constexpr,
    A: gl.constexpr,  # at least M: 2, 4 or 8; as many rows of the weight side by side
    R: gl.constexpr,  # a program takes R * A rows of the weight; R is even
    W: gl.constexpr,  # warps, one after the other along input channels
    CODES: gl.constexpr,
    SCALES: gl.constexpr,
    TOKENS: gl.constexpr,  # as `stream_rows.layouts` says
    EARLY: gl.constexpr,  # start before the kernel that makes x has ended
):
    S: gl.constexpr = 8 // A  # neighbouring groups side by side
    ROWS: gl.constexpr = R * A
    COLUMNS: gl.constexpr = W * S
    WIDTH: gl.constexpr = COLUMNS * 128
    STEPS: gl.constexpr = (SHARE + COLUMNS - 1) // COLUMNS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    begin(EARLY)
    first = gl.minimum(gl.program_id(0) * ROWS, N - ROWS)  # the last tile may take rows again
    origin = gl.program_id(1) * SHARE
    left = gl.minimum(GROUPS - origin, SHARE)
    start = first.to(gl.int64) * GROUPS + origin
    r = gl.arange(0, ROWS, gl.SliceLayout(1, CODES))[:, None]
    c = gl.arange(0, COLUMNS * 32, gl.SliceLayout(0, CODES))[None, :]
    words_at = qweight + start * 32 + (r * (GROUPS * 32) + c)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))[:, None]
    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, SCALES))[None, :]
    scale_at = scales + start + (r * GROUPS + c)
    zero_at = zero_points + start + (r * GROUPS + c)
    m = gl.arange(0, A, gl.SliceLayout(1, TOKENS))[:, None]
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, TOKENS))[None, :]
    x_at = x + origin * 128 + (m * stride_xm + c)
    words, scale, zeros = _stored(
        words_at, scale_at, zero_at, 0, left, EVEN, ROWS, COLUMNS, CODES, SCALES
    )
    # Of the product only entries whose row and column are of the same group are meant.
    row_group = gl.arange(0, 8 * R, gl.SliceLayout(0, gl.SliceLayout(2, PRODUCT))) % S
    column_group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, PRODUCT))) % S
    meant = gl.expand_dims(gl.expand_dims(row_group, 0), 2) == gl.expand_dims(
        gl.expand_dims(column_group, 0), 1
    )
    acc = gl.zeros((W, 8 * R, 8), gl.float32, PRODUCT)
    wait(EARLY)
    if AHEAD:
        next_value = _tokens(x_at, 0, M, left, EVEN and FULL, A, WIDTH, TOKENS)
    for step in gl.static_range(STEPS):
        if AHEAD:
            value = next_value
            now, now_scale, now_zeros = words, scale, zeros
            if step + 1 < STEPS:
                next_value = _tokens(x_at, step + 1, M, left, EVEN and FULL, A, WIDTH, TOKENS)
                words, scale, zeros = _stored(
                    words_at, scale_at, zero_at, step + 1, left, EVEN, ROWS, COLUMNS, CODES, SCALES
                )
        else:
            if step > 0:
                words, scale, zeros = _stored(
                    words_at, scale_at, zero_at, step, left, EVEN, ROWS, COLUMNS, CODES, SCALES
                )
            value = _tokens(x_at, step, M, left, EVEN and FULL, A, WIDTH, TOKENS)
            now, now_scale, now_zeros = words, scale, zeros
        acc += _multiply(now, now_scale, now_zeros, value, A, R, W, PRODUCT)
    out += gl.program_id(1).to(gl.int64) * M * N
    store_tile(acc, meant, bias, out, first, M, N, HAS_BIAS, A, R, W)


assert GROUP == 128  # what the shapes above are for
