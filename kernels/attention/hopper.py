"""Attention forward on Hopper (compute capability 9), in Gluon.

After Shah et al., "FlashAttention-3" (arXiv 2407.08608), sections 3.1 and 3.2: one warp keeps the
copy engine fetching queries, keys and values into a ring in shared memory; two groups of four warps
take 64 query rows each, and while the tensor cores multiply one tile's weights by its values, the
same warps compute the next tile's softmax. A program does several blocks of rows in turn, so that
the next block's loads overlap with the end of this one.

Few rows over many keys (FEW; after Dao et al., "Flash-Decoding", 2023): the heads of a group are
rows of one block, the keys are split among programs, and a second kernel combines the shares.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import torch

from ..gluon_support import copyable, descriptor
from ..triton_support import cdiv, next_power_of_2, on_device, processors, tl, triton
from .hopper_kernel import flash_kernel
from .hopper_parts import LOG2E, head_dim_parts
from .hopper_windows import windows_forward

_ROWS = 64
"""Query rows of a group of warps: what one warp-group product takes."""
_KEYS = 128
_STAGES = 2
_COMBINED = 16
_FEW_ROWS = 512
_MAX_SPLITS = 64
_START = 4
"""What it takes to start an item, in times of a tile of keys (about 1.5 us)."""
_COMBINED_A_TILE = 6000
"""Rows of one share that are written and combined in that time."""
_SHORT = 256
"""Segments of at most so many rows on average go to the kernel for windows."""
_MANY_ROWS = 4096
"""From here on a program does one item: the processors are then filled as they come free."""


@triton.jit(do_not_specialize=["rows_total", "splits"])
@no_type_check
def _combine_kernel(
    shares, share_lse, out, lse, rows_total, splits, kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Shares weighted by exp(lse), in a fixed order. Grid (blocks of ROWS queries, Hq, B).

    A share that saw no key has an lse of -inf and zeros.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = query < rows_total
    dims = tl.arange(0, BLOCK_D)
    row = h % GROUP * rows_total + query
    grouped_rows = GROUP * rows_total
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for share in range(splits):
        at = share * tl.num_programs(2) + b
        one = tl.load(
            share_lse + (at * kv_heads + h // GROUP) * grouped_rows + row,
            mask=exists, other=float("-inf"),
        )  # fmt: skip
        value = tl.load(
            shares + ((at * grouped_rows + row) * kv_heads + h // GROUP)[:, None] * D + dims[None, :],
            mask=exists[:, None] & (dims < D)[None, :], other=0.0,
        )  # fmt: skip
        peak_new = tl.maximum(peak, one)
        shift = tl.where(peak_new == float("-inf"), 0.0, peak_new)
        before, now = tl.exp(peak - shift), tl.exp(one - shift)
        total = total * before + now
        acc = acc * before[:, None] + value * now[:, None]
        peak = peak_new
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    out_at = out + ((b * rows_total + query) * (kv_heads * GROUP) + h)[:, None] * D + dims[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=exists[:, None] & (dims < D)[None, :])
    if WITH_LSE:
        natural = tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), 0.0)
        lse_at = lse + (b * (kv_heads * GROUP) + h) * rows_total + query
        tl.store(lse_at, natural, mask=exists)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    *,
    causal: bool,
    window: int,
    cu_seqlens: torch.Tensor | None,
    q_start: torch.Tensor | None,
    q_lens: torch.Tensor | None,
    queries: int,
    splits: int,
) -> None:
    batch, heads, rows, dim = q.shape
    segments = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = cdiv(rows, 2 * _ROWS)
    if cu_seqlens is not None:  # a segment does not share a block with another
        blocks = rows // (2 * _ROWS) + segments + 2
    items = blocks * batch * heads * max(1, splits)
    programs = items
    if cu_seqlens is not None or rows < _MANY_ROWS:
        programs = min(items, processors(q.device))
    parts = head_dim_parts(dim)
    descriptors = [
        descriptor(tensor, (1, 1, length, part or 16))
        for tensor, length in ((q, _ROWS), (k, _KEYS), (v, _KEYS))
        for part in parts
    ]
    with on_device(q):
        flash_kernel[(programs,)](
            *descriptors, out, lse, cu_seqlens, q_start, q_lens,
            rows, k.shape[2], heads, items, blocks, queries, max(1, splits), window,
            segments, scale * LOG2E,
            GROUP=heads // k.shape[1], D=dim, D_0=parts[0], D_1=parts[1],
            M=_ROWS, N=_KEYS, STAGES=_STAGES,
            PACKED=cu_seqlens is not None, CACHED=q_start is not None, CAUSAL=causal,
            WINDOWED=window > 0, WITH_LSE=lse is not None, FEW=splits > 0, num_warps=4,
        )  # fmt: skip


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    *,
    causal: bool,
    window: int,
    cu_seqlens: torch.Tensor | None,
    q_start: torch.Tensor | None,
    q_lens: torch.Tensor | None,
) -> None:
    """Launch on tensors that are not ``unsuitable``; arguments as in the portable launch.

    Writes out [B, S, Hq, D], contiguous, and if given lse [B, Hq, S].
    """
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    packed_only = not causal and lse is None
    if cu_seqlens is not None and packed_only and rows <= _SHORT * (cu_seqlens.shape[0] - 1):
        windows_forward(q, k, v, out, cu_seqlens, scale)
        return
    splits = 0
    if q_start is not None:
        splits = _splits(batch, heads, kv_heads, rows, k.shape[2], processors(q.device))
    if splits == 0:
        _launch(
            q, k, v, out, lse, scale, causal=causal, window=window, cu_seqlens=cu_seqlens,
            q_start=q_start, q_lens=q_lens, queries=rows, splits=0,
        )  # fmt: skip
        return
    grouped = q.reshape(batch, kv_heads, group * rows, dim)
    if not copyable(grouped):
        grouped = grouped.contiguous()
    shares = torch.empty(
        (splits, batch, group * rows, kv_heads, dim), dtype=torch.float32, device=q.device
    )
    share_lse = torch.empty(
        (splits, batch, kv_heads, group * rows), dtype=torch.float32, device=q.device
    )
    _launch(
        grouped, k, v, shares, share_lse, scale, causal=causal, window=window, cu_seqlens=None,
        q_start=q_start, q_lens=q_lens, queries=rows, splits=splits,
    )  # fmt: skip
    with on_device(q):
        _combine_kernel[(cdiv(rows, _COMBINED), heads, batch)](
            shares, share_lse, out, lse, rows, splits, kv_heads,
            GROUP=group, D=dim, BLOCK_D=next_power_of_2(dim), ROWS=_COMBINED,
            WITH_LSE=lse is not None, num_warps=4,
        )  # fmt: skip


@functools.cache
def _splits(batch: int, heads: int, kv_heads: int, rows: int, keys: int, available: int) -> int:
    """How to do few rows: into how many shares to split the keys, the heads of a group sharing
    blocks of rows; 0 where it is better to do each head by itself, over all its keys.

    By the time, in tiles of keys, that the busiest of ``available`` processors takes.
    """
    if rows > _FEW_ROWS:
        return 0
    tiles = cdiv(keys, _KEYS)
    grouped = batch * kv_heads * cdiv(heads // kv_heads * rows, 2 * _ROWS)
    apart = batch * heads * cdiv(rows, 2 * _ROWS)
    best, least = 0, float(cdiv(apart, available) * (tiles + _START))
    for splits in range(1, min(_MAX_SPLITS, cdiv(tiles, 4)) + 1):
        busiest = cdiv(grouped * splits, available) * (cdiv(tiles, splits) + _START)
        combining = _START + splits * batch * heads * rows / _COMBINED_A_TILE
        if busiest + combining < least:
            best, least = splits, busiest + combining
    return best
