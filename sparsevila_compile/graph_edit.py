"""Edits of FX graphs that keep the metadata later passes and verification rely on.

``torch.fx``'s own pattern replacement drops ``val``, ``nn_module_stack`` and ``stack_trace``; here
every new node gets its ``val`` by running the op on fake tensors, and inherits the origin of the
node it stands in for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.program import Component
from sparsevila_compile.torch_private import (
    FakeTensorMode,
    enable_python_dispatcher,
    fake_mode_of,
    fresh_size,
)

ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "module_path")


def value(node: fx.Node) -> Any:
    """The fake value of a node.

    Raises:
        GraphError: the node carries none.
    """
    if "val" not in node.meta:
        raise GraphError(f"node {node.name} carries no value metadata")
    return node.meta["val"]


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made this node ('' where unknown)."""
    return str(node.meta.get("module_path", ""))


class Editor:
    """Adds nodes to one component's graph, each with its fake value and its origin."""

    def __init__(self, component: Component) -> None:
        self.component = component
        self.graph = component.graph
        inputs = [value(n) for n in self.graph.nodes if n.op == "placeholder"]
        self._mode: FakeTensorMode = fake_mode_of(inputs)
        self._device: torch.device = inputs[0].device

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        before: fx.Node,
        origin: fx.Node | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert ``target(*args, **kwargs)`` before a node; origin metadata comes from ``origin``."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, tuple(args), kwargs, name=name)  # type: ignore[call-arg]
        self._inherit(node, origin or before)
        self.propagate(node)
        return node

    def weight(self, name: str, tensor: torch.Tensor, *, before: fx.Node) -> fx.Node:
        """Insert a ``get_attr`` of a weight; ``tensor`` gives its shape and dtype."""
        with self.graph.inserting_before(before):
            # Not Graph.get_attr: that wants an owning module, and a component has none.
            node = self.graph.create_node("get_attr", name)
        self._inherit(node, before)
        # Without the dispatcher ops in C++ that are made of others ask symbolic sizes for numbers.
        with self._mode, enable_python_dispatcher():
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
            )
        return node

    def input(
        self, name: str, shape: Sequence[int | str | torch.SymInt], dtype: torch.dtype
    ) -> fx.Node:
        """Append a placeholder. A string in ``shape`` makes a fresh symbolic size."""
        if name in self.component.inputs:
            raise GraphError(f"component {self.component.name} has an input {name} already")
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_after(placeholders[-1]):
            node = self.graph.placeholder(name)
        if node.name != name:
            raise GraphError(f"input {name} clashes with a node of that name")
        sizes = [fresh_size(self._mode, s, 7) if isinstance(s, str) else s for s in shape]
        # Without the dispatcher ops in C++ that are made of others ask symbolic sizes for numbers.
        with self._mode, enable_python_dispatcher():
            node.meta["val"] = torch.empty(sizes, dtype=dtype, device=self._device)
        return node

    def output(self, name: str, node: fx.Node) -> None:
        """Append a named output."""
        if name in self.component.outputs:
            raise GraphError(f"component {self.component.name} has an output {name} already")
        out = self.component.output_node()
        out.args = ((*self.component.results(), node),)
        self.component.outputs = (*self.component.outputs, name)

    def drop_output(self, name: str) -> None:
        keep = [
            (n, r)
            for n, r in zip(self.component.outputs, self.component.results(), strict=True)
            if n != name
        ]
        self.component.output_node().args = (tuple(r for _, r in keep),)
        self.component.outputs = tuple(n for n, _ in keep)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all users of ``old`` use ``new``, then erase ``old``."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.graph.erase_node(old)

    def propagate(self, node: fx.Node) -> None:
        """Compute the node's ``val`` from its arguments' values."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)  # type: ignore[arg-type]
        # Without the dispatcher ops in C++ that are made of others ask symbolic sizes for numbers.
        with self._mode, enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def sweep(self) -> int:
        """Erase dead code (mutating ops stay); returns the number of erased nodes."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code()
        return before - len(self.graph.nodes)

    @staticmethod
    def _inherit(node: fx.Node, origin: fx.Node) -> None:
        for key in ORIGIN_KEYS:
            if key in origin.meta:
                node.meta[key] = origin.meta[key]
