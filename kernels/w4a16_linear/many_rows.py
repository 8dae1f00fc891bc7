"""The kernel for many rows of x on Hopper, in Gluon: codes become operands while products run.

``out^T = weight @ x^T`` by ``wgmma``, in tiles of 128 outputs by 256 rows of x (fewer in the last block
of rows). One warp fetches codes and tiles of x into a ring; two groups of four warps take 64 outputs
each, unpack codes to 16-bit weights in registers, in the order of the operand, and multiply by the tile
of x in shared memory, unpacking the next while the tensor cores work. Results go out through shared
memory while the next tile's products run. No weight is written anywhere. Each weight is rounded once to
x's dtype. Programs stay and take what :mod:`.many_schedule` deals out.
"""

from __future__ import annotations

from typing import no_type_check

from ..gluon_support import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from .many_schedule import item, place, share

GROUP = 128


def _ptx(dtype: str, magic: str, one: str) -> str:
    """PTX: of the words $2 and $3 the two codes of a byte each, as weights, to $0 and $1.

    $4, $5 are minus the zero point's encoding, $6, $7 the scale, each twice in a register; $8, $9 say
    which byte: its low nibble lands in the lower half, its high one (of the word shifted) in the upper.
    """
    lines = ["{", ".reg .b32 both, high, one;", f"mov.b32 one, {one};"]
    for i in range(2):
        lines += [
            f"shr.u32 high, ${2 + i}, 4;",
            f"prmt.b32 both, ${2 + i}, high, ${8 + i};",
            f"lop3.b32 both, both, 0x000F000F, {magic}, 0xEA;",
            f"fma.rn.{dtype}x2 both, both, one, ${4 + i};",
            f"mul.rn.{dtype}x2 ${i}, both, ${6 + i};",
        ]
    return "\n".join([*lines, "}"])


_BFLOAT16 = gl.constexpr(_ptx("bf16", "0x43004300", "0x3F803F80"))
_FLOAT16 = gl.constexpr(_ptx("f16", "0x64006400", "0x3C003C00"))


