"""ONNX Runtime as an engine's runner: one session a component, inputs and outputs bound in place.

Tensors stay torch's and are bound by address, so nothing is copied between the two and caches stay
on their device. A cache's output is bound to the memory of its input: the graphs write new tokens
with ``ScatterND``, which then copies nothing but them.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_json import dtype_of
from sparsevila_compile.kernels.onnx_support import IR_VERSION, OPSET
from sparsevila_compile.onnx.bundle import external_tensors

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_TORCH_NAMES = {"float": "float32", "double": "float64"}
"""ONNX's names of dtypes where they are not torch's."""

HOST_OPS = frozenset(
    [
        "Add",
        "And",
        "Cast",
        "Concat",
        "Constant",
        "Div",
        "Equal",
        "Gather",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Not",
        "Or",
        "Range",
        "Reciprocal",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Unsqueeze",
        "Where",
    ]
)
"""Ops that sizes and positions are computed with; ONNX Runtime does that on the CPU on purpose."""

CACHE_OUT = "_out"
"""What the name of a cache's output adds to its input's."""


def runtime() -> Any:
    """The onnxruntime module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"onnxruntime cannot be imported ({error}); install onnxruntime or onnxruntime-gpu"
        ) from error
    return onnxruntime


def provider_device(provider: str) -> torch.device:
    """Where a provider's tensors lie.

    Args:
        provider: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: there is no such provider, this build of ONNX Runtime lacks it, or no device is
            here for it.
    """
    kind, _, number = provider.partition(":")
    if kind not in PROVIDERS or (number and (kind == "cpu" or not number.isdecimal())):
        raise UserError(f"provider {provider!r} is unknown; take cpu, cuda or cuda:N")
    ort = runtime()
    there = ort.get_available_providers()
    if PROVIDERS[kind] not in there:
        raise UserError(
            f"provider {kind}: this build of ONNX Runtime ({ort.__version__}) lacks {PROVIDERS[kind]} (it has {', '.join(there)}); install onnxruntime-gpu, or take provider cpu"
        )
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        found = f"there are {count} CUDA devices" if count else "torch sees no CUDA device here"
        raise UserError(f"provider {provider}: {found}; take provider cpu")
    return torch.device("cuda", int(number or 0))


@dataclass
class _Graph:
    """A session with its binding, and what is bound now (address and shape by name)."""

    session: Any
    binding: Any
    inputs: dict[str, tuple[torch.dtype, int]]
    outputs: tuple[str, ...]
    bound: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)


