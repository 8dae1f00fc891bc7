"""Attention of few queries over many keys in Triton, the keys split among programs.

For 2 to a few dozen new tokens a batch row (:mod:`.decode` serves one). After Dao et al.,
"Flash-Decoding" (2023): each program attends one share of the keys for all query
heads of a group at once, so that keys and values are loaded once; a second kernel combines the
shares by their log-sum-exp, in a fixed order. The new tokens are attended from the arguments, and
the program that attends them also writes them to the cache, where nobody reads them meanwhile.

Serves ``cached_attention`` (keys 0 .. cache_lens-1) and ``retrieval_attention`` (keys named by an
index, read in place, then those from tail_start on).
"""

from __future__ import annotations

from typing import no_type_check

import torch

from ..attention.triton import LOG2E, online_softmax
from ..triton_support import (
    cdiv,
    check_launch,
    dot,
    dot_precision,
    next_power_of_2,
    on_device,
    processors,
    tl,
    triton,
)
from .decode import decode_forward, serves

_MAX_SPLITS = 128
_COMBINED_AT_ONCE = 16


@triton.jit
@no_type_check
def _attend_tile(
    q, k_base, v_base, k_stride_s, k_stride_d, v_stride_s, v_stride_d,
    at, loaded, visible, peak, total, acc, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys at cache positions ``at`` (int64 [N]); visible: bool [M, N] or [1, N]."""
    dims = tl.arange(0, BLOCK_D)
    k = tl.load(
        k_base + dims[:, None] * k_stride_d + at[None, :] * k_stride_s,
        mask=(dims[:, None] < D) & loaded[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(
        v_base + at[:, None] * v_stride_s + dims[None, :] * v_stride_d,
        mask=loaded[:, None] & (dims[None, :] < D), other=0.0,
    )  # fmt: skip
    scores = scale * dot(q, k, tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
    scores = tl.where(visible, scores, float("-inf"))
    return online_softmax(scores, v, peak, total, acc, PRECISION)


@triton.jit
@no_type_check
def write_new(
    new, cache, new_stride_s, new_stride_d, cache_stride_s, cache_stride_d,
    tokens, position, kept, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy the kept new tokens [N] of one head to their cache positions."""
    dims = tl.arange(0, BLOCK_D)
    mask = kept[:, None] & (dims[None, :] < D)
    value = tl.load(
        new + tokens.to(tl.int64)[:, None] * new_stride_s + dims[None, :] * new_stride_d, mask=mask
    )
    tl.store(
        cache + position.to(tl.int64)[:, None] * cache_stride_s + dims[None, :] * cache_stride_d,
        value, mask=mask,
    )  # fmt: skip


@triton.jit(do_not_specialize=["new_total", "capacity", "indexed", "window"])
@no_type_check
def _split_kernel(
    q, k, v, k_cache, v_cache, cache_lens, new_lens, index, tail_start, partial, partial_lse,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d,
    k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    kc_stride_b, kc_stride_h, kc_stride_s, kc_stride_d,
    vc_stride_b, vc_stride_h, vc_stride_s, vc_stride_d,
    index_stride_b, index_stride_h, index_stride_i,
    new_total, capacity, kv_heads, indexed, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, INDEXED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the keys, for one block of rows of one group. Grid (splits, blocks, B * Hkv).

    Row r of a group is query r // GROUP, head r % GROUP. The shares follow from the lengths, read
    here: the grid does not depend on them.
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    b = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_h = (tl.program_id(2) % kv_heads).to(tl.int64)
    start = tl.load(cache_lens + b).to(tl.int32)
    count = tl.minimum(tl.load(new_lens + b).to(tl.int32), new_total)
    held = tl.minimum(start, capacity)

    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows // GROUP
    head = kv_h * GROUP + rows % GROUP
    stored = query < new_total
    valid = query < count
    position = start + query
    dims = tl.arange(0, BLOCK_D)
    q_tile = tl.load(
        q + b * q_stride_b + head[:, None] * q_stride_h
        + query.to(tl.int64)[:, None] * q_stride_s + dims[None, :] * q_stride_d,
        mask=valid[:, None] & (dims[None, :] < D), other=0.0,
    )  # fmt: skip
    k_new = k + b * k_stride_b + kv_h * k_stride_h
    v_new = v + b * v_stride_b + kv_h * v_stride_h
    k_old = k_cache + b * kc_stride_b + kv_h * kc_stride_h
    v_old = v_cache + b * vc_stride_b + kv_h * vc_stride_h

    # The keys: `indexed` named ones, then the contiguous tail .. held-1, then the new tokens.
    tail = 0
    index_tiles = 0
    if INDEXED:
        tail = tl.load(tail_start + b).to(tl.int32)
        index_tiles = tl.cdiv(indexed, BLOCK_N)
    lowest = tail
    if WINDOWED:
        lowest = tl.maximum(tail, start + (tl.program_id(1) * BLOCK_M) // GROUP - window + 1)
    any_row = (tl.program_id(1) * BLOCK_M) // GROUP < count
    tiles = index_tiles + tl.cdiv(tl.maximum(held - lowest, 0), BLOCK_N)
    tiles = tl.where(any_row, tiles, 0)
    share = tl.cdiv(tiles, splits)
    first_tile = split * share
    end_tile = tl.minimum(first_tile + share, tiles)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_N)

    if INDEXED:
        limit = tl.minimum(tail, held)
        for tile in range(first_tile, tl.minimum(end_tile, index_tiles)):
            slot = tile * BLOCK_N + lane
            named = tl.load(
                index + b * index_stride_b + kv_h * index_stride_h
                + slot.to(tl.int64) * index_stride_i,
                mask=slot < indexed, other=-1,
            ).to(tl.int64)  # fmt: skip
            present = (named >= 0) & (named < limit)
            peak, total, acc = _attend_tile(
                q_tile, k_old, v_old, kc_stride_s, kc_stride_d, vc_stride_s, vc_stride_d,
                named, present, present[None, :], peak, total, acc, scale,
                D, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    for tile in range(tl.maximum(first_tile, index_tiles), end_tile):
        key = lowest + (tile - index_tiles) * BLOCK_N + lane
        present = key < held
        visible = present[None, :]
        if WINDOWED:
            visible = visible & (position[:, None] - key[None, :] < window)
        peak, total, acc = _attend_tile(
            q_tile, k_old, v_old, kc_stride_s, kc_stride_d, vc_stride_s, vc_stride_d,
            key.to(tl.int64), present, visible, peak, total, acc, scale,
            D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip

    if split == splits - 1:  # the smallest share
        kept_end = tl.minimum(count, tl.maximum(capacity - start, 0))
        for first_new in range(0, kept_end, BLOCK_N):
            token = first_new + lane
            kept = token < kept_end
            visible = kept[None, :] & (token[None, :] <= query[:, None])
            if INDEXED:
                visible = visible & (start + token >= tail)[None, :]
            if WINDOWED:
                visible = visible & (query[:, None] - token[None, :] < window)
            peak, total, acc = _attend_tile(
                q_tile, k_new, v_new, k_stride_s, k_stride_d, v_stride_s, v_stride_d,
                token.to(tl.int64), kept, visible, peak, total, acc, scale,
                D, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
            if tl.program_id(1) == 0:
                write_new(
                    k_new, k_old, k_stride_s, k_stride_d, kc_stride_s, kc_stride_d,
                    token, start + token, kept, D, BLOCK_D,
                )  # fmt: skip
                write_new(
                    v_new, v_old, v_stride_s, v_stride_d, vc_stride_s, vc_stride_d,
                    token, start + token, kept, D, BLOCK_D,
                )  # fmt: skip

    seen = valid & (total > 0)
    slot = ((b * new_total + query) * (kv_heads * GROUP) + head) * splits + split
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = tl.where(seen, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(partial_lse + slot, lse, mask=stored)
    tl.store(
        partial + slot[:, None] * D + dims[None, :],
        result, mask=seen[:, None] & (dims[None, :] < D),
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def _combine_kernel(
    partial, partial_lse, out, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of the output: the shares' results weighted by 2^lse. Grid (B * S * Hq,).

    A share that saw no key (lse -inf) wrote no result and is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    every = tl.arange(0, ALL)
    lses = tl.load(partial_lse + row * splits + every, mask=every < splits, other=float("-inf"))
    peak = tl.max(lses, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lses - shift), 0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, CHUNK):
        some = first + tl.arange(0, CHUNK)
        lse = tl.load(partial_lse + row * splits + some, mask=some < splits, other=float("-inf"))
        used = (lse > float("-inf"))[:, None] & (dims[None, :] < D)
        value = tl.load(
            partial + (row * splits + some)[:, None] * D + dims[None, :], mask=used, other=0.0
        )
        acc += tl.sum(value * tl.exp2(lse - shift)[:, None], 0)
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + dims, result.to(out.dtype.element_ty), mask=dims < D)


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many shares: about two programs a processor, none without a tile at full cache."""
    return max(1, min(2 * processors(device) // programs, tiles, _MAX_SPLITS))


def split_kv_forward(
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
) -> torch.Tensor:
    """Append to the cache and attend, in two launches whose grids follow from shapes alone.

    Arguments as in ``cached_attention`` and ``retrieval_attention``; ``index`` and ``tail_start``
    both or neither. Returns [B, S, Hq, D], contiguous, q's dtype.
    """
    batch, heads, rows, dim = q.shape
    if serves(q, k_cache):
        return decode_forward(
            q, k, v, k_cache, v_cache, cache_lens, new_lens, scale,
            window=window, index=index, tail_start=tail_start,
        )  # fmt: skip
    check_launch("cached_attention" if index is None else "retrieval_attention", q)
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    out = torch.empty((batch, rows, heads, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    # By bytes of a row of D, for shared memory and, in float32, for the time to compile.
    block_n = {256: 64, 512: 32, 1024: 16}[max(256, next_power_of_2(dim) * q.element_size())]
    block_m = min(64 if block_n == 64 else 32, max(16, next_power_of_2(group * rows)))
    blocks = cdiv(group * rows, block_m)
    indexed = 0 if index is None else index.shape[2]
    tiles = cdiv(indexed, block_n) + cdiv(capacity, block_n)
    splits = _splits(batch * kv_heads * blocks, tiles, q.device)
    partial = torch.empty((batch * rows * heads, splits, dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial.shape[:2], dtype=torch.float32, device=q.device)
    if index is None:
        index_strides = (0, 0, 0)
    else:  # one index for all heads of a batch row, or one a key/value head
        index_strides = (index.stride(0), index.stride(1) * (index.shape[1] > 1), index.stride(2))
    block_d = max(16, next_power_of_2(dim))
    with on_device(q):
        _split_kernel[(splits, blocks, batch * kv_heads)](
            q, k, v, k_cache, v_cache, cache_lens, new_lens, index, tail_start,
            partial, partial_lse,
            *q.stride(), *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
            *index_strides, rows, capacity, kv_heads, indexed, scale * LOG2E, window,
            GROUP=group, D=dim, INDEXED=index is not None, WINDOWED=window > 0,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
            PRECISION=dot_precision(q.dtype), num_warps=4, num_stages=2,
        )  # fmt: skip
        _combine_kernel[(batch * rows * heads,)](
            partial, partial_lse, out, splits,
            D=dim, BLOCK_D=block_d, ALL=next_power_of_2(splits), CHUNK=_COMBINED_AT_ONCE,
            num_warps=4,
        )  # fmt: skip
    return out
