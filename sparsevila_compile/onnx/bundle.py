"""The ONNX bundle: a directory of ONNX graphs, their weights as external data, and a manifest.

Components share one copy of the weights on disk. What it shares with the module artifact (staging,
hashes, manifest) is in ``manifest``. Nothing in it is unpickled or executed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.manifest import (
    ONNX,
    Extras,
    check_files,
    check_listed,
    check_target,
    identity,
    read_json,
    read_manifest,
    read_program,
    write_directory,
)
from sparsevila_compile.onnx.export import (
    DOMAIN,
    DOMAIN_VERSION,
    ExportOptions,
    export_component,
    packed_weights,
)
from sparsevila_compile.program import Program
from sparsevila_compile.report import PassReport

FILE_BYTES = 2 << 30
"""A weight file takes no further tensor once it has that many bytes."""

ALIGNMENT = 4096
"""Each tensor starts at a multiple of it, so that a file can be mapped."""


# ---------------------------------------------------------------------- writing


def save(
    program: Program,
    processor: Any,
    reports: Sequence[PassReport],
    recipe: dict[str, Any],
    path: str | Path,
    overwrite: bool = False,
    generation_config: Any = None,
    options: ExportOptions | None = None,
) -> Path:
    """Write a bundle, whole or not at all.

    Args:
        program: a lowered program.
        recipe: the resolved recipe, saved as it is.
        path: directory to make.
        overwrite: replace an artifact or bundle that is there.
        options: of the export.

    Raises:
        UserError: the program holds what ONNX does not; the place is taken or cannot be written,
            or the disk is full.
    """
    target = check_target(path, overwrite)
    chosen = options or ExportOptions()

    def fill(folder: Path) -> dict[str, Any]:
        return _write_graphs(program, chosen, folder)

    extras = Extras(processor, reports, recipe, generation_config)
    return write_directory(ONNX, target, _as_emitted(program, chosen), extras, fill)


def _as_emitted(program: Program, options: ExportOptions) -> Program:
    """The program with the dtypes that the bundle's inputs and caches have."""
    if options.dtype is None or options.dtype == program.dtype:
        return program
    dtype = options.dtype
    emitted = copy.copy(program)
    emitted.dtype = dtype
    emitted.caches = tuple(dataclasses.replace(c, dtype=dtype) for c in program.caches)
    return emitted


def _write_graphs(program: Program, options: ExportOptions, folder: Path) -> dict[str, Any]:
    import onnx

    models = {name: export_component(program, name, options) for name in program.components}
    files = _Weights(folder, program.weights, packed_weights(program, options))
    graphs: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                files.place(tensor)
        file = f"{name}.onnx"
        (folder / file).write_bytes(model.SerializeToString())
        graphs[name] = {
            "file": file,
            "inputs": {v.name: _signature(v) for v in model.graph.input},
            "outputs": {v.name: _signature(v) for v in model.graph.output},
        }
    files.close()
    for facts in graphs.values():
        onnx.checker.check_model(str(folder / facts["file"]), full_check=True)
    opsets = {o.domain or "ai.onnx": o.version for m in models.values() for o in m.opset_import}
    return {
        "graphs": graphs,
        "weights": files.names,
        "opsets": opsets,
        "ir_version": max(m.ir_version for m in models.values()),
        "pure": options.pure,
    }


def _signature(value: Any) -> dict[str, Any]:
    """Dtype and shape of a graph's input or output; symbolic sizes by name."""
    import onnx

    kind = value.type.tensor_type
    return {
        "dtype": onnx.TensorProto.DataType.Name(kind.elem_type).lower(),
        "shape": [d.dim_param or d.dim_value for d in kind.shape.dim],
    }


def byte_count(tensor: Any) -> int:
    """Bytes of a TensorProto's data, from its shape and type; two 4-bit values share a byte."""
    import onnx

    count = int(math.prod(tensor.dims))
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


