"""The elementwise parts of the stock pipeline: plain torch, fused by ``torch.compile`` on a GPU.

Every function takes the product of the linear before it as ``Product``: an int8 product still in
int32 with its scales, or a finished product without them. So one tower serves bf16, int8 and fp8.
Norms, RoPE and activations are computed in float32 and rounded to bf16 once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from benchmarks.stock.rope import rope_and_cache

P = ParamSpec("P")
R = TypeVar("R")

EIGHT_BIT = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class Product(NamedTuple):
    """``[rows, N]`` of a linear; where ``row_scale [rows, 1]`` and ``column_scale [N]`` are given,
    int32 still to be scaled by both. ``bias [N]`` is still to be added where given."""

    value: Tensor
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None


class Operand(NamedTuple):
    """``[rows, K]`` that a linear reads: bf16, or 8 bits with ``scale [rows, 1]``."""

    value: Tensor
    scale: Tensor | None = None


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, through ``torch.compile`` where its first tensor is on a GPU.

    The rows of more than one are dynamic, so that one compilation serves every length; a single
    row (decode at batch 1) gets its own.
    """
    fused = torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        flat = [a for a in _flat(arguments) if isinstance(a, Tensor)]
        if not flat[0].is_cuda:
            return function(*arguments, **named)
        rows = flat[0].shape[0]
        if rows > 64:
            for tensor in flat:
                if tensor.shape[0] == rows:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fused(*arguments, **named)

    return call


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    return [x for a in arguments for x in (a if isinstance(a, tuple) else (a,))]


def _finish(product: Product) -> Tensor:
    """The product in float32: scaled where it is int32, bias added."""
    value, rows, columns, bias = product
    out = value.float()
    if rows is not None and columns is not None:
        out = out * rows * columns
    return out if bias is None else out + bias


def _operand(value: Tensor, kind: str) -> Operand:
    """Round float32 to what the next linear reads: bf16, or 8 bits with one scale a row."""
    if kind == "bf16":
        return Operand(value.bfloat16())
    dtype, most = EIGHT_BIT[kind]
    scale = value.abs().amax(-1, keepdim=True).clamp_min(1e-8) / most
    scaled = value / scale
    return Operand((scaled.round() if kind == "int8" else scaled).to(dtype), scale)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or LayerNorm where there is a bias; float32."""
    x = x.float()
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return x if bias is None else x + bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout: ``x [rows, heads, D]``, ``cos`` and ``sin`` ``[rows, D]``.

    The halves are exchanged by a flip, which fuses; a concatenation would be a kernel of its own.
    """
    halves = x.unflatten(-1, (2, -1))
    sines = sin.unflatten(-1, (2, -1))[:, None]
    sines = torch.stack((-sines[..., 0, :], sines[..., 1, :]), -2)
    return x * cos[:, None] + (halves.flip(-2) * sines).flatten(-2)


@compiled
def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Operand:
    """Normalise the residual stream for the first linear."""
    return _operand(_norm(x, weight, bias, eps), kind)


@compiled
def add_norm(
    product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Operand]:
    """Add a linear's product to the residual stream; return it and its norm."""
    total = (x.float() + _finish(product)).bfloat16()
    return total, _operand(_norm(total, weight, bias, eps), kind)


@compiled
def add(product: Product, x: Tensor) -> Tensor:
    """Add a linear's product to the residual stream."""
    return (x.float() + _finish(product)).bfloat16()


@compiled
def to_operand(x: Tensor, kind: str) -> Operand:
    """Quantise an attention output for the next linear."""
    return _operand(x.float(), kind)


@compiled
def silu_mul(product: Product, kind: str) -> Operand:
    """SwiGLU of a merged gate/up product ``[rows, 2 inter]``."""
    gate, up = _finish(product).chunk(2, -1)
    return _operand(gate * torch.sigmoid(gate) * up, kind)


@compiled
def quick_gelu(product: Product, kind: str) -> Operand:
    """CLIP's activation."""
    x = _finish(product)
    return _operand(x * torch.sigmoid(1.702 * x), kind)


@compiled
def finish(product: Product) -> Tensor:
    """A product as bf16."""
    return _finish(product).bfloat16()


@compiled
def vision_rope(product: Product, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Split ``[T, 3 heads D]`` into q, k, v ``[T, heads, D]``, q and k rotated."""
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in _finish(product).chunk(3, -1))
    return _rotate(q, cos, sin).bfloat16(), _rotate(k, cos, sin).bfloat16(), v.bfloat16()


def _split(product: Product, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    heads = _finish(product).unflatten(-1, (-1, cos.shape[-1]))
    many = heads.shape[1] - 2 * kv_heads
    q, k, v = heads.split((many, kv_heads, kv_heads), 1)
    return _rotate(q, cos, sin).bfloat16(), _rotate(k, cos, sin).bfloat16(), v.bfloat16()


@compiled
def prefill_rope(
    product: Product, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate one row's q ``[S, heads, D]``; write k and v to the cache's ``[S, kv heads, D]``."""
    q, k, v = _split(product, cos, sin, keys.shape[1])
    keys.copy_(k)
    values.copy_(v)
    return q


def decode_rope(
    product: Product, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> Tensor:
    """Rotate q ``[B, heads, D]``; write k and v at position ``at [1]`` of ``[B, kv, S, D]``.

    ``cos`` and ``sin`` ``[1, D]``. One kernel on a GPU: the compiler would make three.
    """
    value, bias = product.value, product.bias
    if value.is_cuda:
        return rope_and_cache(value, bias, cos, sin, keys, values, at)
    q, k, v = _split(product, cos, sin, keys.shape[1])
    keys[:, :, at] = k[:, :, None]
    values[:, :, at] = v[:, :, None]
    return q
