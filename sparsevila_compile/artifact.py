"""The module artifact: a directory of JSON graphs, safetensors, configuration and processor.

What it shares with the ONNX bundle (staging, hashes, manifest) is in ``manifest``. Nothing in it is
unpickled or executed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_json import component_from_json, component_to_json
from sparsevila_compile.manifest import (
    MODULE,
    Extras,
    check_files,
    check_listed,
    check_target,
    identity,
    put_json,
    read_json,
    read_manifest,
    read_program,
    write_directory,
)
from sparsevila_compile.program import Program
from sparsevila_compile.report import PassReport

FORMAT = MODULE.format
MANIFEST = MODULE.manifest
SHARD_BYTES = 4 << 30


# ---------------------------------------------------------------------- writing


def save(
    program: Program,
    processor: Any,
    reports: Sequence[PassReport],
    recipe: dict[str, Any],
    path: str | Path,
    overwrite: bool = False,
    generation_config: Any = None,
) -> Path:
    """Write an artifact, whole or not at all.

    Args:
        program: a lowered program.
        recipe: the resolved recipe, saved as it is.
        path: directory to make.
        overwrite: replace an artifact that is there.

    Raises:
        UserError: the place is taken or cannot be written, or the disk is full.
    """
    target = check_target(path, overwrite)

    def fill(folder: Path) -> dict[str, Any]:
        for component in program.components.values():
            put_json(folder, f"graphs/{component.name}.json", component_to_json(component))
        aliases, shards = _write_weights(program.weights, folder)
        return {"aliases": aliases, "weights": shards}

    extras = Extras(processor, reports, recipe, generation_config)
    try:
        return write_directory(MODULE, target, program, extras, fill)
    except safetensors.SafetensorError as error:
        raise UserError(f"{target}: cannot write the weights: {error}") from error


def _write_weights(
    weights: dict[str, torch.Tensor], folder: Path
) -> tuple[dict[str, str], list[str]]:
    """Save each distinct tensor once; returns aliases of tied ones and the files."""
    first: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        key = identity(name, tensor)
        if key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        count = tensor.numel() * tensor.element_size()
        if size and size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += count
    names = []
    for i, shard in enumerate(shards):
        names.append(f"weights-{i + 1:05d}-of-{len(shards):05d}.safetensors")
        owned = {
            k: v.clone() if v.untyped_storage().nbytes() != v.numel() * v.element_size() else v
            for k, v in shard.items()
        }
        safetensors.torch.save_file(owned, str(folder / names[-1]))
    return aliases, names


# ---------------------------------------------------------------------- reading


def load_program(path: str | Path, device: torch.device | None = None) -> Program:
    """Read an artifact's program onto its device.

    Raises:
        UserError: a file is missing, damaged, or asks for what graphs may not do; or the device is
            not of the kind that the artifact was compiled for.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    made_for = str(manifest.get("device"))
    if made_for not in ("cpu", "cuda"):
        raise UserError(f"{folder / MANIFEST}: damaged: unknown device {made_for!r}; compile again")
    where = device or torch.device(made_for)
    if where.type != made_for:
        raise UserError(
            f"{folder}: compiled for {made_for}, not {where.type}: its kernels are chosen; compile again with model.device: {where.type}"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{folder}: compiled for CUDA, and no CUDA device is here; compile again with model.device: cpu"
        )
    import sparsevila_compile.ops  # noqa: F401  (declares the canonical ops)

    try:
        graphs = {name: f"graphs/{name}.json" for name in manifest["components"]}
        check_listed(folder, manifest, [*graphs.values(), *manifest["weights"]], MODULE)
        components = {}
        for name, file in ((n, folder / f) for n, f in graphs.items()):
            try:
                components[name] = component_from_json(read_json(file), where)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"{file}: damaged: {type(error).__name__}: {error}") from error
        weights = _read_weights(folder, manifest, where)
        program = read_program(
            manifest, read_json(folder / "config.json"), components, weights, where
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged: {type(error).__name__}: {error}") from error
    for component in components.values():
        for name in sorted(component.weight_names() - set(weights)):
            raise UserError(
                f"{folder}: damaged: the {component.name} graph wants a weight {name} that no file holds"
            )
    return program


def _read_weights(
    folder: Path, manifest: dict[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name in manifest["weights"]:
        try:
            weights |= safetensors.torch.load_file(str(folder / name), device=str(device))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: damaged: {error}") from error
    for name, source in manifest["aliases"].items():
        weights[name] = weights[source]
    return weights
