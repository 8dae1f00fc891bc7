"""The kernel for many rows of x on Hopper, in Gluon: codes become operands while products run.

``out^T = weight @ x^T`` by ``wgmma``, in tiles of 128 outputs by 256 rows of x. One warp fetches codes
and tiles of x into a ring; two groups of four warps take 64 outputs each, unpack codes to 16-bit
weights in registers, in the order of the operand, and multiply by the tile of x in shared memory,
unpacking the next while the tensor cores work. No weight is written anywhere. Each weight is rounded
once to x's dtype. Programs stay and take one tile after another.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..gluon_support import (
    copyable,
    descriptor,
    gl,
    gluon,
    hopper_only,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ..triton_support import cdiv

GROUP = 128
OUTPUTS = 128
ROWS = 256
MOST_ROWS = 6144
"""From more rows on, writing the weight out first is a small part of the product."""


def _enough(rows: int) -> float:
    """The share of the processors' time that tiles must fill for this to pay; measured."""
    return 0.84 if rows <= MOST_ROWS // 2 else 0.95


_STAGES = 5


def _ptx(dtype: str, magic: str, one: str) -> str:
    """PTX: from a byte of codes in the low bits of $2 and of $3 two weights each, to $0 and $1.

    $4, $5 are minus the zero point's encoding, $6, $7 the scale, each twice in a register.
    """
    lines = ["{", ".reg .b32 low, high, one;", f"mov.b32 one, {one};"]
    for i in range(2):
        lines += [
            f"lop3.b32 low, ${2 + i}, 0xF, {magic}, 0xEA;",
            f"shl.b32 high, ${2 + i}, 12;",
            "lop3.b32 low, high, 0x000F0000, low, 0xEA;",
            f"fma.rn.{dtype}x2 low, low, one, ${4 + i};",
            f"mul.rn.{dtype}x2 ${i}, low, ${6 + i};",
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
    words = words >> (8 * gl.expand_dims(gl.expand_dims(byte, 0), 0))  # [64, 8, 4]
    words, zero = gl.broadcast(words, gl.expand_dims(gl.expand_dims(zero, 1), 2))
    words, scale = gl.broadcast(words, gl.expand_dims(gl.expand_dims(scale, 1), 2))
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        even, odd = gl.inline_asm_elementwise(
            _BFLOAT16, "=r,=r,r,r,r,r,r,r", [words, zero, scale],
            dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even, odd = gl.inline_asm_elementwise(
            _FLOAT16, "=r,=r,r,r,r,r,r,r", [words, zero, scale],
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
def _multiply(
    scales, zero_points, bias, out, ring, M, N, groups, tiles, blocks,
    WHO: gl.constexpr, T: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Group WHO of four warps: the 64 outputs from 64 * WHO on of each tile."""
    x_ring, codes_ring, ready, free = ring
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
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    done = 0  # half groups
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = (tile // blocks) * 128 + WHO * 64
        rows = first + gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
        at = rows * groups
        inside = rows < N
        scale, zero = _per_group(scales, zero_points, at, inside, DTYPE)
        acc = gl.zeros([64, T], gl.float32, PRODUCT)
        slot = done % STAGES
        mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
        one = _weights(codes_ring.index(2 * slot + WHO), zero, scale, DTYPE, WORDS, OPERAND)
        for group in range(1, groups):
            next_scale, next_zero = _per_group(scales, zero_points, at + group, inside, DTYPE)
            acc = warpgroup_mma(one, x_ring.index(slot).permute((1, 0)), acc, is_async=True)
            other = (done + 1) % STAGES
            mbarrier.wait(ready.index(other), ((done + 1) // STAGES) & 1)
            two = _weights(codes_ring.index(2 * other + WHO), zero, scale, DTYPE, WORDS, OPERAND)
            acc = warpgroup_mma(two, x_ring.index(other).permute((1, 0)), acc, is_async=True)
            scale = next_scale
            zero = next_zero
            done += 2
            after = done % STAGES
            mbarrier.wait(ready.index(after), (done // STAGES) & 1)
            three = _weights(codes_ring.index(2 * after + WHO), zero, scale, DTYPE, WORDS, OPERAND)
            # What is being multiplied passes through the wait: until then its registers are taken.
            acc, one, two, three = warpgroup_mma_wait(0, deps=[acc, one, two, three])
            mbarrier.arrive(free.index(slot))
            mbarrier.arrive(free.index(other))
            one = three
            slot = after
        acc = warpgroup_mma(one, x_ring.index(slot).permute((1, 0)), acc, is_async=True)
        other = (done + 1) % STAGES
        mbarrier.wait(ready.index(other), ((done + 1) // STAGES) & 1)
        two = _weights(codes_ring.index(2 * other + WHO), zero, scale, DTYPE, WORDS, OPERAND)
        acc = warpgroup_mma(two, x_ring.index(other).permute((1, 0)), acc, is_async=True)
        acc, one, two = warpgroup_mma_wait(0, deps=[acc, one, two])
        mbarrier.arrive(free.index(slot))
        mbarrier.arrive(free.index(other))
        done += 2
        if HAS_BIAS:
            n = first + gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))
            acc += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)
        result = gl.convert_layout(acc.to(out.dtype.element_ty).permute(1, 0), STORED)
        m = (tile % blocks) * T + gl.arange(0, T, gl.SliceLayout(1, STORED))[:, None]
        n = first + gl.arange(0, 64, gl.SliceLayout(0, STORED))[None, :]
        gl.store(out + m.to(gl.int64) * N + n, result, mask=(m < M) & (n < N))


@gluon.jit
@no_type_check
def _fetch(x, codes, ring, groups, tiles, blocks, T: gl.constexpr, STAGES: gl.constexpr):
    """The warp that fetches: per tile half a group at a time of x and of the codes."""
    x_ring, codes_ring, ready, free = ring
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for half in range(2 * groups):
            slot = done % STAGES
            mbarrier.wait(free.index(slot), ((done // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, T * 128 + 128 * 32)
            tma.async_copy_global_to_shared(
                x, [(tile % blocks) * T, half * 64], bar, x_ring.index(slot)
            )
            for who in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    codes, [(tile // blocks) * 128 + who * 64, half * 8], bar,
                    codes_ring.index(2 * slot + who),
                )  # fmt: skip
            done += 1


@gluon.jit
@no_type_check
def many_rows(
    x,  # descriptor of [M, K], blocks [T, 64]
    codes,  # descriptor of int32 [N, K // 8], blocks [64, 8], plain
    scales,  # [N, groups], x's dtype
    zero_points,  # uint8 [N, groups]
    bias,  # [N] or unused
    out,  # [M, N]
    M,
    N,
    groups,  # K // 128
    tiles,
    blocks,  # of rows of x
    T: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)
    codes_ring = gl.allocate_shared_memory(
        codes.dtype, [2 * STAGES] + codes.block_shape, codes.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    ring = (x_ring, codes_ring, ready, free)
    gl.warp_specialize(
        [
            (_multiply, (
                scales, zero_points, bias, out, ring, M, N, groups, tiles, blocks,
                gl.constexpr(0), T, STAGES, HAS_BIAS,
            )),
            (_multiply, (
                scales, zero_points, bias, out, ring, M, N, groups, tiles, blocks,
                gl.constexpr(1), T, STAGES, HAS_BIAS,
            )),
            (_fetch, (x, codes, ring, groups, tiles, blocks, T, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def busy(rows: int, outputs: int, multiprocessors: int) -> float:
    """The share of the processors' time that goes into rows and outputs that exist."""
    tiles = cdiv(outputs, OUTPUTS) * cdiv(rows, ROWS)
    rounds = cdiv(tiles, multiprocessors)
    return rows * outputs / (rounds * multiprocessors * OUTPUTS * ROWS)


def multiplies(
    x: torch.Tensor, scales: torch.Tensor, group_size: int, multiprocessors: int
) -> bool:
    """Whether the kernel takes such a linear of many rows."""
    return (
        hopper_only(x.device) is None
        and x.dtype in (torch.bfloat16, torch.float16)
        and scales.dtype == x.dtype
        and group_size == GROUP
        and x.shape[0] <= MOST_ROWS
        and busy(x.shape[0], scales.shape[0], multiprocessors) >= _enough(x.shape[0])
    )


def multiply(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    multiprocessors: int,
) -> None:
    """Launch. The stored tensors contiguous, qweight at a multiple of 16 bytes."""
    if not copyable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    outputs, groups = scales.shape
    blocks = cdiv(x.shape[0], ROWS)
    tiles = cdiv(outputs, OUTPUTS) * blocks
    many_rows[(min(tiles, multiprocessors),)](
        descriptor(x, (ROWS, 64)),
        descriptor(qweight, (64, 8), plain=True),
        scales,
        zero_points,
        out if bias is None else bias,
        out,
        x.shape[0],
        outputs,
        groups,
        tiles,
        blocks,
        T=ROWS,
        STAGES=_STAGES,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
