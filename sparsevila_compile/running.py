"""Who runs a program's graphs: torch, from the program itself, or ONNX Runtime (``onnx.runner``)."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from sparsevila_compile.program import Program


class Runner(Protocol):
    """Runs components by name.

    Attributes:
        components: the names of what it can run.
        capturable: whether a decode step may be captured as a CUDA graph.
        prefill_chunk: tokens that prefill feeds at a time, all rows together: what bounds its
            activations' memory.
    """

    components: frozenset[str]
    capturable: bool
    prefill_chunk: int

    def run(self, component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run one component; ``inputs`` by name (more than it takes is fine).

        Inputs that the component declares as mutated (``k_cache_i``, ``v_cache_i``) are written in
        place. Returns the outputs by name, on the inputs' device.
        """
        ...


class GraphRunner:
    """Runs a program's own graphs on its own weights."""

    capturable = True
    prefill_chunk = 5120

    def __init__(self, program: Program) -> None:
        components = program.components
        self.components = frozenset(components)
        self._modules = {n: c.module(program.weights, direct=True) for n, c in components.items()}
        self._inputs = {n: c.inputs for n, c in components.items()}
        self._outputs = {n: c.outputs for n, c in components.items()}

    def run(self, component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        picked = [inputs[name] for name in self._inputs[component]]
        with torch.inference_mode():
            results = self._modules[component](*picked)
        return dict(zip(self._outputs[component], results, strict=True))
