"""The kernel for a few rows of x: decoding, one token or a small batch of them.

Reading the weight is nearly all of the time, so each warp reads long contiguous runs of it: the
eight rows of a matrix instruction's operand (``mma.m16n8k16``, the weight on its 16-wide side) are S
neighbouring groups of input channels of 8 / S output rows. The other operand then has a column for
every (token, group), and of the product only the entries whose row and column are of the same group
are meant; the rest is dropped at the end. With one token, S = 8 and nothing is padded.
"""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import HAVE_TRITON, dot, interpreting, tl, triton
from .codes import _LANES_FIRST, along, prefetch, unpack

if HAVE_TRITON and not interpreting():
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
@no_type_check
def few_rows(
    x,  # [M, K], rows stride_xm apart
    qweight,  # int16 [N, K // 4]
    scales,  # [N, K // GROUP]
    zero_points,  # uint8 [N, K // GROUP]
    bias,  # [N] or unused
    out,  # [M, N]
    M,
    N,
    groups,  # K // GROUP
    stride_xm,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,  # ask for the program's part of the weight first (Hopper)
    EARLY: tl.constexpr,  # start before the kernel that makes x has ended (Hopper)
    TOKENS: tl.constexpr,  # at least M; TOKENS * S is a multiple of 8
    S: tl.constexpr,  # neighbouring groups side by side: 1, 2, 4 or 8
    R: tl.constexpr,  # rows of the weight are taken R * (8 / S) at a time; R is even
    W: tl.constexpr,  # warps, one after the other along input channels
    J: tl.constexpr,  # how many S * W groups a program takes at a time
    KW: tl.constexpr,  # channels in a row that a thread holds of an operand, as Triton lays it out
):
    A: tl.constexpr = 8 // S  # rows of the weight side by side, and tokens
    C: tl.constexpr = TOKENS // A  # columns of 8 (token, group) pairs
    V: tl.constexpr = GROUP // 16  # half-words of a group that a thread holds
    Q: tl.constexpr = GROUP // 32  # eights of x that go with them
    ROWS: tl.constexpr = R * A
    STEP: tl.constexpr = J * W * S
    first = tl.program_id(0) * ROWS
    if PREFETCH:
        size = tl.minimum(N - first, ROWS) * groups * (GROUP // 2)
        prefetch(qweight + first.to(tl.int64) * groups * (GROUP // 4), size)
    if EARLY:
        gdc_launch_dependents()

    # dimensions: quarter of a group, group of S, row of A, warp, R, J; then what a thread holds
    n = tl.minimum(first + along(R, 4, 6) * A + along(A, 2, 6), N - 1)
    g = (along(J, 5, 6) * W + along(W, 3, 6)) * S + along(S, 1, 6)
    # One element a thread: what follows one another here must not decide which lane loads what.
    per_group = n * groups + g + 0 * along(4, 0, 6)
    scale_at = tl.max_contiguous(scales + per_group, [1, 1, 1, 1, 1, 1])
    zero_at = tl.max_contiguous(zero_points + per_group, [1, 1, 1, 1, 1, 1])
    word_at = n.to(tl.int64) * groups * (GROUP // 4) + g * (GROUP // 4) + along(4, 0, 6) * V
    word_at = qweight + tl.expand_dims(word_at, 6) + along(V, 6, 6, 1)
    # and of x: quarter of a group, group of S, token of A, warp, C, J, Q; then eight
    m = along(C, 4, 7, 1) * A + along(A, 2, 7, 1)
    xg = (along(J, 5, 7, 1) * W + along(W, 3, 7, 1)) * S + along(S, 1, 7, 1)
    piece = along(4, 0, 7, 1) * (4 * V) + along(Q, 6, 7, 1) * 8 + along(8, 7, 7, 1)
    x_at = x + m.to(tl.int64) * stride_xm + (xg * GROUP + piece)

    acc = tl.zeros((J * W, 8 * R, 8 * C), dtype=tl.float32)
    if EARLY:
        gdc_wait()
    for start in range(0, groups, STEP):
        inside = g < groups - start
        words = tl.load(
            word_at + start * (GROUP // 4),
            mask=tl.expand_dims(inside, 6),
            other=0,
            eviction_policy="evict_first",  # read once, where x is read by every program
        )
        zeros = tl.load(zero_at + start, mask=inside, other=0)
        scale = tl.load(scale_at + start, mask=inside, other=0.0).to(tl.float32)
        tokens = tl.load(
            x_at + start * GROUP,
            mask=(m < M) & (xg < groups - start),
            other=0.0,
            eviction_policy="evict_last",
        )
        codes = unpack(words, tl.expand_dims(zeros, 6), x.dtype.element_ty)
        if _LANES_FIRST:
            codes = tl.permute(codes, (5, 3, 4, 2, 1, 0, 7, 6))
            tokens = tl.permute(tokens, (5, 3, 4, 2, 1, 0, 6, 7))
            scale = tl.permute(scale, (5, 3, 4, 2, 1, 0))
        else:
            codes = tl.permute(codes, (0, 2, 1, 3, 4, 5, 7, 6))
            tokens = tl.permute(tokens, (1, 3, 2, 4, 5, 6, 0, 7))
            scale = tl.permute(scale, (0, 2, 1, 3, 4, 5))
        # codes [J, W, R, A, S, 4, nibble, V] -> [J W, R 8, channel]
        codes = tl.reshape(codes, (J * W, 8 * R, 4, 4 * V // KW, KW))
        codes = tl.reshape(tl.permute(codes, (0, 1, 3, 2, 4)), (J * W, 8 * R, GROUP))
        # tokens [J, W, C, A, S, 4, Q, 8] -> [J W, channel, C 8]
        tokens = tl.reshape(tokens, (J * W, 8 * C, 4, V, 4))
        tokens = tl.reshape(tl.permute(tokens, (0, 1, 2, 4, 3)), (J * W, 8 * C, 4, 4 * V // KW, KW))
        tokens = tl.reshape(tl.permute(tokens, (0, 3, 2, 4, 1)), (J * W, GROUP, 8 * C))
        product = tl.zeros((J * W, 8 * R, 8 * C), dtype=tl.float32)
        product = dot(codes, tokens, product, "tf32")
        # scale [J, W, R, A, S, 4] -> as the product, whose four threads hold two columns each
        scale = tl.reshape(scale, (J, W, R, 8, 1, 4, 1))
        scale = tl.broadcast_to(scale, (J, W, R, 8, C, 4, 2))
        acc += product * tl.reshape(scale, (J * W, 8 * R, 8 * C))
    if S > 1:
        row_group = tl.arange(0, 8 * R)[None, :, None] % S
        column_group = tl.arange(0, 8 * C)[None, None, :] % S
        acc = tl.where(row_group == column_group, acc, 0.0)
    acc = tl.reshape(acc, (J * W, ROWS, S, TOKENS, S))
    result = tl.sum(tl.sum(tl.sum(acc, 4), 2), 0)
    rows = first + tl.arange(0, ROWS)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    token = tl.arange(0, TOKENS)
    tl.store(
        out + token[None, :].to(tl.int64) * N + rows[:, None],
        result.to(out.dtype.element_ty),
        mask=(token[None, :] < M) & (rows[:, None] < N),
    )
