"""``cached_attention`` in Triton: split keys for few queries, append and flash forward for many."""

from __future__ import annotations

from typing import no_type_check

import torch

from ..attention.hopper_parts import unsuitable
from ..attention.triton import check_tensors, flash_forward
from ..registry import Reason
from ..triton_support import (
    cdiv,
    check_launch,
    next_power_of_2,
    on_device,
    processors,
    tl,
    triton,
)
from .split_kv import split_kv_forward, write_new

_APPEND_ROWS = 32
_FEW_QUERIES = 16
_FEW_ROWS_HOPPER = 64


def supports_args(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scale: float,
    window: int,
) -> Reason:
    """``supports_args`` of the Triton implementation."""
    return check_tensors(q, k_cache, v_cache)


@triton.jit(do_not_specialize=["new_total", "capacity"])
@no_type_check
def _append_kernel(
    k, v, k_cache, v_cache, cache_lens, new_lens,
    k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    kc_stride_b, kc_stride_h, kc_stride_s, kc_stride_d,
    vc_stride_b, vc_stride_h, vc_stride_s, vc_stride_d,
    new_total, capacity,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy ROWS new tokens of one head to the caches. Grid (blocks of tokens, Hkv, B)."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    start = tl.load(cache_lens + b).to(tl.int32)
    count = tl.minimum(tl.load(new_lens + b).to(tl.int32), new_total)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position = start + token
    kept = (token < count) & (position < capacity)
    write_new(
        k + b * k_stride_b + h * k_stride_h, k_cache + b * kc_stride_b + h * kc_stride_h,
        k_stride_s, k_stride_d, kc_stride_s, kc_stride_d, token, position, kept, D, BLOCK_D,
    )  # fmt: skip
    write_new(
        v + b * v_stride_b + h * v_stride_h, v_cache + b * vc_stride_b + h * vc_stride_h,
        v_stride_s, v_stride_d, vc_stride_s, vc_stride_d, token, position, kept, D, BLOCK_D,
    )  # fmt: skip


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
) -> None:
    """Write k, v [B, Hkv, S, D] to the caches, each batch row from its own length on."""
    check_launch("cached_attention", k)
    batch, heads, rows, dim = k.shape
    with on_device(k):
        _append_kernel[(cdiv(rows, _APPEND_ROWS), heads, batch)](
            k, v, k_cache, v_cache, cache_lens, new_lens,
            *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
            rows, k_cache.shape[2],
            D=dim, ROWS=_APPEND_ROWS, BLOCK_D=next_power_of_2(dim),
        )  # fmt: skip


def _few_queries(q: torch.Tensor, k_cache: torch.Tensor, scale: float) -> bool:
    """Whether :mod:`.split_kv` is faster than flash forward.

    On Hopper the latter splits keys too, and loses only to the smaller blocks of rows of the former.
    Elsewhere it has a block of rows of a head per program, which would leave processors idle.
    """
    batch, heads, rows, _ = q.shape
    if unsuitable(q, k_cache, k_cache, scale) is None:
        return rows * heads // k_cache.shape[1] <= _FEW_ROWS_HOPPER
    return rows <= _FEW_QUERIES or batch * heads * cdiv(rows, 64) < processors(q.device)


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """See :func:`.reference.reference`. Nothing is read on the host: may be captured in a graph."""
    if _few_queries(q, k_cache, scale):
        return split_kv_forward(
            q, k, v, k_cache, v_cache, cache_lens, new_lens, scale, window=window
        )
    if q.numel() > 0:
        _append(k, v, k_cache, v_cache, cache_lens, new_lens)
    return flash_forward(
        q, k_cache, v_cache, scale,
        causal=True, window=window, q_start=cache_lens, q_lens=new_lens,
    )[0]  # fmt: skip


def cached_attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.reference_lse`. Nothing is read on the host."""
    if q.numel() > 0:
        _append(k, v, k_cache, v_cache, cache_lens, new_lens)
    out, lse = flash_forward(
        q, k_cache, v_cache, scale,
        causal=True, window=window, q_start=cache_lens, q_lens=new_lens, with_lse=True,
    )  # fmt: skip
    assert lse is not None
    return out, lse
