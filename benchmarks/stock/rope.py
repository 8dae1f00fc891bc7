"""Decode's RoPE, q/k/v bias and cache write as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    qkv,
    bias,
    cos,
    sin,
    q_out,
    keys,
    values,
    at,
    cache_batch,
    cache_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BIASED: tl.constexpr,
):
    # One program for one head of one row: 0 .. HEADS are q, then k, then v.
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, HALF)
    start = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF
    low = tl.load(start + dim).to(tl.float32)
    high = tl.load(start + HALF + dim).to(tl.float32)
    if BIASED:
        low += tl.load(bias + head * 2 * HALF + dim).to(tl.float32)
        high += tl.load(bias + head * 2 * HALF + HALF + dim).to(tl.float32)
    turned_low, turned_high = low, high
    if head < HEADS + KV_HEADS:
        turned_low = low * tl.load(cos + dim) - high * tl.load(sin + dim)
        turned_high = high * tl.load(cos + HALF + dim) + low * tl.load(sin + HALF + dim)
    place = row * cache_batch + tl.load(at) * 2 * HALF
    if head < HEADS:
        out = q_out + (row * HEADS + head) * 2 * HALF
    elif head < HEADS + KV_HEADS:
        out = keys + place + (head - HEADS) * cache_head
    else:
        out = values + place + (head - HEADS - KV_HEADS) * cache_head
    tl.store(out + dim, turned_low.to(tl.bfloat16))
    tl.store(out + HALF + dim, turned_high.to(tl.bfloat16))


def rope_and_cache(
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
) -> Tensor:
    """``qkv [B, (heads + 2 kv) D]`` bf16 to rotated q ``[B, heads, D]``; k and v into the caches
    ``[B, kv, S, D]`` at position ``at [1]``. ``cos`` and ``sin`` ``[1, D]`` float32."""
    batch, kv_heads, _, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = torch.empty(batch, heads, dim, device=qkv.device, dtype=qkv.dtype)
    _kernel[(batch, heads + 2 * kv_heads)](
        qkv,
        qkv if bias is None else bias,
        cos,
        sin,
        q,
        keys,
        values,
        at,
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        BIASED=bias is not None,
        num_warps=1,
    )
    return q
