"""What the module artifact and the ONNX bundle share: a directory with a manifest.

The directory is written beside its place and moved there when complete, so a kill leaves the old
one or none. Every file's size and SHA-256 stand in the manifest, and the manifest's own; loading
checks them and names the file that is damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsevila_compile
from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_json import dtype_name, dtype_of
from sparsevila_compile.program import (
    CacheSpec,
    Program,
    PruneSpec,
    RetrievalSpec,
    VisionLayout,
)
from sparsevila_compile.report import PassReport
from sparsevila_compile.staging import staged


@dataclass(frozen=True)
class Kind:
    """A kind of directory: what messages call it, its manifest's name and its format's number."""

    noun: str
    manifest: str
    format: int


MODULE = Kind("artifact", "artifact.json", 1)
ONNX = Kind("bundle", "bundle.json", 1)
KINDS = (MODULE, ONNX)


def kind_of(path: str | Path) -> Kind:
    """The kind of a directory, told by its manifest; :data:`MODULE` where there is none."""
    return ONNX if (Path(path) / ONNX.manifest).is_file() else MODULE


# ---------------------------------------------------------------------- writing


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Refuse early what writing would refuse late.

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
            if not any((target / kind.manifest).is_file() for kind in KINDS):
                raise UserError(
                    f"{target}: holds no artifact ({MODULE.manifest} is missing) and is not overwritten; choose another path"
                )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target}: cannot be written: no permission in {parent}")
    return target


def put_json(folder: Path, name: str, data: Any) -> None:
    """Write plain data as a file of the directory."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Extras:
    """What lies beside the graphs: processor, reports, the resolved recipe, generation defaults."""

    processor: Any
    reports: Sequence[PassReport]
    recipe: dict[str, Any]
    generation_config: Any = None


def write_directory(
    kind: Kind,
    target: Path,
    program: Program,
    extras: Extras,
    fill: Callable[[Path], dict[str, Any]],
) -> Path:
    """Write a directory of that kind, whole or not at all.

    Args:
        program: a lowered program.
        target: what :func:`check_target` returned.
        fill: writes graphs and weights into the folder that it is given; what it returns is added
            to the manifest.

    Raises:
        UserError: the program is not lowered, or the place cannot be written, or the disk is full.
    """
    if program.stage != "lower":
        raise UserError(
            f"{target}: the program is at stage {program.stage}; only a lowered one runs"
        )
    try:
        with staged(target) as folder:
            _fill(kind, folder, program, extras, fill)
    except OSError as error:
        raise UserError(
            f"{target}: cannot write the {kind.noun}: {error.strerror or error}"
        ) from error
    return target


def _fill(
    kind: Kind,
    folder: Path,
    program: Program,
    extras: Extras,
    fill: Callable[[Path], dict[str, Any]],
) -> None:
    put_json(folder, "config.json", program.config)
    put_json(folder, "recipe.json", extras.recipe)
    put_json(folder, "report.json", [r.model_dump(mode="json") for r in extras.reports])
    if extras.generation_config is not None:
        extras.generation_config.save_pretrained(str(folder))
    extras.processor.save_pretrained(str(folder / "processor"))
    more = fill(folder)
    files = {
        str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": file_sha256(f)}
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    manifest = {"format": kind.format, **program_facts(program), **more, "files": files}
    put_json(folder, kind.manifest, {**manifest, "sha256": own_sha256(manifest)})
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def program_facts(program: Program) -> dict[str, Any]:
    """All of a program but its graphs and weights, as plain data."""
    spec = dataclasses.asdict
    return {
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
    """Versions of what made the directory."""
    import transformers

    return {
        "sparsevila-compile": sparsevila_compile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def own_sha256(manifest: dict[str, Any]) -> str:
    """Hash of a manifest's content, its own entry ``sha256`` left out."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---------------------------------------------------------------------- reading


def read_manifest(path: str | Path, kind: Kind = MODULE) -> dict[str, Any]:
    """The manifest of a directory of that kind.

    Raises:
        UserError: there is none, it is damaged, or of another format.
    """
    folder = Path(path)
    file = folder / kind.manifest
    if not folder.is_dir():
        raise UserError(f"{folder}: no such {kind.noun} directory")
    if not file.is_file():
        raise UserError(
            f"{folder}: no {kind.manifest} in this directory; it is not an {MODULE.noun}, or not whole"
        )
    manifest = read_json(file)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{file}: damaged: it does not list the {kind.noun}'s files; compile again")
    if manifest.get("format") != kind.format:
        raise UserError(
            f"{file}: {kind.noun} format {manifest.get('format')!r}; this version reads {kind.format}; compile again"
        )
    if manifest.get("sha256") != own_sha256(manifest):
        raise UserError(f"{file}: damaged: its contents are not what was written; compile again")
    return manifest


def read_json(file: Path) -> Any:
    """A JSON file's content; UserError where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}; compile again") from error


def check_files(folder: Path, manifest: dict[str, Any], kind: Kind = MODULE) -> None:
    """Compare every listed file's size and hash; raise UserError naming the first that differs."""
    own = folder / kind.manifest
    for name, facts in manifest["files"].items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{own}: damaged: it names {name!r}, outside the {kind.noun}")
        if not isinstance(facts, dict):
            raise UserError(f"{own}: damaged: no size and hash for {name!r}; compile again")
        if not file.is_file():
            raise UserError(f"{file}: missing from the {kind.noun}; compile again")
        size = file.stat().st_size
        if size != facts.get("bytes"):
            raise UserError(
                f"{file}: damaged: {size} bytes instead of {facts.get('bytes')}; compile again"
            )
        if file_sha256(file) != facts.get("sha256"):
            raise UserError(
                f"{file}: damaged: its contents are not what was written; compile again"
            )


def check_listed(folder: Path, manifest: dict[str, Any], names: Iterable[str], kind: Kind) -> None:
    """Raise UserError naming the first file that is needed and not in the manifest's list."""
    for name in sorted(set(names) - set(manifest["files"])):
        raise UserError(
            f"{folder / kind.manifest}: damaged: it does not list {name}; compile again"
        )


def identity(name: str, tensor: torch.Tensor) -> Hashable:
    """Equal for weights that are one tensor under two names (tied); empty ones are never tied."""
    if not tensor.numel():
        return name
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def read_program(
    manifest: dict[str, Any],
    config: dict[str, Any],
    components: dict[str, Any],
    weights: dict[str, torch.Tensor],
    device: torch.device,
) -> Program:
    """The program that :func:`program_facts` described.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the manifest says something else.
    """
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
