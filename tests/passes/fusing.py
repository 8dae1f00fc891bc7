"""Small programs to fuse, what they compute, and how many kernels they would launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.program import Component, Program, VisionLayout
from sparsevila_compile.report import PassReport
from sparsevila_compile.trace import trace_function
from tests import tiny

FUSED: tuple[tiny.Spec, ...] = ("merge_linears", "fuse_rms_norm", "fuse_rotary", "fuse_silu_mul")

CPU = torch.device("cpu")
LAYOUT = VisionLayout(packed=False, prefix_tokens=0, merge_unit=1, tokens_per_picture=1)


class _Module(torch.nn.Module):
    """A function as a module; the export wants its arguments named one by one."""

    def __init__(self, function: Callable[..., Any], names: Iterable[str]) -> None:
        super().__init__()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def forward(*args: torch.Tensor) -> Any:
            return function(*args)

        signature = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def program_of(
    function: Callable[..., torch.Tensor],
    inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]],
    weights: dict[str, torch.Tensor],
    **others: Callable[..., torch.Tensor],
) -> Program:
    """A canonical program whose component ``language`` is a function of inputs, then weights.

    ``others`` are further components over the same inputs and weights.
    """
    dtype = next(iter(inputs.values()))[0]
    parts = {
        name: _component(name, f, inputs, weights)
        for name, f in {"language": function, **others}.items()
    }
    program = Program("none", {}, parts, dict(weights), LAYOUT, dtype, CPU)
    program.drop_unused_weights()
    tiny.step(program, ("canonicalize", {"optional": True}))
    return program


def _component(
    name: str,
    function: Callable[..., torch.Tensor],
    inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]],
    weights: dict[str, torch.Tensor],
) -> Component:
    plain = {n.replace(".", "_"): w for n, w in weights.items()}
    given = inputs | {n: (w.dtype, tuple(w.shape)) for n, w in plain.items()}
    component = trace_function(name, _Module(function, given), given, ("y",), CPU)
    edit = Editor(component)
    for weight in weights:
        held = component.input(weight.replace(".", "_"))
        if held.users:
            edit.replace(held, edit.weight(weight, weights[weight], before=held))
        else:
            component.graph.erase_node(held)
    for node in component.graph.nodes:
        node.meta["module_path"] = "model.layer"
    return component


def result(program: Program, *inputs: torch.Tensor, component: str = "language") -> torch.Tensor:
    """What a component returns."""
    out: torch.Tensor = program.component(component).module(program.weights)(*inputs)[0]
    return out


def misses(report: PassReport) -> dict[str, int]:
    """How many sites each reason has."""
    return {m.reason: len(m.sites) for m in report.misses}


class Launches(TorchDispatchMode):
    """Counts calls that compute something: all but those that return views of what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = out if isinstance(out, (list, tuple)) else [out]
        tensors = [t for t in made if isinstance(t, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() not in given for t in tensors):
            self.names.append(str(func))
        return out