@gluon.jit
@no_type_check
def _weights(codes, zero, scale, DTYPE: gl.constexpr, WORDS: gl.constexpr, OPERAND: gl.constexpr):
    """A tile of codes, int32 [64, 8] in shared memory, as an operand [64, 64]."""
    words = gl.expand_dims(codes.load(gl.SliceLayout(2, WORDS)), 2)
    byte = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, WORDS)))
    byte = gl.expand_dims(gl.expand_dims(byte * 0x1111 + 0x4400, 0), 0)
    words, byte = gl.broadcast(words, byte)  # [64, 8, 4]
    words, zero = gl.broadcast(words, gl.expand_dims(gl.expand_dims(zero, 1), 2))
    words, scale = gl.broadcast(words, gl.expand_dims(gl.expand_dims(scale, 1), 2))
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        even, odd = gl.inline_asm_elementwise(
            _BFLOAT16, "=r,=r,r,r,r,r,r,r,r,r", [words, zero, scale, byte],
            dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even, odd = gl.inline_asm_elementwise(
            _FLOAT16, "=r,=r,r,r,r,r,r,r,r,r", [words, zero, scale, byte],
            dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    # [64, pair of words, nibble of the byte, byte, word of the pair]: as registers hold them
    weights = gl.join(even, odd).reshape(64, 4, 2, 4, 2).permute(0, 1, 4, 3, 2)
    return gl.convert_layout(weights.reshape(64, 64), OPERAND, assert_trivial=True)


@gluon.jit
@no_type_check
def _per_group(scales, zero_points, at, inside, DTYPE: gl.constexpr):
    """Scale and minus the encoded zero point of a row's group, twice in a register each."""
    MINUS: gl.constexpr = 0xC300 if DTYPE == gl.bfloat16 else 0xE400  # noqa: SIM300
    scale = gl.load(scales + at, mask=inside, other=0.0).to(gl.int16, bitcast=True)
    scale = scale.to(gl.int32) & 0xFFFF
    zero = gl.load(zero_points + at, mask=inside, other=0).to(gl.int32) | MINUS
    return scale | (scale << 16), zero | (zero << 16)


@gluon.jit
@no_type_check
def _issue(
    acc, ring, done, zero, scale, T: gl.constexpr, WHO: gl.constexpr, STAGES: gl.constexpr,
    WORDS: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Unpack half a group, number ``done``, once it is there; start its product."""
    x_ring, codes_ring, ready, _ = ring
    slot = done % STAGES
    mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
    codes = codes_ring.index(2 * slot + WHO)
    weights = _weights(codes, zero, scale, x_ring.dtype, WORDS, OPERAND)
    x = x_ring.index(slot)
    if T != x.shape[0]:  # noqa: SIM300
        x = x.slice(0, T)
    return warpgroup_mma(weights, x.permute((1, 0)), acc, is_async=True)


@gluon.jit
@no_type_check
def _finish(value, free, done, running: gl.constexpr, STAGES: gl.constexpr):
    """Wait until so many products still run; half a group, number ``done``, is then used up.

    ``value`` is any tensor: it only keeps the order. In-flight registers must not pass through a
    wait: the compiler would run products one by one.
    """
    value = warpgroup_mma_wait(running, deps=[value])
    mbarrier.arrive(free.index(done % STAGES))
    return value


@gluon.jit
@no_type_check
def _sums(
    scales, zero_points, ring, N, groups, outputs, first, last, done,
    T: gl.constexpr, WHO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sums [64, T] over groups first .. last - 1 of 64 outputs.

    Two products are in flight but at the end of a loop's body, where the compiler wants none. So a body
    is two groups long, and the two groups of warps come to its end at different times.
    """
    x_ring, _, _, free = ring
    DTYPE: gl.constexpr = x_ring.dtype
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1, 0], [0, 2, 0], [0, 4, 0], [8, 0, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 8, 4],
    )
    rows = outputs + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    at = rows * groups
    inside = rows < N
    scale, zero = _per_group(scales, zero_points, at + first, inside, DTYPE)
    acc = warpgroup_mma_init(gl.zeros([64, T], gl.float32, PRODUCT))
    group = first
    lead = min(WHO, last - first)
    for _ in range(lead):
        acc = _issue(acc, ring, done, zero, scale, T, WHO, STAGES, WORDS, OPERAND)
        acc = _issue(acc, ring, done + 1, zero, scale, T, WHO, STAGES, WORDS, OPERAND)
        group += 1
        scale, zero = _per_group(scales, zero_points, at + group, inside & (group < last), DTYPE)
        scale = _finish(scale, free, done, 1, STAGES)
        scale = _finish(scale, free, done + 1, 0, STAGES)
        done += 2
    for _ in range((last - first - lead) // 2):
        next_scale, next_zero = _per_group(scales, zero_points, at + group + 1, inside, DTYPE)
        acc = _issue(acc, ring, done, zero, scale, T, WHO, STAGES, WORDS, OPERAND)
        acc = _issue(acc, ring, done + 1, zero, scale, T, WHO, STAGES, WORDS, OPERAND)
        next_scale = _finish(next_scale, free, done, 1, STAGES)
        acc = _issue(acc, ring, done + 2, next_zero, next_scale, T, WHO, STAGES, WORDS, OPERAND)
        next_scale = _finish(next_scale, free, done + 1, 1, STAGES)
        acc = _issue(acc, ring, done + 3, next_zero, next_scale, T, WHO, STAGES, WORDS, OPERAND)
        group += 2
        scale, zero = _per_group(scales, zero_points, at + group, inside & (group < last), DTYPE)
        scale = _finish(scale, free, done + 2, 1, STAGES)
        scale = _finish(scale, free, done + 3, 0, STAGES)
        done += 4
    for _ in range((last - first - lead) % 2):
        acc = _issue(acc, ring, done, zero, scale, T, WHO, STAGES, WORDS, OPERAND)
        acc = _issue(acc, ring, done + 1, zero, scale, T, WHO, STAGES, WORDS, OPERAND)
        scale = _finish(scale, free, done, 1, STAGES)
        scale = _finish(scale, free, done + 1, 0, STAGES)
        done += 2
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
@no_type_check
def _tile(
    scales, zero_points, bias, out, copied, staging, parts, ring, M, N, groups, m_first, outputs,
    first, last, part, done, T: gl.constexpr, WHO: gl.constexpr, STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """Groups first .. last - 1 of 64 outputs and T rows of x: to ``out``, or as part number ``part``."""
    ROWS: gl.constexpr = ring[0].shape[1]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    acc = _sums(scales, zero_points, ring, N, groups, outputs, first, last, done, T, WHO, STAGES)
    if part < 0:
        if HAS_BIAS:
            n = outputs + gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))
            acc += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)
        result = acc.to(out.dtype.element_ty).permute(1, 0)
        if COPIED:
            tma.store_wait(0)  # the tile before has left
            if T != ROWS:
                staging.slice(0, T).store(result)  # what lies behind is outside of out
            else:
                staging.store(result)
            fence_async_shared()
            tma.async_copy_shared_to_global(copied, [m_first, outputs], staging)
        else:
            result = gl.convert_layout(result, STORED)
            m = m_first + gl.arange(0, T, gl.SliceLayout(1, STORED))[:, None]
            n = outputs + gl.arange(0, 64, gl.SliceLayout(0, STORED))[None, :]
            gl.store(out + m.to(gl.int64) * N + n, result, mask=(m < M) & (n < N))
    else:
        r = (part * 2 + WHO) * 64 + gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))[:, None]
        c = gl.arange(0, T, gl.SliceLayout(0, PRODUCT))[None, :]
        gl.store(parts + r * ROWS + c, acc)


