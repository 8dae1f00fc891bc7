"""Checks that every program must pass after every pass."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.ops import ATTENTION, ATTENTION_LSE
from sparsevila_compile.program import STAGES, Component, Program

PYTHON_TARGETS: dict[str, Any] = {
    f.__name__: f
    for f in (
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.getitem,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        operator.pow,
        operator.truediv,
        torch.sym_float,
        torch.sym_int,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
        torch.sym_ite,
    )
}
"""Python functions that may stand in a graph (arithmetic on sizes), by the name they are saved as."""

OP_NAMESPACES = ("aten", "prims", "sparsevila")


def check_target(target: Any) -> str | None:
    """None where graphs may call this, or what is wrong with it."""
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in OP_NAMESPACES:
            return f"op of the namespace {target.namespace}"
        if any(str(a.type) == "str" and "file" in a.name for a in target._schema.arguments):
            return "op that opens files"
        return None
    if target in PYTHON_TARGETS.values():
        return None
    return f"call of {target!r}"


def verify(program: Program) -> None:
    """Raise GraphError where a graph breaks a rule.

    The rules: the graph lints; only ops of known namespaces and arithmetic are called; every node
    carries its value; weights named exist, of that shape and dtype; outputs are tensors of the
    declared names; from the cache stage on, no causal attention without a cache is left in the
    language component.
    """
    for component in program.components.values():
        _verify_component(component, program)
    if STAGES.index(program.stage) >= STAGES.index("cache") and program.caches:
        for node in program.component("language").graph.nodes:
            if node.target in (ATTENTION, ATTENTION_LSE) and node.args[5]:
                raise GraphError(f"language/{node.name}: causal attention without a cache")


def _verify_component(component: Component, program: Program) -> None:
    graph = component.graph
    where = component.name
    try:
        graph.lint()
    except RuntimeError as error:
        raise GraphError(f"{where}: {error}") from error
    results = component.output_node().args[0]
    if not isinstance(results, tuple) or len(results) != len(component.outputs):
        raise GraphError(f"{where}: outputs are not the declared {component.outputs}")
    for result in results:
        if not isinstance(result, fx.Node):
            raise GraphError(f"{where}: an output is the constant {result!r}")
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op in ("call_method", "call_module"):
            raise GraphError(f"{where}/{node.name}: {node.op} is not allowed")
        if node.op == "call_function" and (wrong := check_target(node.target)):
            raise GraphError(f"{where}/{node.name}: {wrong}")
        if node.op == "get_attr":
            if node.target not in program.weights:
                raise GraphError(f"{where}/{node.name}: no weight {node.target}")
            held = program.weights[str(node.target)]
            known = node.meta["val"]
            if tuple(held.shape) != tuple(known.shape):
                raise GraphError(f"{where}/{node.name}: the weight's shape is {tuple(held.shape)}")
            if held.dtype != known.dtype:
                raise GraphError(f"{where}/{node.name}: the weight's dtype is {held.dtype}")
        if "val" not in node.meta and len(node.users):
            raise GraphError(f"{where}/{node.name} carries no value metadata")