class OnnxRunner:
    """Runs a bundle's graphs (see :class:`~sparsevila_compile.running.Runner`).

    Args:
        folder: the bundle.
        manifest: what :func:`~sparsevila_compile.onnx.bundle.load_bundle` returned.
        device: what :func:`provider_device` returned.
        profile: where ONNX Runtime writes what each node took, one file a component, whose names
            :meth:`end_profiling` returns. Runs are slower then.

    Attributes:
        on_host: on a GPU, the ops that ONNX Runtime placed on the CPU all the same, a counter by
            component. Its arithmetic on sizes belongs there (:data:`HOST_OPS`); of anything else
            there is a warning, since its inputs and outputs cross the bus.

    Raises:
        UserError: ONNX Runtime refuses a graph, or its provider does not start.
    """

    capturable = False
    prefill_chunk = 2048

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        device: torch.device,
        profile: Path | None = None,
    ) -> None:
        self.device = device
        self._profile = profile
        self.on_host: dict[str, Counter[str]] = {}
        self._ort = runtime()
        if device.type == "cuda":
            self._start_cuda()
        self._weights = _Weights(folder, device, self._ort)
        self._graphs = {
            name: self._open(name, folder / str(facts["file"]))
            for name, facts in manifest["graphs"].items()
        }
        self.components = frozenset(self._graphs)

    def _providers(self) -> list[Any]:
        if self.device.type == "cpu":
            return [PROVIDERS["cpu"]]
        settings = {
            "device_id": str(self.device.index or 0),
            # As torch does, whose setting this is: ONNX Runtime would round products' inputs.
            "use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32)),
        }
        return [(PROVIDERS["cuda"], settings)]

    def _start_cuda(self) -> None:
        """Refuse where the provider does not start: ONNX Runtime itself would take the CPU."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._ort.preload_dlls()  # from torch's own packages; prints what it does not find
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        session = self._ort.InferenceSession(_nothing(), options, providers=self._providers())
        started = session.get_providers()
        if PROVIDERS["cuda"] not in started:
            raise UserError(
                f"provider cuda: {PROVIDERS['cuda']} does not start here (ONNX Runtime {self._ort.__version__} would take {', '.join(started)}); are its CUDA and cuDNN libraries installed?"
            )

    def _open(self, component: str, file: Path) -> _Graph:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Sessions take turns with each other and with torch: threads that spin while they wait
        # would take the processors from those that work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        tensors = external_tensors(file)
        for tensor in tensors:
            options.add_initializer(tensor.name, self._weights.value(tensor))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self._profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile / component)
        if component == "decode" and all(_is_float(t) for t in tensors):
            # A rearranged copy of the weights of its own would help products of many rows only.
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = self._ort.InferenceSession(str(file), options, providers=self._providers())
        except Exception as error:  # pybind exceptions with no common base but this
            first = str(error).strip().partition("\n")[0]
            hint = ""
            if "NOT_IMPLEMENTED" in first:
                kind = PROVIDERS[self.device.type]
                hint = f"; {kind} has no kernel for that type: take another model.dtype or emit.dtype (on a CPU float32), or another provider"
            raise UserError(
                f"{file}: ONNX Runtime {self._ort.__version__} cannot run it: {first}{hint}"
            ) from error
        if self.device.type != "cpu":
            self._placed(component, file, session)
        inputs = {v.name: _dtypes(v.type) for v in session.get_inputs()}
        outputs = tuple(v.name for v in session.get_outputs())
        binding = session.io_binding()
        for name in outputs:  # the results come in the order in which outputs are first bound
            binding.bind_output(name, self.device.type, self.device.index or 0)
        return _Graph(session, binding, inputs, outputs)

    def _placed(self, component: str, file: Path, session: Any) -> None:
        """Warn of ops that the provider left to the CPU."""
        self.on_host[component] = counted = on_host(session)
        strange = {op: n for op, n in sorted(counted.items()) if op not in HOST_OPS}
        if strange:
            listed = ", ".join(f"{op} × {n}" for op, n in strange.items())
            warnings.warn(
                f"{file}: {PROVIDERS[self.device.type]} has no kernels for {listed}; ONNX Runtime runs them on the CPU and copies what they read and write",
                stacklevel=2,
            )

    def end_profiling(self) -> dict[str, Path]:
        """The files that ``profile`` asked for, by component; nothing more is recorded."""
        return {name: Path(g.session.end_profiling()) for name, g in self._graphs.items()}

    def run(self, component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run one component; ``inputs`` by name (more than it takes is fine).

        Caches (``k_cache_i``, ``v_cache_i``) are written in place. Returns the other outputs by
        name, on the inputs' device.
        """
        graph = self._graphs[component]
        kept = []  # what is bound by address must live until the run is over
        for name, (dtype, code) in graph.inputs.items():
            tensor = inputs[name]
            if tensor.dtype != dtype or not tensor.is_contiguous():
                tensor = tensor.to(dtype).contiguous()
            kept.append(tensor)
            self._bind(graph, name, tensor, code)
        for name in graph.outputs:
            if name.removesuffix(CACHE_OUT) not in graph.inputs:
                graph.binding.bind_output(name, self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the session has its own
        # Returns when the device is done, unless a run option says otherwise: torch may read at once.
        graph.session.run_with_iobinding(graph.binding)
        values = graph.binding._iobinding.get_outputs()
        return {
            name: torch.utils.dlpack.from_dlpack(values[place])
            for place, name in enumerate(graph.outputs)
            if name.removesuffix(CACHE_OUT) not in graph.inputs
        }

    def _bind(self, graph: _Graph, name: str, tensor: torch.Tensor, code: int) -> None:
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if graph.bound.get(name) == key:
            return
        graph.bound[name] = key
        where = (self.device.type, self.device.index or 0, code, key[1], key[0])
        graph.binding.bind_input(name, *where)
        if name + CACHE_OUT in graph.outputs:
            graph.binding.bind_output(name + CACHE_OUT, *where)


def on_host(session: Any) -> Counter[str]:
    """The ops of a session that the CPU runs; it was opened to record where they are."""
    return Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"]
        for node in part.get_nodes()
    )


def _nothing() -> bytes:
    """The smallest model there is."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", [x], [y])
    opset = [helper.make_opsetid("", OPSET)]
    model: bytes = helper.make_model(
        graph, opset_imports=opset, ir_version=IR_VERSION
    ).SerializeToString()
    return model


def _torch_dtype(code: int) -> torch.dtype:
    """torch's dtype for ONNX's number of one."""
    from onnx import TensorProto

    name = TensorProto.DataType.Name(code).lower()
    return dtype_of(_TORCH_NAMES.get(name, name))


def _is_float(tensor: Any) -> bool:
    """Whether a TensorProto holds floats, not the codes of a quantized weight."""
    return _torch_dtype(tensor.data_type).is_floating_point


def _dtypes(kind: str) -> tuple[torch.dtype, int]:
    """torch's dtype and ONNX's number of ``tensor(float)`` and the like."""
    from onnx import TensorProto

    code = TensorProto.DataType.Value(kind.removeprefix("tensor(").removesuffix(")").upper())
    return _torch_dtype(code), code


class _Weights:
    """A bundle's weights as ONNX Runtime's values, one of each for all sessions.

    On the CPU they are the mapped files; on a GPU each is copied there once.
    """

    def __init__(self, folder: Path, device: torch.device, ort: Any) -> None:
        self._folder = folder
        self._device = device
        self._ort = ort
        self._files: dict[str, torch.Tensor] = {}
        self._values: dict[Any, Any] = {}

    def value(self, tensor: Any) -> Any:
        """The OrtValue of an external initializer (a TensorProto)."""
        place = {e.key: e.value for e in tensor.external_data}
        dims = tuple(tensor.dims)
        key = (place["location"], place["offset"], tensor.data_type, dims)
        if key not in self._values:
            octets = self._octets(place["location"], int(place["offset"]), int(place["length"]))
            data = octets.view(_torch_dtype(tensor.data_type)).reshape(dims)
            self._values[key] = self._ort.OrtValue.from_dlpack(data.to(self._device))
        return self._values[key]

    def _octets(self, name: str, start: int, length: int) -> torch.Tensor:
        if name not in self._files:
            # Copy-on-write: torch wants memory that it may write to, and nothing does.
            self._files[name] = torch.from_numpy(np.memmap(self._folder / name, np.uint8, "c"))
        return self._files[name][start : start + length]