@gluon.jit
@no_type_check
def _multiply(
    scales, zero_points, bias, out, copied, staging, parts, ring, M, N, groups, whole, shared, wide,
    columns, beside, WHO: gl.constexpr, LAST: gl.constexpr, STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """Group WHO of four warps: the 64 outputs from 64 * WHO on of each tile."""
    ROWS: gl.constexpr = ring[0].shape[1]
    program, programs = gl.program_id(0), gl.num_programs(0)
    start, stop, tiles, items = share(program, programs, groups, whole, shared)
    done = 0  # half groups
    for i in range(items):
        tile, first, last = item(i, program, programs, groups, whole, start, stop, tiles)
        m, n = place(tile, wide, columns, beside)
        outputs = n * 128 + WHO * 64
        part = -1
        if i >= tiles:
            part = 2 * program + i - tiles
        if LAST == ROWS:  # noqa: SIM114  known when compiled
            _tile(
                scales, zero_points, bias, out, copied, staging, parts, ring, M, N, groups, m * ROWS,
                outputs, first, last, part, done, ROWS, WHO, STAGES, HAS_BIAS, COPIED,
            )  # fmt: skip
        elif m < wide:
            _tile(
                scales, zero_points, bias, out, copied, staging, parts, ring, M, N, groups, m * ROWS,
                outputs, first, last, part, done, ROWS, WHO, STAGES, HAS_BIAS, COPIED,
            )  # fmt: skip
        else:
            _tile(
                scales, zero_points, bias, out, copied, staging, parts, ring, M, N, groups, m * ROWS,
                outputs, first, last, part, done, LAST, WHO, STAGES, HAS_BIAS, COPIED,
            )  # fmt: skip
        done += 2 * (last - first)
    if COPIED:
        tma.store_wait(0)


@gluon.jit
@no_type_check
def _fetch(
    x, x_last, codes, ring, groups, whole, shared, wide, columns, beside, STAGES: gl.constexpr
):
    """The warp that fetches: per tile half a group at a time of x and of the codes."""
    x_ring, codes_ring, ready, free = ring
    ROWS: gl.constexpr = x.block_shape[0]
    LAST: gl.constexpr = x_last.block_shape[0]
    program, programs = gl.program_id(0), gl.num_programs(0)
    start, stop, tiles, items = share(program, programs, groups, whole, shared)
    done = 0
    for i in range(items):
        tile, first, last = item(i, program, programs, groups, whole, start, stop, tiles)
        m, n = place(tile, wide, columns, beside)
        for half in range(2 * first, 2 * last):
            slot = done % STAGES
            mbarrier.wait(free.index(slot), ((done // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            at = [m * ROWS, half * 64]
            if LAST == ROWS:  # noqa: SIM114  known when compiled
                mbarrier.expect(bar, ROWS * 128 + 128 * 32)
                tma.async_copy_global_to_shared(x, at, bar, x_ring.index(slot))
            elif m < wide:
                mbarrier.expect(bar, ROWS * 128 + 128 * 32)
                tma.async_copy_global_to_shared(x, at, bar, x_ring.index(slot))
            else:  # rows outside of x take longer than others
                mbarrier.expect(bar, LAST * 128 + 128 * 32)
                tma.async_copy_global_to_shared(x_last, at, bar, x_ring.index(slot).slice(0, LAST))
            for who in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    codes, [n * 128 + who * 64, half * 8], bar, codes_ring.index(2 * slot + who)
                )
            done += 1


@gluon.jit(do_not_specialize=["M", "groups", "whole", "shared", "wide", "columns", "beside"])
@no_type_check
def many_rows(
    x,  # descriptor of [M, K], blocks [ROWS, 64]
    x_last,  # the same, blocks [LAST, 64]
    codes,  # descriptor of int32 [N, K // 8], blocks [64, 8], plain
    copied,  # descriptor of out, blocks [ROWS, 64], if COPIED
    scales,  # [N, groups], x's dtype
    zero_points,  # uint8 [N, groups]
    bias,  # [N] or unused
    out,  # [M, N]
    parts,  # float32 [2 * programs, 128, ROWS] or unused
    M,
    N,
    groups,  # K // 128
    whole,
    shared,
    wide,
    columns,
    beside,
    LAST: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    COPIED: gl.constexpr,  # rows of out are at multiples of 16 bytes
):
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)
    codes_ring = gl.allocate_shared_memory(
        codes.dtype, [2 * STAGES] + codes.block_shape, codes.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    staging_0 = x_ring.index(0)  # unused
    staging_1 = staging_0
    if COPIED:
        staging = gl.allocate_shared_memory(copied.dtype, [2] + copied.block_shape, copied.layout)
        staging_0 = staging.index(0)
        staging_1 = staging.index(1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    ring = (x_ring, codes_ring, ready, free)
    gl.warp_specialize(
        [
            (_multiply, (
                scales, zero_points, bias, out, copied, staging_0, parts, ring, M, N, groups, whole,
                shared, wide, columns, beside, gl.constexpr(0), LAST, STAGES, HAS_BIAS,
                COPIED,
            )),
            (_multiply, (
                scales, zero_points, bias, out, copied, staging_1, parts, ring, M, N, groups, whole,
                shared, wide, columns, beside, gl.constexpr(1), LAST, STAGES, HAS_BIAS,
                COPIED,
            )),
            (_fetch, (
                x, x_last, codes, ring, groups, whole, shared, wide, columns, beside, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
