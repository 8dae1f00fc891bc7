"""Flash-style attention forward in Triton: softmax computed over tiles of keys, never stored.

The kernel here serves any GPU, dtype and strides; on Hopper most calls go to :mod:`.hopper`.

After Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.1. Every restriction (segments, causal,
window, lengths) is one interval of keys per query row, so a tile of keys is either inside all
intervals of a block of rows (no mask), outside all (never loaded) or masked.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..registry import Reason
from ..triton_support import (
    cdiv,
    check_launch,
    dot,
    dot_precision,
    next_power_of_2,
    on_device,
    tl,
    triton,
)
from . import hopper
from .hopper_parts import LOG2E as LOG2E
from .hopper_parts import unsuitable

_LN2 = tl.constexpr(0.6931471805599453)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Reason:
    """Why the attention kernels cannot take these tensors (dtypes and head dims only)."""
    if q.dtype not in _DTYPES:
        return f"takes float32, bfloat16 or float16, these are {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k, v must have one dtype, are {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"head dims up to {_MAX_HEAD_DIM}, this is {q.shape[-1]}"
    return None


def supports_args(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> Reason:
    """``supports_args`` of the Triton implementation."""
    return check_tensors(q, k, v)


@triton.jit
@no_type_check
def _segment_of(cu_seqlens, n_segments, steps, rows, valid):
    """Key bounds of each row's segment: binary search for the last cu_seqlens[s] <= row.

    ``steps`` halvings are enough for n_segments + 1 entries. Rows outside get an empty interval.
    """
    low = tl.zeros_like(rows)  # cu_seqlens[s] > row for all s >= high, and <= row for all s < low
    high = low + n_segments + 1
    for _step in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        bound = tl.load(cu_seqlens + middle, mask=open_, other=0)
        low = tl.where(open_ & (bound <= rows), middle + 1, low)
        high = tl.where(open_ & (bound > rows), middle, high)
    inside = valid & (low > 0) & (low <= n_segments)
    first = tl.load(cu_seqlens + low - 1, mask=inside, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + low, mask=inside, other=0).to(tl.int32)
    return first, end


@triton.jit
@no_type_check
def online_softmax(scores, v, peak, total, acc, PRECISION: tl.constexpr):
    """One step: base-2 scores [M, N] (-inf where masked) and values [N, D] into peak, total, acc.

    peak: largest score so far, -inf before any; total: sum of 2^(score - peak); acc: the same sum
    weighted by v.
    """
    peak_new = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(peak_new == float("-inf"), 0.0, peak_new)  # a row that has seen nothing yet
    p = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    return peak_new, total, dot(p, v, acc, PRECISION)


@triton.jit
@no_type_check
def _attend_tiles(
    q, k_base, v_base, k_stride_s, k_stride_d, v_stride_s, v_stride_d,
    tile_first, tile_end, key_end, first, end, peak, total, acc, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys tile_first .. tile_end-1, in tiles of BLOCK_N from tile_first; none >= key_end is read.

    With MASKED, row r sees the keys first[r] .. end[r]-1 among them, else all.
    """
    dims = tl.arange(0, BLOCK_D)
    for j in range(tile_first, tile_end, BLOCK_N):
        keys = j + tl.arange(0, BLOCK_N)
        at = keys.to(tl.int64)
        k_at = k_base + dims[:, None] * k_stride_d + at[None, :] * k_stride_s
        v_at = v_base + at[:, None] * v_stride_s + dims[None, :] * v_stride_d
        if MASKED:
            inside = keys < key_end
            k = tl.load(k_at, mask=(dims[:, None] < D) & inside[None, :], other=0.0)
            v = tl.load(v_at, mask=inside[:, None] & (dims[None, :] < D), other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=dims[:, None] < D, other=0.0)
            v = tl.load(v_at, mask=dims[None, :] < D, other=0.0)
        scores = scale * dot(q, k, tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        if MASKED:
            visible = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        peak, total, acc = online_softmax(scores, v, peak, total, acc, PRECISION)
    return peak, total, acc


# Lengths are not specialised on: a new prompt length must not compile a new kernel.
@triton.jit(do_not_specialize=["rows_total", "keys_total", "n_segments", "search_steps", "window"])
@no_type_check
def _flash_kernel(
    q, k, v, out, lse, cu_seqlens, q_start, q_lens,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d,
    k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    rows_total, keys_total, heads, n_segments, search_steps, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr,
    PACKED: tl.constexpr, CACHED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_M query rows of one head. Grid (row blocks, B * Hq).

    CACHED: row i of batch row b is at key position q_start[b] + i, exists for i < q_lens[b], and
    keys exist up to q_start[b] + q_lens[b].
    """
    block = tl.program_id(0)
    if CAUSAL:  # late rows have most keys: start them first
        block = tl.num_programs(0) - 1 - block
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    kv_h = (h // GROUP).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    stored = rows < rows_total

    # The interval of keys that each row sees.
    if CACHED:
        start = tl.load(q_start + b).to(tl.int32)
        count = tl.load(q_lens + b).to(tl.int32)
        valid = stored & (rows < count)
        position = start + rows
        key_end = tl.minimum(start + tl.minimum(count, rows_total), keys_total)
    else:
        valid = stored
        position = rows
        key_end = keys_total
    if PACKED:
        first, end = _segment_of(cu_seqlens, n_segments, search_steps, rows, valid)
    else:
        first = tl.zeros_like(rows)
        end = first + key_end
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    if WINDOWED:
        first = tl.maximum(first, position - window + 1)
    seen = valid & (first < end)

    # Keys that any row sees, and the part of them that every row sees.
    any_first = tl.min(tl.where(seen, first, keys_total))
    any_end = tl.max(tl.where(seen, end, 0))
    all_first = tl.max(tl.where(seen, first, 0))
    all_end = tl.min(tl.where(seen, end, keys_total))
    free_first = any_first + tl.cdiv(tl.maximum(all_first - any_first, 0), BLOCK_N) * BLOCK_N
    free_tiles = tl.maximum(all_end - free_first, 0) // BLOCK_N
    free_end = free_first + free_tiles * BLOCK_N

    row_at = rows.to(tl.int64)
    q_at = q + b * q_stride_b + h.to(tl.int64) * q_stride_h
    q_tile = tl.load(
        q_at + row_at[:, None] * q_stride_s + dims[None, :] * q_stride_d,
        mask=valid[:, None] & (dims[None, :] < D), other=0.0,
    )  # fmt: skip
    k_base = k + b * k_stride_b + kv_h * k_stride_h
    v_base = v + b * v_stride_b + kv_h * v_stride_h
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if PACKED or WINDOWED:
        peak, total, acc = _attend_tiles(
            q_tile, k_base, v_base, k_stride_s, k_stride_d, v_stride_s, v_stride_d,
            any_first, tl.minimum(free_first, any_end), any_end, first, end,
            peak, total, acc, scale,
            D, BLOCK_N, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    peak, total, acc = _attend_tiles(
        q_tile, k_base, v_base, k_stride_s, k_stride_d, v_stride_s, v_stride_d,
        free_first, free_end, any_end, first, end, peak, total, acc, scale,
        D, BLOCK_N, BLOCK_D, False, PRECISION,
    )  # fmt: skip
    peak, total, acc = _attend_tiles(
        q_tile, k_base, v_base, k_stride_s, k_stride_d, v_stride_s, v_stride_d,
        free_end, any_end, any_end, first, end, peak, total, acc, scale,
        D, BLOCK_N, BLOCK_D, True, PRECISION,
    )  # fmt: skip

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    result = tl.where(seen[:, None], result, 0.0)
    out_at = out + ((b * rows_total + row_at) * heads + h)[:, None] * D + dims[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=stored[:, None] & (dims[None, :] < D))
    if WITH_LSE:
        natural = _LN2 * (peak + tl.log2(tl.where(total > 0, total, 1.0)))
        lse_at = lse + tl.program_id(1).to(tl.int64) * rows_total + row_at
        tl.store(lse_at, tl.where(seen, natural, 0.0), mask=stored)


def _blocks(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Block of rows, tile of keys, warps; within the 99 KiB of shared memory of any recent GPU."""
    wanted = max(16, next_power_of_2(rows))
    if dtype == torch.float32:  # multiply-add units, unrolled: small tiles, or compiling takes long
        return min(32, wanted), 32 if dim <= 128 else 16, 4
    if dim > 128:
        return min(64, wanted), 32, 4
    block_m = min(128, wanted)
    return block_m, 64, 8 if block_m == 128 and dim > 64 else 4


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    window: int = 0,
    cu_seqlens: torch.Tensor | None = None,
    q_start: torch.Tensor | None = None,
    q_lens: torch.Tensor | None = None,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the kernel; nothing is read on the host, the grid follows from shapes alone.

    q [B, Hq, S, D]; k, v [B, Hkv, N, D], any strides. ``q_start`` and ``q_lens`` (int [B], both or
    neither): row i is at key position q_start + i, rows from q_lens on are zero, and only keys
    before q_start + q_lens exist. Returns [B, S, Hq, D], contiguous, and ``with_lse`` the rows'
    natural log-sum-exp, float32 [B, Hq, S], 0 where a row sees no key.
    """
    check_launch("attention", q)
    batch, heads, rows, dim = q.shape
    out = torch.empty((batch, rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = None
    if with_lse:
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if unsuitable(q, k, v, scale) is None:
        hopper.flash_forward(
            q, k, v, out, lse, scale, causal=causal, window=window,
            cu_seqlens=cu_seqlens, q_start=q_start, q_lens=q_lens,
        )  # fmt: skip
        return out, lse
    block_m, block_n, warps = _blocks(rows, dim, q.dtype)
    segments = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with on_device(q):
        _flash_kernel[(cdiv(rows, block_m), batch * heads)](
            q, k, v, out, lse, cu_seqlens, q_start, q_lens,
            *q.stride(), *k.stride(), *v.stride(),
            rows, k.shape[2], heads, segments, (segments + 1).bit_length(), scale * LOG2E, window,
            GROUP=heads // k.shape[1], D=dim,
            PACKED=cu_seqlens is not None, CACHED=q_start is not None,
            CAUSAL=causal, WINDOWED=window > 0, WITH_LSE=with_lse,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=max(16, next_power_of_2(dim)),
            PRECISION=dot_precision(q.dtype), num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out, lse


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """See :func:`.reference.reference`."""
    return flash_forward(q, k, v, scale, causal=causal, window=window, cu_seqlens=cu_seqlens)[0]


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.reference_lse`."""
    out, lse = flash_forward(
        q, k, v, scale, causal=causal, window=window, cu_seqlens=cu_seqlens, with_lse=True
    )
    assert lse is not None
    return out, lse
