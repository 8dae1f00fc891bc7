"""Codes to operands of matrix instructions, in registers: what the 16-bit kernels share.

The stored words are read as half-words: half-word h of a row holds input channels 4 h .. 4 h + 3 in
its nibbles 0..3. Of four threads that own a row of an operand, thread t loads the t-th quarter of a
group (16 bytes of codes at group size 128); nibble i of two neighbouring half-words then becomes one
register of two 16-bit floats by shift, mask and subtraction. Which channels meet in one matrix
instruction is free as long as x is put in the same order, so channels are taken in the order in which
the threads already hold them: the weight passes through no shuffle and no second buffer.

``code - zero_point`` is exact in 16 bits and the scale is applied to a group's float32 sum, so
weights are never rounded.
"""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import _INTERPRETED, HAVE_TRITON, tl, triton

LANES_FIRST = not HAVE_TRITON or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Whether Triton spreads the first dimensions of a load over a warp's lanes (to 3.6) or the last.

Only speed hangs on it: taken the wrong way round, operands pass through shared memory.
"""
_LANES_FIRST = tl.constexpr(LANES_FIRST)


def _unpack_ptx(dtype: str, magic: str, one: str) -> str:
    """PTX: nibble i of the two half-words in $4, plus $5, to output $i; all pairs of 16-bit floats.

    ``magic | code`` is ``2**7 + code`` in bfloat16, ``2**10 + code`` in float16, both exactly; $5 is
    minus that of the zero point.
    """
    lines = ["{", ".reg .b32 bits, one;", f"mov.b32 one, {one};"]
    for i in range(4):
        if i:
            lines.append(f"shr.b32 bits, $4, {4 * i};")
        lines.append(f"lop3.b32 bits, {'bits' if i else '$4'}, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"fma.rn.{dtype}x2 ${i}, bits, one, $5;")
    return "\n".join([*lines, "}"])


_UNPACK_BFLOAT16 = tl.constexpr(_unpack_ptx("bf16", "0x43004300", "0x3F803F80"))
_UNPACK_FLOAT16 = tl.constexpr(_unpack_ptx("f16", "0x64006400", "0x3C003C00"))
_MINUS_128 = tl.constexpr(0xC300 - 0x10000)  # bits of bfloat16 -128, as a signed half-word
_MINUS_1024 = tl.constexpr(0xE400 - 0x10000)  # bits of float16 -1024

# One thread asks for a contiguous piece of memory; nothing waits for it.
_PREFETCH = tl.constexpr("""{
.reg .pred first;
.reg .b32 thread;
mov.u32 thread, %tid.x;
setp.eq.u32 first, thread, 0;
@first cp.async.bulk.prefetch.L2.global [$1], $2;
mov.b32 $0, 0;
}""")


@triton.jit
@no_type_check
def prefetch(pointer, size):
    """Ask for ``size`` bytes (a multiple of 16) from a 16-byte aligned address: to the L2 cache."""
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r", [pointer, size], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
@no_type_check
def along(SIZE: tl.constexpr, AXIS: tl.constexpr, RANK: tl.constexpr, TAIL: tl.constexpr = 0):
    """0 .. SIZE - 1 along dimension AXIS of RANK, counted from the one that lanes vary first.

    TAIL more dimensions follow, AXIS = RANK and on, which a thread holds whole.
    """
    DIM: tl.constexpr = AXIS if _LANES_FIRST or AXIS >= RANK else RANK - 1 - AXIS
    index = tl.arange(0, SIZE)
    for dim in tl.static_range(RANK + TAIL):
        if dim != DIM:
            index = tl.expand_dims(index, dim)
    return index


@triton.jit
@no_type_check
def unpack(half_words, zero_points, DTYPE: tl.constexpr):
    """``code - zero_point`` [..., V, 4] in DTYPE.

    half_words int16 [..., V]; zero_points uint8, to be broadcast over them.
    """
    if _INTERPRETED:  # no PTX there; float32 loses nothing
        wide = half_words.to(tl.int32)
        zero = zero_points.to(tl.int32)
        a = ((wide & 15) - zero).to(tl.float32)
        b = (((wide >> 4) & 15) - zero).to(tl.float32)
        c = (((wide >> 8) & 15) - zero).to(tl.float32)
        d = (((wide >> 12) & 15) - zero).to(tl.float32)
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        minus = (zero_points.to(tl.int16) | _MINUS_128).to(tl.bfloat16, bitcast=True)
        a, b, c, d = tl.inline_asm_elementwise(
            _UNPACK_BFLOAT16,
            "=r,=r,=r,=r,r,r",
            [half_words, minus],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        minus = (zero_points.to(tl.int16) | _MINUS_1024).to(tl.float16, bitcast=True)
        a, b, c, d = tl.inline_asm_elementwise(
            _UNPACK_FLOAT16,
            "=r,=r,=r,=r,r,r",
            [half_words, minus],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    codes = tl.join(tl.join(a, c), tl.join(b, d))  # [..., V, 2, 2], the second 2 fastest
    return tl.reshape(codes, half_words.shape + [4])
