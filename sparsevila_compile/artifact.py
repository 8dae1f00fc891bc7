"""The module artifact: a directory of JSON graphs, safetensors, configuration and processor.

It is written beside its place and moved there when complete, so a kill leaves the old artifact or
none. Every file's size and SHA-256 stand in the manifest, and the manifest's own; loading checks
them and names the file that is damaged. Nothing in it is unpickled or executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

import sparsevila_compile
from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_json import (
    component_from_json,
    component_to_json,
    dtype_name,
    dtype_of,
)
from sparsevila_compile.program import (
    CacheSpec,
    Program,
    PruneSpec,
    RetrievalSpec,
    VisionLayout,
)
from sparsevila_compile.report import PassReport
from sparsevila_compile.staging import staged

FORMAT = 1
MANIFEST = "artifact.json"
SHARD_BYTES = 4 << 30


# ---------------------------------------------------------------------- writing


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Refuse early what :func:`save` would refuse late.

    Raises:
        UserError: something is in the way, or the place cannot be written to.
    """
    target = Path(path).absolute()
    if target.exists():
        if not target.is_dir():
            raise UserError(
                f"{target}: is a file; the artifact is a directory, choose another path"
            )
        if any(target.iterdir()):
            if not overwrite:
                raise UserError(
                    f"{target}: exists already; choose another path or ask for overwriting (emit.overwrite: true, or --overwrite)"
                )
            if not (target / MANIFEST).is_file():
                raise UserError(
                    f"{target}: holds no artifact ({MANIFEST} is missing) and is not overwritten; choose another path"
                )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target}: cannot be written: no permission in {parent}")
    return target


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
    if program.stage != "lower":
        raise UserError(
            f"{target}: the program is at stage {program.stage}; only a lowered one runs"
        )
    try:
        with staged(target) as folder:
            _write_files(program, processor, reports, recipe, folder, generation_config)
    except OSError as error:
        raise UserError(
            f"{target}: cannot write the artifact: {error.strerror or error}"
        ) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{target}: cannot write the weights: {error}") from error
    return target


def _write_files(
    program: Program,
    processor: Any,
    reports: Sequence[PassReport],
    recipe: dict[str, Any],
    folder: Path,
    generation_config: Any,
) -> None:
    def put(name: str, data: Any) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

    put("config.json", program.config)
    put("recipe.json", recipe)
    put("report.json", [r.model_dump(mode="json") for r in reports])
    for component in program.components.values():
        put(f"graphs/{component.name}.json", component_to_json(component))
    if generation_config is not None:
        generation_config.save_pretrained(str(folder))
    processor.save_pretrained(str(folder / "processor"))
    aliases, shards = _write_weights(program.weights, folder)
    files = {
        str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": _sha256(f)}
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    manifest = {**_manifest(program), "aliases": aliases, "weights": shards, "files": files}
    put(MANIFEST, {**manifest, "sha256": _own_sha256(manifest)})
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _write_weights(
    weights: dict[str, torch.Tensor], folder: Path
) -> tuple[dict[str, str], list[str]]:
    """Save each distinct tensor once; returns aliases of tied ones and the files."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
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


def _manifest(program: Program) -> dict[str, Any]:
    spec = dataclasses.asdict
    return {
        "format": FORMAT,
        "family": program.family,
        "dtype": dtype_name(program.dtype),
        "device": program.device.type,
        "passes": program.passes,
        "components": list(program.components),
        "layout": spec(program.layout),
        "caches": [{**spec(c), "dtype": dtype_name(c.dtype)} for c in program.caches],
        "prune": spec(program.prune) if program.prune else None,
        "retrieval": spec(program.retrieval) if program.retrieval else None,
        "max_length": program.max_length,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what made the artifact."""
    import transformers

    return {
        "sparsevila-compile": sparsevila_compile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---------------------------------------------------------------------- reading


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        UserError: there is no artifact, it is damaged, or of another format.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such artifact directory")
    if not file.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST} in this directory; it is not an artifact, or not whole"
        )
    manifest = _json(file)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{file}: damaged: it does not list the artifact's files; compile again")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{file}: artifact format {manifest.get('format')!r}; this version reads {FORMAT}; compile again"
        )
    if manifest.get("sha256") != _own_sha256(manifest):
        raise UserError(f"{file}: damaged: its contents are not what was written; compile again")
    return manifest


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}; compile again") from error


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every listed file's size and hash; raise UserError naming the first that differs."""
    for name, facts in manifest["files"].items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{folder / MANIFEST}: damaged: it names {name!r}, outside the artifact"
            )
        if not isinstance(facts, dict):
            raise UserError(
                f"{folder / MANIFEST}: damaged: no size and hash for {name!r}; compile again"
            )
        if not file.is_file():
            raise UserError(f"{file}: missing from the artifact; compile again")
        size = file.stat().st_size
        if size != facts.get("bytes"):
            raise UserError(
                f"{file}: damaged: {size} bytes instead of {facts.get('bytes')}; compile again"
            )
        if _sha256(file) != facts.get("sha256"):
            raise UserError(
                f"{file}: damaged: its contents are not what was written; compile again"
            )


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
        for name in sorted({*graphs.values(), *manifest["weights"]} - set(manifest["files"])):
            raise UserError(f"{folder / MANIFEST}: damaged: it does not list {name}; compile again")
        components = {}
        for name, file in ((n, folder / f) for n, f in graphs.items()):
            try:
                components[name] = component_from_json(_json(file), where)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"{file}: damaged: {type(error).__name__}: {error}") from error
        weights = _read_weights(folder, manifest, where)
        program = _program(manifest, _json(folder / "config.json"), components, weights, where)
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


def _program(
    manifest: dict[str, Any],
    config: dict[str, Any],
    components: dict[str, Any],
    weights: dict[str, torch.Tensor],
    device: torch.device,
) -> Program:
    prune, retrieval = manifest["prune"], manifest["retrieval"]
    if retrieval:
        retrieval = {**retrieval, "layers": tuple(retrieval["layers"])}
    return Program(
        family=manifest["family"],
        config=config,
        components=components,
        weights=weights,
        layout=VisionLayout(**manifest["layout"]),
        dtype=dtype_of(manifest["dtype"]),
        device=device,
        caches=tuple(CacheSpec(**{**c, "dtype": dtype_of(c["dtype"])}) for c in manifest["caches"]),
        prune=PruneSpec(**prune) if prune else None,
        retrieval=RetrievalSpec(**retrieval) if retrieval else None,
        stage="lower",
        passes=list(manifest["passes"]),
        max_length=int(manifest["max_length"]),
    )
