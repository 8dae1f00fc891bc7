"""Stock onnxruntime on exported components, and a runner that checks it against torch's at every call."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from sparsevila_compile.onnx.export import ExportOptions, export_component, packed_weights
from sparsevila_compile.program import Program
from tests.kernels.compare import assert_close_to


def session(model: onnx.ModelProto | str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


def saved(program: Program, name: str, options: ExportOptions, folder: Path) -> Path:
    """A component with its weights in a file beside it."""
    model = export_component(program, name, options)
    packed = packed_weights(program, options)
    with (folder / f"{name}.bin").open("wb") as file:
        for proto in model.graph.initializer:
            assert proto.data_location == onnx.TensorProto.EXTERNAL
            assert not proto.raw_data
            assert not proto.external_data
            tensor = packed[proto.name] if proto.name in packed else program.weights[proto.name]
            place = {"location": f"{name}.bin", "offset": file.tell(), "length": len(raw(tensor))}
            file.write(raw(tensor))
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
    onnx.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


class Shadow:
    """A runner that answers as torch does, and requires stock onnxruntime to answer the same.

    Attributes:
        calls: how often each component ran.
    """

    capturable = False

    def __init__(
        self, runner: Any, program: Program, paths: dict[str, Path], bound: float, chunk: int
    ) -> None:
        self.runner, self.program, self.bound = runner, program, bound
        self.components = runner.components
        self.prefill_chunk = chunk
        self.sessions = {name: session(path) for name, path in paths.items()}
        self.calls: Counter[str] = Counter()

    def run(self, component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        mine = self.sessions[component]
        feeds = {i.name: inputs[i.name].clone().numpy() for i in mine.get_inputs()}
        results: dict[str, torch.Tensor] = self.runner.run(component, inputs)
        names = [o.name for o in mine.get_outputs()]
        assert set(results) <= set(names)
        found = dict(zip(names, mine.run(None, feeds), strict=True))
        self.calls[component] += 1
        for name, expected in results.items():
            got = torch.from_numpy(np.array(found[name]))
            assert got.dtype == expected.dtype, name
            if expected.dtype.is_floating_point and expected.any():
                assert_close_to(got, expected, self.bound, f"{component}: {name}")
            else:
                assert torch.equal(got, expected), f"{component}: {name}"
        self._caches(component, inputs, found)
        return results

    def _caches(self, component: str, inputs: dict[str, Any], found: dict[str, Any]) -> None:
        outs = [name for name in found if name.endswith("_out")]
        written = [n for n in self.program.components[component].inputs if "_cache_" in n]
        assert sorted(outs) == sorted(f"{name}_out" for name in written)
        if not outs:
            return
        held = inputs["cache_lens"] + inputs["new_lens"]
        for name in outs:
            cache = inputs[name.removesuffix("_out")]
            for b, count in enumerate(held.tolist()):
                got = torch.from_numpy(found[name][b, :, :count].copy())
                assert_close_to(
                    got, cache[b, :, :count], self.bound, f"{component}: {name} row {b}"
                )
