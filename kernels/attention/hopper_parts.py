"""What the attention kernels for Hopper share: tiles, products, softmax.

A head dim that is not a power of two is two parts, 80 = 64 + 16, each with its own tiles and
products: padding it to 128 would cost 1.6 times the work.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..gluon_support import copyable, gl, gluon, hopper_only, mbarrier, tma, warpgroup_mma
from ..registry import Reason
from ..triton_support import next_power_of_2

LOG2E = 1.4426950408889634
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 32, 128


@gluon.jit
@no_type_check
def maximum(a, b):
    return gl.maximum(a, b)


@gluon.jit
@no_type_check
def fetch(
    desc_0, desc_1, tile_0, tile_1, ready, slot, b, h, row, D_0: gl.constexpr, D_1: gl.constexpr
):
    """Start copying one block, both parts of the head dim; its bytes must be expected already."""
    tma.async_copy_global_to_shared(desc_0, [b, h, row, 0], ready, tile_0.index(slot))
    if D_1 > 0:
        tma.async_copy_global_to_shared(desc_1, [b, h, row, D_0], ready, tile_1.index(slot))


@gluon.jit
@no_type_check
def scores_of(q_0, q_1, k_0, k_1, zero, D_1: gl.constexpr):
    """Start q k^T (tiles in shared memory [M, D] and [N, D])."""
    scores = warpgroup_mma(q_0, k_0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D_1 > 0:
        scores = warpgroup_mma(q_1, k_1.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
@no_type_check
def softmax_step(s, keys, first, end, masked, peak, total, scale):
    """Online softmax over one more tile: weights, factor on what came before, new peak and total."""
    if masked:
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
        s = gl.where(visible, s, float("-inf"))
    peak_new = gl.maximum(peak, gl.reduce(s, 1, maximum))
    shift = gl.where(peak_new == float("-inf"), 0.0, peak_new) * scale
    p = gl.exp2(s * scale - shift[:, None])
    rescale = gl.exp2(peak * scale - shift)
    return p, rescale, peak_new, total * rescale + gl.sum(p, 1)


@gluon.jit
@no_type_check
def rescaled(acc, factor):
    """Rows of acc times their factor; a factor of 0 gives 0 whatever acc holds."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    by_row = gl.convert_layout(factor, LAYOUT)[:, None]
    return gl.where(by_row > 0, acc * by_row, 0.0)


@gluon.jit
@no_type_check
def store_rows(
    out, acc, first, rows_total, stride,
    M: gl.constexpr, LOW: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Write acc [M, WIDTH] to rows first .. and columns LOW .. of out, as far as those exist."""
    LANES: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = first + gl.arange(0, M, gl.SliceLayout(1, LAYOUT))
    dims = LOW + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    gl.store(
        out + rows.to(gl.int64)[:, None] * stride + dims[None, :],
        gl.convert_layout(acc.to(out.dtype.element_ty), LAYOUT),
        mask=(rows < rows_total)[:, None] & (dims < D)[None, :],
    )


@gluon.jit
@no_type_check
def allocate(q_desc, k_desc, v_desc, STAGES: gl.constexpr, Q_STAGES: gl.constexpr):
    """Rings in shared memory of the blocks that these descriptors read."""
    q = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES] + q_desc.block_shape, q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    return q, k, v


@gluon.jit
@no_type_check
def barriers_of(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each slot of a ring, each completed by that many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    return barriers


def head_dim_parts(dim: int) -> tuple[int, int]:
    """Powers of two (the second may be 0) that a head dim is done in: as little padding as can be."""
    whole = next_power_of_2(dim)
    low = whole // 2
    rest = max(16, next_power_of_2(dim - low))
    return (low, rest) if low + rest < whole else (whole, 0)


def unsuitable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Reason:
    """Why these tensors cannot go through the kernels for Hopper; then the portable one serves."""
    reason = hopper_only(q.device)
    if reason is not None:
        return reason
    dim = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, this is {q.dtype}"
    if dim % 8 != 0 or not _MIN_HEAD_DIM <= dim <= _MAX_HEAD_DIM:
        return f"head dims {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM} in steps of 8, this is {dim}"
    if not (copyable(q) and copyable(k) and copyable(v)):
        return "strides or addresses that are not multiples of 16 bytes"
    return None if scale > 0 else f"a scale above 0, this is {scale}"
