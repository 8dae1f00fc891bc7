"""The language model of the dense AWQ pipeline on stock kernels: prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.headline_types import LanguageShape
from benchmarks.stock import elementwise as ew
from benchmarks.stock.attention import Attention
from benchmarks.stock.elementwise import Product
from benchmarks.stock.linears import DecodeLinear, Int4, build

BLOCK = 16384  # rows of one MLP product at prefill: bounds memory


@dataclass
class Layer:
    """One decoder layer; the four linears are q/k/v merged, o, gate/up merged, down."""

    linears: dict[str, DecodeLinear]
    qkv_bias: Tensor | None
    first_norm: Tensor
    second_norm: Tensor


def rope_positions(grids: list[tuple[int, int]], before: int, after: int, mrope: bool) -> Tensor:
    """Positions ``[3, prompt]`` of text, pictures' grids (in visual tokens), text.

    With mRoPE a picture's tokens share t and count h and w from where the text stopped, and text
    goes on after the largest; without it all three count on.
    """
    parts = [torch.arange(before).expand(3, -1)]
    at = before
    for height, width in grids:
        if mrope:
            t = torch.zeros(height * width, dtype=torch.long)
            h = torch.arange(height).repeat_interleave(width)
            w = torch.arange(width).repeat(height)
            parts.append(torch.stack((t, h, w)) + at)
            at += max(height, width)
        else:
            parts.append(torch.arange(at, at + height * width).expand(3, -1))
            at += height * width
    parts.append(torch.arange(at, at + after).expand(3, -1))
    return torch.cat(parts, 1)


class Language:
    """Random weights of a shape, a static cache, and its forward passes.

    ``keys`` and ``values``: one tensor ``[batch, kv heads, length, D]`` for each layer.
    """

    def __init__(
        self,
        shape: LanguageShape,
        kinds: dict[str, str],
        batch: int,
        length: int,
        device: torch.device,
        *,
        keep: bool = False,
    ) -> None:
        """``kinds``: what :func:`choose` chose; ``keep`` the unpacked weights, for a reference."""
        self.shape, self.device = shape, device
        bf16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.kept: list[dict[str, Int4]] = []
        self.layers = []
        for _ in range(shape.layers):
            weights = {n: Int4.random(k, m, device) for n, (k, m) in shape.linears.items()}
            if keep:
                self.kept.append(weights)
            self.layers.append(
                Layer(
                    {name: build(kinds[name], w) for name, w in weights.items()},
                    torch.randn(shape.linears["qkv"][1], **bf16) * 0.1 if shape.qkv_bias else None,
                    1 + 0.1 * torch.randn(shape.hidden, **bf16),
                    1 + 0.1 * torch.randn(shape.hidden, **bf16),
                )
            )
        self.norm = 1 + 0.1 * torch.randn(shape.hidden, **bf16)
        self.embedding = torch.randn(shape.vocab, shape.hidden, **bf16)
        self.head = torch.randn(shape.vocab, shape.hidden, **bf16) * shape.hidden**-0.5
        self.scratch = {n: torch.empty(m, k, **bf16) for n, (k, m) in shape.linears.items()}
        cache = (batch, shape.kv_heads, length, shape.head_dim)
        self.keys = [torch.zeros(cache, **bf16) for _ in self.layers]
        self.values = [torch.zeros(cache, **bf16) for _ in self.layers]

    def weight_bytes(self) -> int:
        layers = sum(linear.bytes() for la in self.layers for linear in la.linears.values())
        return layers + self.embedding.nbytes + self.head.nbytes

    def cache_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[S, D]`` float32 for positions ``[3, S]``."""
        shape = self.shape
        half = shape.head_dim // 2
        powers = torch.arange(half, device=self.device, dtype=torch.float32) / half
        inverse = shape.rope_theta**-powers
        angles = positions.to(self.device).float()[..., None] * inverse  # [3, S, D / 2]
        if shape.mrope_section is not None:
            parts = angles.split(shape.mrope_section, -1)
            angle = torch.cat([part[i] for i, part in enumerate(parts)], -1)
        else:
            angle = angles[0]
        both = torch.cat((angle, angle), -1)
        return both.cos(), both.sin()

    def prefill(
        self, rows: list[Tensor], first: int, cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        """Run prompts ``[S, hidden]`` bf16, cached as rows ``first``…; logits of their last tokens.

        A layer's weights are dequantised once for all the rows of a call.
        """
        eps = self.shape.norm_eps
        length = rows[0].shape[0]
        normed = [ew.norm(x, self.layers[0].first_norm, None, eps, "bf16").value for x in rows]
        for index, layer in enumerate(self.layers):
            weight = {n: layer.linears[n].dense(out) for n, out in self.scratch.items()}
            last = index + 1 == len(self.layers)
            next_norm = self.norm if last else self.layers[index + 1].first_norm
            for i, x in enumerate(rows):
                keys, values = (
                    t[index][first + i, :, :length].transpose(0, 1)
                    for t in (self.keys, self.values)
                )
                qkv = Product(F.linear(normed[i], weight["qkv"]), bias=layer.qkv_bias)
                q = ew.prefill_rope(qkv, cos, sin, keys, values)
                mixed = attention(q[None], keys[None], values[None], True)[0].flatten(1)
                product = Product(F.linear(mixed, weight["o"]))
                x, mlp = ew.add_norm(product, x, layer.second_norm, None, eps, "bf16")
                out = torch.empty_like(x)
                for start in range(0, length, BLOCK):
                    both = F.linear(mlp.value[start : start + BLOCK], weight["gate_up"])
                    active = ew.silu_mul(Product(both), "bf16").value
                    torch.mm(active, weight["down"].t(), out=out[start : start + BLOCK])
                rows[i], after = ew.add_norm(Product(out), x, next_norm, None, eps, "bf16")
                normed[i] = after.value
        ends = torch.stack([x[-1] for x in normed])
        return F.linear(ends, self.head)

    def decode(
        self,
        tokens: Tensor,
        at: Tensor,
        length: int,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
    ) -> Tensor:
        """One step: ``tokens [B]`` at cache position ``at [1]`` = ``length - 1``; logits.

        ``cos`` and ``sin`` ``[1, D]`` of the step's position. Capturable: no shape depends on data.
        """
        eps = self.shape.norm_eps
        x = F.embedding(tokens, self.embedding)
        normed = ew.norm(x, self.layers[0].first_norm, None, eps, "bf16").value
        for index, layer in enumerate(self.layers):
            linears = layer.linears
            last = index + 1 == len(self.layers)
            next_norm = self.norm if last else self.layers[index + 1].first_norm
            keys, values = self.keys[index], self.values[index]
            qkv = Product(linears["qkv"].few(normed), bias=layer.qkv_bias)
            q = ew.decode_rope(qkv, cos, sin, keys, values, at)
            filled_keys, filled_values = (t[:, :, :length].transpose(1, 2) for t in (keys, values))
            mixed = attention(q[:, None], filled_keys, filled_values, False).flatten(1)
            product = Product(linears["o"].few(mixed))
            x, mlp = ew.add_norm(product, x, layer.second_norm, None, eps, "bf16")
            active = ew.silu_mul(Product(linears["gate_up"].few(mlp.value)), "bf16").value
            product = Product(linears["down"].few(active))
            x, after = ew.add_norm(product, x, next_norm, None, eps, "bf16")
            normed = after.value
        return F.linear(normed, self.head)
