"""What runs a program's graphs: Inductor, or torch as they stand."""

from __future__ import annotations

from typing import Any

import torch

from sparsevila_compile.program import Program
from sparsevila_compile.running import GraphRunner, Runner


class InductorRunner(GraphRunner):
    """Each component compiled by Inductor at its first run, for any lengths; canonical ops stay.

    A component of a single op (the embedding) leaves nothing to compile and runs as it is.

    Inductor keeps intermediate results in float32 where torch rounds them; it is told to round as
    torch does, so that tokens do not depend on who compiled.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        for name, component in program.components.items():
            if sum(node.op == "call_function" for node in component.graph.nodes) < 2:
                continue
            compiled: Any = torch.compile(
                component.module(program.weights),
                backend="inductor",
                dynamic=True,
                fullgraph=True,
                options={"emulate_precision_casts": True},
            )
            self._modules[name] = compiled


def make_runner(inner: str, program: Program) -> Runner:
    """The runner for an ``inner`` option."""
    return InductorRunner(program) if inner == "inductor" else GraphRunner(program)