class _Weights:
    """Writes each distinct tensor once, and tells initializers where it is.

    Args:
        weights: the program's.
        packed: those whose bytes differ in ONNX; each is made when it is asked for.
    """

    def __init__(
        self, folder: Path, weights: Mapping[str, torch.Tensor], packed: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._weights = weights
        self._packed = packed
        self._places: dict[Hashable, tuple[str, int, int]] = {}
        self._file: BinaryIO | None = None

    def place(self, tensor: Any) -> None:
        """Point an external initializer at its data, which is written where it is not yet."""
        name: str = tensor.name
        key = name if name in self._packed else identity(name, self._weights[name])
        if key not in self._places:
            held = torch.as_tensor(
                self._packed[name] if name in self._packed else self._weights[name]
            )
            self._places[key] = self._write(held.detach())
        location, offset, length = self._places[key]
        if length != byte_count(tensor):
            raise ValueError(f"{name} has {length} bytes, its graph expects {byte_count(tensor)}")
        del tensor.external_data[:]
        for entry, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=entry, value=str(value))

    def _write(self, held: torch.Tensor) -> tuple[str, int, int]:
        size = held.numel() * held.element_size()
        if self._file is None or self._file.tell() >= FILE_BYTES:
            self.close()
            self.names.append(f"weights-{len(self.names) + 1:05d}.bin")
            self._file = (self.folder / self.names[-1]).open("wb")
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        octets: Any = held.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        self._file.write(octets.data)
        return self.names[-1], offset, size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# ---------------------------------------------------------------------- reading


def load_bundle(path: str | Path) -> tuple[Program, dict[str, Any]]:
    """Read a bundle's manifest, checked, as a program without graphs, and the manifest itself.

    The program's device is the CPU until a provider is chosen.

    Raises:
        UserError: a file is missing or damaged, a graph refers to data outside the bundle, or it is
            of a version that this one does not read.
    """
    folder = Path(path)
    manifest = read_manifest(folder, ONNX)
    check_files(folder, manifest, ONNX)
    own = folder / ONNX.manifest
    try:
        for domain, version in manifest["opsets"].items():
            if domain == DOMAIN and version != DOMAIN_VERSION:
                raise UserError(
                    f"{own}: its ops are of version {version} of the domain {DOMAIN}; this version runs {DOMAIN_VERSION}; compile again"
                )
        graphs = {name: str(facts["file"]) for name, facts in manifest["graphs"].items()}
        check_listed(folder, manifest, [*graphs.values(), *manifest["weights"]], ONNX)
        for name in sorted(set(manifest["components"]) ^ set(graphs)):
            raise UserError(f"{own}: damaged: no graph {name}; compile again")
        for file in graphs.values():
            _check_graph(folder / file, manifest)
        config = read_json(folder / "config.json")
        return read_program(manifest, config, {}, {}, torch.device("cpu")), manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{own}: damaged: {type(error).__name__}: {error}") from error


def _check_graph(file: Path, manifest: dict[str, Any]) -> None:
    """Refuse a graph whose initializers lie anywhere but in the bundle's weight files."""
    for tensor in external_tensors(file):
        place = {e.key: e.value for e in tensor.external_data}
        location = place.get("location", "")
        if location not in manifest["weights"]:
            raise UserError(
                f"{file}: refers to external data in {location!r}, which is not one of the bundle's weight files"
            )
        offset, length = int(place.get("offset", "0")), int(place.get("length", "-1"))
        size = int(manifest["files"][location]["bytes"])
        if offset < 0 or length != byte_count(tensor) or offset + length > size:
            raise UserError(f"{file}: damaged: {tensor.name} does not lie within {location}")


def external_tensors(file: Path) -> list[Any]:
    """The initializers of a graph whose data is in other files.

    Raises:
        UserError: it is no ONNX graph, or keeps tensors with data elsewhere than among its
            initializers.
    """
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own, which share no base with others
        raise UserError(f"{file}: damaged: no ONNX graph: {error}") from error
    found = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    everywhere = sum(
        t.data_location == onnx.TensorProto.EXTERNAL
        for t in onnx.external_data_helper._get_all_tensors(model)
    )
    if everywhere != len(found):
        raise UserError(f"{file}: damaged: external data outside its initializers")
    return found
