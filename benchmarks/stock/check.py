"""Whether the stock pipeline computes what a plain float32 forward computes, before it is timed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.headline_types import ModelShape
from benchmarks.stock.attention import Attention
from benchmarks.stock.language import Language, rope_positions
from benchmarks.stock.reference import language_logits, vision_tokens
from benchmarks.stock.vision import Vision

# Relative error ||out - reference|| / ||reference|| against float32 on the same weights, over two
# layers. bf16 rounds to 2^-9 at every step; int8 and fp8 round weights and activations besides.
BOUNDS = {"language": 0.03, "bf16": 0.03, "int8": 0.06, "fp8": 0.10}


def error(out: Tensor, reference: Tensor) -> float:
    """Relative error; infinite where ``out`` is not finite, an error where the reference is tiny."""
    wanted = reference.double()
    scale = float(wanted.square().mean().sqrt())
    if not 1e-2 < scale < 1e3:
        raise ArithmeticError(f"the reference's scale is {scale:.3g}: the check means nothing")
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out.double() - wanted).norm() / wanted.norm())


def two_layers(shape: ModelShape) -> ModelShape:
    """The same widths, two layers of each tower (one windowed, one full), a small vocabulary."""
    windowed = shape.vision.kind == "qwen2_5_vl"
    return replace(
        shape,
        language=replace(shape.language, layers=2, vocab=min(shape.language.vocab, 1024)),
        vision=replace(
            shape.vision,
            layers=2 if windowed else 3,  # CLIP's last layer is not used
            full_attention=(1,) if windowed else (),
        ),
    )


@torch.no_grad()
def check_vision(
    shape: ModelShape, kind: str, device: torch.device, full: Attention, local: Attention
) -> float:
    """The tower's error in one precision, over two pictures; raises where it exceeds its bound."""
    small = two_layers(shape).vision
    grid = (16, 24) if small.kind == "qwen2_5_vl" else (24, 24)
    patches = torch.randn(2, grid[0] * grid[1], small.patch_dim, device=device).bfloat16()
    reference = Vision(small, "bf16", device)
    wanted = torch.stack([vision_tokens(reference, p, grid) for p in patches])
    found = error(Vision(small, kind, device).forward(patches, grid, full, local), wanted)
    return _bounded(f"vision tower, {kind}", found, BOUNDS[kind])


@torch.no_grad()
def check_language(
    shape: ModelShape,
    kinds: dict[str, str],
    batch: int,
    device: torch.device,
    prefill: Attention,
    decode: Attention,
) -> tuple[float, float]:
    """Errors of prefill's and of the next decode step's logits; raises beyond the bound."""
    small = two_layers(shape).language
    grids = [(6, 8), (8, 4)]
    length = 16 + sum(h * w for h, w in grids) + 9
    model = Language(small, kinds, batch, length + 4, device, keep=True)
    positions = rope_positions(grids, 16, 9 + 1, small.mrope_section is not None)
    cos, sin = model.rope(positions)
    rows = [torch.randn(length, small.hidden, device=device).bfloat16() for _ in range(batch)]
    asked = [0, batch - 1]
    wanted = [language_logits(model, rows[i], positions[:, :-1])[-1] for i in asked]
    given = [x.clone() for x in rows]
    logits = model.prefill(given, 0, cos[:length], sin[:length], prefill)
    first = error(logits[asked], torch.stack(wanted))
    tokens = logits.argmax(-1)
    at = torch.tensor([length], device=device)
    logits = model.decode(tokens, at, length + 1, cos[length:], sin[length:], decode)
    wanted = [
        language_logits(model, torch.cat((rows[i], model.embedding[tokens[i]][None])), positions)[
            -1
        ]
        for i in asked
    ]
    second = error(logits[asked], torch.stack(wanted))
    bound = BOUNDS["language"]
    return _bounded("prefill", first, bound), _bounded("decode", second, bound)


def _bounded(what: str, found: float, bound: float) -> float:
    if not found < bound:
        raise ArithmeticError(
            f"{what}: relative error {found:.3g} against float32, bound {bound}: not timed"
        )
    return found
