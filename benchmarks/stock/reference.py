"""Plain float32 forwards on the stock pipeline's own weights, written apart from it.

Attention materialises its scores with masks built from coordinates, nothing is packed, merged or
reordered: what the pipeline does for speed must not change what it computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.stock.language import Language
from benchmarks.stock.vision import Vision


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.float(), eps)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [heads, S, D]``, the halves of D turned into one another."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """``[heads, S, D]`` each; ``allowed [S, S]``; returns ``[S, heads D]``."""
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def language_logits(model: Language, embeds: Tensor, positions: Tensor) -> Tensor:
    """Logits ``[S, vocab]`` of one whole sequence; ``embeds [S, hidden]``, ``positions [3, S]``.

    Needs a :class:`Language` built with ``keep=True``.
    """
    shape = model.shape
    x = embeds.float()
    length = x.shape[0]
    cos, sin = model.rope(positions)
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    for layer, weights in zip(model.layers, model.kept, strict=True):
        dense = {name: w.dense() for name, w in weights.items()}
        qkv = _rms(x, layer.first_norm, shape.norm_eps) @ dense["qkv"].t()
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias.float()
        heads = qkv.view(length, -1, shape.head_dim).transpose(0, 1)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads))
        shared = shape.heads // shape.kv_heads
        k = _rope(k, cos, sin).repeat_interleave(shared, 0)
        mixed = _attend(_rope(q, cos, sin), k, v.repeat_interleave(shared, 0), causal)
        x = x + mixed @ dense["o"].t()
        gate_up = _rms(x, layer.second_norm, shape.norm_eps) @ dense["gate_up"].t()
        gate, up = gate_up.chunk(2, -1)
        x = x + (F.silu(gate) * up) @ dense["down"].t()
    return _rms(x, model.norm, shape.norm_eps) @ model.head.float().t()


def vision_tokens(model: Vision, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """One picture's visual tokens ``[tokens, out]`` from ``patches [height * width, patch_dim]``.

    Needs a bf16 :class:`Vision`; its weights are read as float32.
    """
    shape = model.shape
    windowed = shape.kind == "qwen2_5_vl"
    x = patches.float() @ model.patch.float().t()
    everyone = torch.ones(1, 1, dtype=torch.bool, device=x.device)
    near, cos, sin = everyone, None, None
    if windowed:
        near, cos, sin = _coordinates(model, grid, x.device)
    else:
        x = torch.cat((model.class_token.float()[None], x)) + model.positions.float()
        weight, bias = model.pre_norm
        x = F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), shape.norm_eps)
    for index, block in enumerate(model.blocks):

        def normed(t: Tensor, which: int, block: object = block) -> Tensor:
            weight, bias = block.norms[which]  # type: ignore[attr-defined]
            if bias is None:
                return _rms(t, weight, shape.norm_eps)
            return F.layer_norm(t, t.shape[-1:], weight.float(), bias.float(), shape.norm_eps)

        def linear(t: Tensor, which: str, block: object = block) -> Tensor:
            used = getattr(block, which)
            return t @ used.weight.float().t() + used.bias.float()

        q, k, v = linear(normed(x, 0), "qkv").view(len(x), 3, shape.heads, -1).permute(1, 2, 0, 3)
        if cos is not None and sin is not None:
            q, k = _rope(q, cos, sin), _rope(k, cos, sin)
        full = not windowed or index in shape.full_attention
        x = x + linear(_attend(q, k, v, everyone if full else near), "proj")
        inner = linear(normed(x, 1), "up")
        if windowed:
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = inner * torch.sigmoid(1.702 * inner)
        x = x + linear(inner, "down")
    if windowed:
        x = _rms(x, model.final_norm, shape.norm_eps).view(-1, shape.hidden * shape.merge**2)
    else:
        x = x[1:]
    (first, bias), (second, last) = model.project
    x = F.gelu(x @ first.float().t() + bias.float())
    return x @ second.float().t() + last.float()


def _coordinates(
    model: Vision, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches share a window ``[S, S]``, and the 2-D RoPE's cos and sin ``[S, D]``.

    Patches come block by block of ``merge`` x ``merge``, as the processor hands them over.
    """
    shape = model.shape
    height, width = grid
    step = shape.merge
    places = [
        (by + dy, bx + dx)
        for by in range(0, height, step)
        for bx in range(0, width, step)
        for dy in range(step)
        for dx in range(step)
    ]
    at = torch.tensor(places, device=device)
    windows = (at // shape.window).unbind(1)
    near = torch.stack([w[:, None] == w[None] for w in windows]).all(0)
    quarter = shape.head_dim // 4
    inverse = torch.tensor([10000.0 ** (-i / quarter) for i in range(quarter)], device=device)
    angle = torch.cat([at[:, i, None] * inverse for i in (0, 1)], 1).repeat(1, 2)
    return near, angle.cos(), angle.sin()
