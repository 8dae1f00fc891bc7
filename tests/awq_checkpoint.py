"""AWQ checkpoints of tiny models in AutoAWQ's "gemm" format, written from the format's description.

Nothing here is shared with the code that reads them. ``reference`` is transformers' own model with
the weights that the codes stand for, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import tiny, tiny_checkpoint

GROUP = 32
PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Output channel of eight that each nibble of a word holds, the lowest bits first."""

CONFIG: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


@dataclass(frozen=True)
class Packed:
    """One linear: integers 0..15 by input and output channel, and what the file holds of it."""

    codes: torch.Tensor  # [K, N]
    zeros: torch.Tensor  # [K / GROUP, N]
    scales: torch.Tensor  # float16 [K / GROUP, N]

    def weight(self) -> torch.Tensor:
        """Float32 ``[N, K]``."""
        inputs, outputs = self.codes.shape
        weight = torch.empty(outputs, inputs)
        for k in range(inputs):
            group = k // GROUP
            weight[:, k] = (self.codes[k] - self.zeros[group]) * self.scales[group].float()
        return weight

    def tensors(self, places: list[int] = PLACES) -> dict[str, torch.Tensor]:
        return {
            "qweight": words(self.codes, places),
            "qzeros": words(self.zeros, places),
            "scales": self.scales,
        }


def words(values: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Integers ``[R, N]``, eight to an int32."""
    rows = []
    for row in values.tolist():
        packed = []
        for j in range(0, len(row), 8):
            word = sum(row[j + channel] << (4 * i) for i, channel in enumerate(places))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def quantized(weight: torch.Tensor, seed: int) -> Packed:
    """Random codes and zero points whose weights are about as large as these ``[N, K]``."""
    g = torch.Generator().manual_seed(seed)
    outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (inputs, outputs), generator=g)
    zeros = torch.randint(0, 16, (inputs // GROUP, outputs), generator=g)
    spread = 0.5 + torch.rand(inputs // GROUP, outputs, generator=g)
    return Packed(codes, zeros, (weight.std() / 6.5 * spread).half())


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """What AWQ tools quantize: the linears of decoder layers, by path."""
    layers = model.model.language_model.layers
    return {
        f"model.language_model.layers.{n}": m
        for n, m in layers.named_modules()
        if isinstance(m, torch.nn.Linear)
    }


@cache
def packed(name: str) -> dict[str, Packed]:
    """The codes of a tiny model's linears, by path."""
    found = linears(tiny.model(name))
    return {path: quantized(m.weight, seed) for seed, (path, m) in enumerate(found.items())}


@cache
def reference(name: str) -> Any:
    """transformers' model of what the checkpoint stands for: not to be changed."""
    model = tiny.build(name)
    for path, linear in linears(model).items():
        linear.weight.copy_(packed(name)[path].weight())
    return model


PUBLISHED = {"llava": "language_model.model.", "qwen": "model."}
"""What published checkpoints call ``model.language_model.`` of transformers' models."""


def write(
    folder: Path,
    name: str = "llava",
    *,
    config: dict[str, Any] | None = None,
    published: bool = True,
    places: list[int] = PLACES,
    skip: Callable[[str], bool] = lambda path: False,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda held: None,
) -> Path:
    """A checkpoint directory.

    Args:
        config: other entries of ``quantization_config``; ``...`` takes one out.
        published: names as published checkpoints have them, else those of transformers' models.
        skip: linears, by path, that are left in floating point.
        change: damage to do to the tensors.
    """
    model = reference(name)
    model.save_pretrained(folder)
    tiny_checkpoint.processor().save_pretrained(folder)
    file = folder / "model.safetensors"
    held = load_file(file) if published else dict(model.state_dict())
    for path, linear in packed(name).items():
        if skip(path):
            continue
        if published:
            path = path.replace("model.language_model.", PUBLISHED[name])
        del held[f"{path}.weight"]
        held |= {f"{path}.{part}": t for part, t in linear.tensors(places).items()}
    change(held)
    save_file({k: v.contiguous() for k, v in held.items()}, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    given = CONFIG | (config or {})
    settings["quantization_config"] = {k: v for k, v in given.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def split(folder: Path) -> Path:
    """The weights in two files with an index; codes and scales of a linear apart."""
    file = folder / "model.safetensors"
    held = load_file(file)
    file.unlink()
    where = {n: f"model-0000{1 + n.endswith('scales')}-of-00002.safetensors" for n in held}
    for shard in set(where.values()):
        part = {n: t for n, t in held.items() if where[n] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
