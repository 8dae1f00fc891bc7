"""Decode attention in Triton: one new token a batch row, the keys split among programs.

After Dao et al., "Flash-Decoding" (2023). What makes it fast where a call lasts microseconds:

* Keys are the wide operand: scores are K qT, [keys, heads of a group], and a group of up to eight
  query heads fills the eight columns that the smallest tensor-core instruction has.
* A program's share is one list, its slots of the index and then its part of the tail, of which it
  first counts the slots in use: shares are even whatever the lengths and the padding.
* The new token is attended from the arguments by the program that also writes it to the cache,
  where nobody reads it meanwhile.
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..attention.triton import LOG2E
from ..triton_support import (
    _INTERPRETED,
    cdiv,
    check_launch,
    dot,
    dot_precision,
    interpreting,
    next_power_of_2,
    on_device,
    tl,
    triton,
)
from .decode_config import Config, configure, slots_of_a_share

_MAX_GROUP = 16
_COMBINED_COLUMNS = 64
_COUNTED_AT_ONCE = 4096


@triton.jit
@no_type_check
def _wait_for_previous():
    """Until the kernels before this one are done; what precedes overlaps with their end."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
@no_type_check
def _slot(i, split, splits, RUN: tl.constexpr):
    """Slot of the index that is the i-th of a share: runs of RUN slots are dealt out in turn."""
    return ((i // RUN) * splits + split) * RUN + i % RUN


@triton.jit
@no_type_check
def _let_next_start():
    """The next kernel may be brought onto the processors, up to where it waits for this one."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
@no_type_check
def _place(i, named, named_end, end, limit, run_start, INDEXED: tl.constexpr):
    """Cache positions of the share's keys i [N], and which of them there are."""
    at = (run_start - named_end + i).to(tl.int64)
    present = i < end
    if INDEXED:
        of_index = i < named_end
        present = present & (~of_index | ((named >= 0) & (named < limit)))
        at = tl.where(of_index, named, at)
    return at, present


@triton.jit
@no_type_check
def _load_tile(
    k_old, v_old, at, present, kc_stride_s, kc_stride_d, vc_stride_s, vc_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys [N, D] and values [D, N] at cache positions ``at`` [N]."""
    dims = tl.arange(0, BLOCK_D)
    keys = tl.load(
        k_old + at[:, None] * kc_stride_s + dims[None, :] * kc_stride_d,
        mask=present[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    values = tl.load(
        v_old + at[None, :] * vc_stride_s + dims[:, None] * vc_stride_d,
        mask=present[None, :] & (dims < D)[:, None], other=0.0,
    )  # fmt: skip
    return keys, values


@triton.jit
@no_type_check
def _attend_tile(keys, values, present, q_tile, scale, peak, total, acc, PRECISION: tl.constexpr):
    """One step of online softmax: peak and total [M], acc [D, M]."""
    scores = tl.zeros([keys.shape[0], q_tile.shape[1]], tl.float32)
    scores = scale * dot(keys, q_tile, scores, PRECISION)
    scores = tl.where(present[:, None], scores, float("-inf"))
    peak_new = tl.maximum(peak, tl.max(scores, 0))
    shift = tl.where(peak_new == float("-inf"), 0.0, peak_new)  # nothing seen yet
    p = tl.exp2(scores - shift[None, :])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(p, 0)
    acc = acc * rescale[None, :]
    if _INTERPRETED:  # there a cast to bfloat16 truncates, and dot widens anyway
        acc = dot(values, p, acc, PRECISION)
    else:
        acc = dot(values, p.to(values.dtype), acc, PRECISION)
    return peak_new, total, acc


@triton.jit
@no_type_check
def _named(index_row, index_stride_i, i, end, indexed, split, splits, RUN: tl.constexpr):
    """The index entries i [N] of a share, -1 from ``end`` on and past the last slot."""
    slot = _slot(i, split, splits, RUN)
    return tl.load(
        index_row + slot.to(tl.int64) * index_stride_i,
        mask=(i < end) & (slot < indexed), other=-1,
    ).to(tl.int64)  # fmt: skip


_VARYING = [
    "capacity", "kv_heads", "indexed", "window", "index_stride_b", "index_stride_h",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def _decode_kernel(
    q, k, v, k_cache, v_cache, cache_lens, new_lens, index, tail_start,
    partial, partial_lse,
    q_stride_b, q_stride_h, q_stride_d,
    k_stride_b, k_stride_h, k_stride_d,
    v_stride_b, v_stride_h, v_stride_d,
    kc_stride_b, kc_stride_h, kc_stride_s, kc_stride_d,
    vc_stride_b, vc_stride_h, vc_stride_s, vc_stride_d,
    index_stride_b, index_stride_h, index_stride_i,
    capacity, kv_heads, indexed, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, INDEXED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COUNTED: tl.constexpr,
    RUN: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One share of the keys, for the heads of one group. Grid (splits, B * Hkv)."""
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    group = tl.program_id(1).to(tl.int64)
    b = group // kv_heads
    kv_h = group % kv_heads
    if OVERLAP:
        _wait_for_previous()
        _let_next_start()

    start = tl.load(cache_lens + b).to(tl.int32)
    active = tl.load(new_lens + b).to(tl.int32) > 0
    held = tl.minimum(start, capacity)
    tail = 0
    if INDEXED:
        tail = tl.load(tail_start + b).to(tl.int32)

    heads = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    q_tile = tl.load(
        q + b * q_stride_b + (kv_h * GROUP + heads)[None, :] * q_stride_h
        + dims[:, None] * q_stride_d,
        mask=inside[:, None] & (heads < GROUP)[None, :], other=0.0,
    )  # fmt: skip
    mine = inside & (split == splits - 1)  # the smallest share also takes the new token
    k_new = tl.load(
        k + b * k_stride_b + kv_h * k_stride_h + dims * k_stride_d, mask=mine, other=0.0
    )
    v_new = tl.load(
        v + b * v_stride_b + kv_h * v_stride_h + dims * v_stride_d, mask=mine, other=0.0
    )
    k_old = k_cache + b * kc_stride_b + kv_h * kc_stride_h
    v_old = v_cache + b * vc_stride_b + kv_h * vc_stride_h

    # This share: its slots of the index, up to the last in use where they are more than a tile, then
    # its part of the tail.
    lane = tl.arange(0, BLOCK_N)
    index_row = index
    named_end = 0
    named = tl.zeros([BLOCK_N], tl.int64)
    if INDEXED:
        index_row += b * index_stride_b + kv_h * index_stride_h
        named_end = tl.cdiv(indexed, splits * RUN) * RUN
        named = _named(index_row, index_stride_i, lane, named_end, indexed, split, splits, RUN)
        if COUNTED > 0:
            used = 0
            for first in range(0, named_end, COUNTED):
                i = first + tl.arange(0, COUNTED)
                entry = _named(index_row, index_stride_i, i, named_end, indexed, split, splits, RUN)
                used = tl.maximum(used, tl.max(tl.where(entry >= 0, i + 1, 0), 0))
            named_end = used
    lowest = tail
    if WINDOWED:
        lowest = tl.maximum(tail, start - window + 1)
    run = tl.cdiv(tl.maximum(held - lowest, 0), splits)
    run_start = lowest + split * run
    end = named_end + tl.minimum(tl.maximum(held - run_start, 0), run)
    end = tl.where(active, end, 0)
    limit = tl.minimum(tail, held)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    for first in range(0, end, BLOCK_N):
        i = first + lane
        at, present = _place(i, named, named_end, end, limit, run_start, INDEXED)
        if INDEXED:
            named = _named(
                index_row, index_stride_i, i + BLOCK_N, named_end, indexed, split, splits, RUN
            )
        keys, values = _load_tile(
            k_old, v_old, at, present, kc_stride_s, kc_stride_d, vc_stride_s, vc_stride_d,
            D, BLOCK_D,
        )  # fmt: skip
        peak, total, acc = _attend_tile(
            keys, values, present, q_tile, scale, peak, total, acc, PRECISION
        )

    if split == splits - 1:
        kept = active & (start < capacity)
        position = start.to(tl.int64)
        tl.store(k_old + position * kc_stride_s + dims * kc_stride_d, k_new, mask=inside & kept)
        tl.store(v_old + position * vc_stride_s + dims * vc_stride_d, v_new, mask=inside & kept)
        score = scale * tl.sum(k_new.to(tl.float32)[:, None] * q_tile.to(tl.float32), 0)
        score = tl.where(kept & (start >= tail), score, float("-inf"))
        peak_new = tl.maximum(peak, score)
        shift = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        weight = tl.exp2(score - shift)
        rescale = tl.exp2(peak - shift)
        total = total * rescale + weight
        acc = acc * rescale[None, :] + v_new.to(tl.float32)[:, None] * weight[None, :]
        peak = peak_new

    used = heads < GROUP
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, peak + tl.log2(divisor), float("-inf"))
    slot = (group * splits + split) * GROUP + heads
    tl.store(partial_lse + slot, lse, mask=used)
    tl.store(
        partial + slot[None, :] * D + dims[:, None], acc / divisor[None, :],
        mask=(used & (total > 0))[None, :] & inside[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def _combine_kernel(
    partial, partial_lse, out, splits,
    GROUP: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one head of the output: the shares' results weighted by 2^lse, in their order.

    A share that saw no key (lse -inf) wrote no result and is not read.
    Grid (cdiv(D, COLUMNS), GROUP, B * Hkv).
    """
    dims = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    every = tl.arange(0, ALL)
    row = (tl.program_id(2).to(tl.int64) * splits + every) * GROUP + tl.program_id(1)
    if OVERLAP:
        _wait_for_previous()
        _let_next_start()
    lse = tl.load(partial_lse + row, mask=every < splits, other=float("-inf"))
    value = tl.load(
        partial + row[:, None] * D + dims[None, :],
        mask=(every < splits)[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    peak = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    result = tl.sum(tl.where((weight > 0)[:, None], value * weight[:, None], 0.0), 0)
    result = result / tl.where(total > 0, total, 1.0)
    at = (tl.program_id(2).to(tl.int64) * GROUP + tl.program_id(1)) * D + dims
    tl.store(out + at, result.to(out.dtype.element_ty), mask=dims < D)


def serves(q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether this is decoding that :func:`decode_forward` is made for."""
    return q.shape[2] == 1 and q.shape[1] <= _MAX_GROUP * k_cache.shape[1]


def decode_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scale: float,
    *,
    window: int = 0,
    index: torch.Tensor | None = None,
    tail_start: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Append one token a row to the cache and attend; grids follow from shapes alone.

    Arguments as in ``cached_attention`` and ``retrieval_attention`` with S = 1; ``index`` and
    ``tail_start`` both or neither. Returns [B, 1, Hq, D], contiguous, q's dtype.
    """
    check_launch("cached_attention" if index is None else "retrieval_attention", q)
    batch, heads, _, dim = q.shape
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    out = torch.empty((batch, 1, heads, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    indexed = 0 if index is None else index.shape[2]
    if config is None:
        config = configure(
            batch, kv_heads, group, dim, q.dtype,
            capacity if index is None else indexed, index is not None, q.device,
        )  # fmt: skip
    splits = config.splits
    partial = torch.empty((batch * heads * splits, dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(batch * heads * splits, dtype=torch.float32, device=q.device)
    if index is None:
        index_strides = (0, 0, 0)
    else:  # one index for all heads of a batch row, or one a key/value head
        index_strides = (index.stride(0), index.stride(1) * (index.shape[1] > 1), index.stride(2))
    slots = slots_of_a_share(indexed, splits, config.run)
    block_d = max(16, next_power_of_2(dim))
    overlap = not interpreting() and torch.cuda.get_device_capability(q.device) >= (9, 0)
    options = {"launch_pdl": True} if overlap else {}
    with on_device(q):
        _decode_kernel[(splits, batch * kv_heads)](
            q, k, v, k_cache, v_cache, cache_lens, new_lens, index, tail_start,
            partial, partial_lse,
            q.stride(0), q.stride(1), q.stride(3), k.stride(0), k.stride(1), k.stride(3),
            v.stride(0), v.stride(1), v.stride(3), *k_cache.stride(), *v_cache.stride(),
            *index_strides, capacity, kv_heads, indexed, scale * LOG2E, window,
            GROUP=group, D=dim, INDEXED=index is not None, WINDOWED=window > 0,
            BLOCK_M=max(8, next_power_of_2(group)), BLOCK_N=config.block_n, BLOCK_D=block_d,
            COUNTED=0 if slots <= config.block_n else min(_COUNTED_AT_ONCE, next_power_of_2(slots)),
            RUN=config.run,
            PRECISION=dot_precision(q.dtype), OVERLAP=overlap,
            num_warps=config.warps, num_stages=config.stages, **options,
        )  # fmt: skip
        columns = min(block_d, _COMBINED_COLUMNS)
        _combine_kernel[(cdiv(dim, columns), group, batch * kv_heads)](
            partial, partial_lse, out, splits,
            GROUP=group, D=dim, COLUMNS=columns, ALL=next_power_of_2(splits), OVERLAP=overlap,
            num_warps=4, **options,
        )  # fmt: skip
    return out
