"""``rotary`` in Triton: one program a token and some of its heads."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from ..dependent_launch import begin, launch_options, wait
from ..triton_support import Reason, cdiv, check_launch, next_power_of_2, on_device, tl, triton
from .reference import check_values

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Reason:
    """Why the kernel cannot take these arguments, or None."""
    for tensor in (q, cos):
        if tensor.dtype not in _DTYPES:
            return f"needs half or float32, not {tensor.dtype}"
    if q.shape[3] > 512:
        return f"holds heads of at most 512 values, not {q.shape[3]}"
    return None


@triton.jit
@no_type_check
def _rotate(
    x,
    out,
    stride_h,
    out_stride_h,
    heads,
    h,
    d,
    half: tl.constexpr,
    c0,
    s0,
    c1,
    s1,
    ROUND: tl.constexpr,
):
    """Heads ``h`` of one token; x and out point at its first head."""
    inside = (h < heads)[:, None] & (d < half)[None, :]
    at = x + h[:, None] * stride_h + d[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    kept0, turned0 = low * c0[None, :], -high * s0[None, :]
    kept1, turned1 = high * c1[None, :], low * s1[None, :]
    if ROUND:  # where models round: each product, then the sum
        kind: tl.constexpr = x.dtype.element_ty
        kept0, turned0 = kept0.to(kind).to(tl.float32), turned0.to(kind).to(tl.float32)
        kept1, turned1 = kept1.to(kind).to(tl.float32), turned1.to(kind).to(tl.float32)
    to = out + h[:, None].to(tl.int64) * out_stride_h + d[None, :]
    tl.store(to, kept0 + turned0, mask=inside)
    tl.store(to + half, kept1 + turned1, mask=inside)


@triton.jit
@no_type_check
def _rotary(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    length,
    head_size,
    q_heads,
    k_heads,
    blocks,
    q_blocks,
    half: tl.constexpr,
    ROUND: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    program = tl.program_id(0)
    block = program % blocks
    token = program // blocks
    b, s = (token // length).to(tl.int64), (token % length).to(tl.int64)
    d = tl.arange(0, HALF)
    inside = d < half
    cosine = cos + b * cos_stride_b + s * cos_stride_s + d
    sine = sin + b * sin_stride_b + s * sin_stride_s + d
    wait(EARLY)
    c0 = tl.load(cosine, mask=inside, other=0.0).to(tl.float32)
    c1 = tl.load(cosine + half, mask=inside, other=0.0).to(tl.float32)
    s0 = tl.load(sine, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sine + half, mask=inside, other=0.0).to(tl.float32)
    if block < q_blocks:
        h = block * HEADS + tl.arange(0, HEADS)
        _rotate(
            q + b * q_stride_b + s * q_stride_s,
            q_out + b * q_heads * head_size + s * 2 * half,
            q_stride_h,
            head_size,
            q_heads,
            h,
            d,
            half,
            c0,
            s0,
            c1,
            s1,
            ROUND,
        )
    else:
        h = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        _rotate(
            k + b * k_stride_b + s * k_stride_s,
            k_out + b * k_heads * head_size + s * 2 * half,
            k_stride_h,
            head_size,
            k_heads,
            h,
            d,
            half,
            c0,
            s0,
            c1,
            s1,
            ROUND,
        )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    heads: int,
    num_warps: int,
) -> None:
    """Run the kernel with that many heads a program; results are contiguous."""
    q, k, cos, sin = (_last_contiguous(t) for t in (q, k, cos, sin))
    batch, length, q_heads, width = q.shape
    k_heads = k.shape[2]
    q_blocks, k_blocks = cdiv(q_heads, heads), cdiv(k_heads, heads)
    blocks = q_blocks + k_blocks
    with on_device(q):
        _rotary[(batch * length * blocks,)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            *q.stride()[:3],
            *k.stride()[:3],
            *cos.stride()[:2],
            *sin.stride()[:2],
            length,
            length * width,
            q_heads,
            k_heads,
            blocks,
            q_blocks,
            half=width // 2,  # a constant: how halves are aligned depends on it
            ROUND=torch.promote_types(q.dtype, cos.dtype) != torch.float32,
            HEADS=heads,
            HALF=next_power_of_2(width // 2),
            num_warps=num_warps,
            # Products are rounded before they are added: not to be fused into one rounding.
            enable_fp_fusion=False,
            **launch_options(q.device),
        )


def warps(tokens: int, width: int) -> int:
    """Warps a program of 16 heads: fewer for many tokens of narrow heads."""
    return 2 if tokens >= 1024 and width <= 96 else 4


def rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    check_values(q, k, cos, sin)
    check_launch("rotary", q)
    batch, length, q_heads, width = q.shape
    q_out = torch.empty((batch, q_heads, length, width), dtype=q.dtype, device=q.device)
    k_out = torch.empty((batch, k.shape[2], length, width), dtype=q.dtype, device=q.device)
    if batch * length:
        launch(q, k, cos, sin, q_out, k_out, 16, warps(batch * length, width))
    return q_out, k_out
