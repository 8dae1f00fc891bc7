"""The kernel for many rows of x: writes the weight out in 16 bits, for the library's own product."""

from __future__ import annotations

from typing import no_type_check

from ..triton_support import tl, triton


@triton.jit
@no_type_check
def dequantize_rows(
    qweight,  # int32 [N, K // 8]
    scales,  # [N, K // GROUP]
    zero_points,  # uint8 [N, K // GROUP]
    out,  # [N, K]
    total,  # N * (K // GROUP)
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK groups: a word of eight codes to each thread, and 16 bytes from it."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = group < total
    word = tl.arange(0, GROUP // 8)
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)[:, None, None]
    zero = tl.load(zero_points + group, mask=inside, other=0).to(tl.float32)[:, None, None]
    at = group[:, None].to(tl.int64) * (GROUP // 8) + word[None, :]
    words = tl.load(qweight + at, mask=inside[:, None], other=0)[:, :, None]
    place = tl.arange(0, 8)[None, None, :]
    # As the low bits of a float32 whose last place is 1: converting integers is four times slower.
    codes = (((words >> (4 * place)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    weight = (codes - zero) * scale
    tl.store(
        out + at[:, :, None] * 8 + place,
        weight.to(out.dtype.element_ty),
        mask=inside[:, None, None],
    )
