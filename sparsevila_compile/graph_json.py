"""Graphs as JSON: what an artifact stores instead of pickles.

Reading one resolves op names against known namespaces and literals against a few types; nothing in
the file is evaluated, imported or unpickled, and names are replaced by our own.
"""

from __future__ import annotations

import keyword
import math
from typing import Any

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.program import Component
from sparsevila_compile.verify import PYTHON_TARGETS, check_target

_MEMORY_FORMATS = {
    str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
_LAYOUTS = {str(torch.strided): torch.strided}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def _write(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        items = [_write(v) for v in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": "program"}  # all tensors of a program live on one device
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value)}
    if isinstance(value, slice):
        return {"slice": [_write(value.start), _write(value.stop), _write(value.step)]}
    raise GraphError(f"a graph holds a {type(value).__name__}, which cannot be saved: {value!r}")


def _read(value: Any, nodes: dict[str, fx.Node], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_read(v, nodes, device) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"unknown literal {value!r}")
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "tuple":
        return tuple(_read(v, nodes, device) for v in inner)
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
    if kind == "dtype":
        return dtype_of(inner)
    if kind == "device":
        return device
    if kind == "memory_format":
        return _MEMORY_FORMATS[inner]
    if kind == "layout":
        return _LAYOUTS[inner]
    if kind == "slice":
        return slice(*(_read(v, nodes, device) for v in inner))
    raise ValueError(f"unknown literal {value!r}")


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)  # namespace.name.overload
    return f"python.{target.__name__}"


def _target(name: str) -> Any:
    head, _, rest = name.partition(".")
    if head == "python":
        return PYTHON_TARGETS[rest]
    op, _, overload = rest.partition(".")
    packet = (
        getattr(getattr(torch.ops, head), op) if head in ("aten", "prims", "sparsevila") else None
    )
    target = getattr(packet, overload, None)
    if target is None or check_target(target):
        raise ValueError(f"op {name!r} is unknown or not allowed")
    return target


def _shape(node: fx.Node) -> Any:
    """Shape for readers and tools: integers, and null where symbolic."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return {
        "dtype": dtype_name(value.dtype),
        "shape": [s if isinstance(s, int) else None for s in value.shape],
    }


def component_to_json(component: Component) -> dict[str, Any]:
    """A component as plain data (``json.dumps`` takes it)."""
    nodes = []
    for node in component.graph.nodes:
        if node.op == "output":
            continue
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        entry["target"] = (
            _target_name(node.target) if node.op == "call_function" else str(node.target)
        )
        if node.op == "call_function":
            entry["args"] = [_write(a) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: _write(v) for k, v in node.kwargs.items()}
        if (shape := _shape(node)) is not None:
            entry["val"] = shape
        if path := node.meta.get("module_path"):
            entry["module"] = path
        nodes.append(entry)
    results = [
        {"name": o, "node": n.name}
        for o, n in zip(component.outputs, component.results(), strict=True)
    ]
    return {"name": component.name, "nodes": nodes, "outputs": results}


def _is_name(name: str) -> bool:
    """Whether a parameter of the generated function can be called that."""
    return name.isidentifier() and not keyword.iskeyword(name) and name != "self"


def component_from_json(data: dict[str, Any], device: torch.device) -> Component:
    """Rebuild a component; constants that name a device get ``device``.

    Raises:
        ValueError, KeyError, TypeError: the data is damaged or names what graphs may not call.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        op, target = entry["op"], entry["target"]
        if not isinstance(target, str):
            raise ValueError(f"unknown target {target!r}")
        if op == "placeholder":
            if not _is_name(target) or any(n.target == target for n in graph.nodes):
                raise ValueError(f"{target!r} is no input name, or one twice")
            node = graph.placeholder(target)
        elif op == "get_attr":
            node = graph.create_node("get_attr", target)
        elif op == "call_function":
            args = tuple(_read(a, nodes, device) for a in entry["args"])
            kwargs = {k: _read(v, nodes, device) for k, v in entry.get("kwargs", {}).items()}
            if not all(_is_name(k) for k in kwargs):
                raise ValueError(f"bad keyword in {sorted(kwargs)}")
            node = graph.call_function(_target(target), args, kwargs)
        else:
            raise ValueError(f"unknown node kind {op!r}")
        if path := entry.get("module"):
            node.meta["module_path"] = str(path)
        nodes[entry["name"]] = node
    outputs = data["outputs"]
    if not outputs:
        raise ValueError("a graph without outputs")
    graph.output(tuple(nodes[o["node"]] for o in outputs))
    graph.lint()
    return Component(str(data["name"]), graph, tuple(str(o["name"]) for o in outputs))
