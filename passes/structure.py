"""What passes that look for a pattern of several nodes share: steps through a graph that explain
themselves where they fail, and edits of what such a pattern leaves behind."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.pass_base import tensor_of
from sparsevila_compile.program import Program

aten = torch.ops.aten

VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    aten.split_with_sizes.default,
    operator.getitem,
)
"""Ops that read no values: their results' strides follow from those of their input."""


class Unlike(Exception):
    """What was looked at is not the pattern; the message is the reason of the miss."""


def need(condition: bool, reason: str) -> None:
    """Raise Unlike unless the condition holds."""
    if not condition:
        raise Unlike(reason)


def call_of(node: object, targets: Iterable[Any], reason: str) -> fx.Node:
    """The node, where it calls one of the targets; else Unlike."""
    if isinstance(node, fx.Node) and node.op == "call_function" and node.target in tuple(targets):
        return node
    raise Unlike(reason)


def only_user(node: fx.Node, reason: str) -> fx.Node:
    """The one node that uses this one; Unlike where none or several do."""
    if len(node.users) != 1:
        raise Unlike(reason)
    user: fx.Node = next(iter(node.users))
    return user


def other(node: fx.Node, operand: object, reason: str) -> fx.Node:
    """The second operand of a binary op, given one; Unlike where that is no tensor."""
    sides = list(node.args[:2])
    need(operand in sides, reason)
    sides.remove(operand)  # type: ignore[arg-type]
    if not isinstance(sides[0], fx.Node):
        raise Unlike(reason)
    return sides[0]


def cast_source(node: fx.Node) -> fx.Node | None:
    """What a cast to another dtype casts, or None where the node is no such cast."""
    if node.op == "call_function" and node.target is aten.to.dtype:
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have one dtype and provably one shape. Adds no guard."""
    x, y = tensor_of(a), tensor_of(b)
    # Texts of symbolic sizes: comparing the sizes themselves would fix them.
    return x.dtype == y.dtype and [str(s) for s in x.shape] == [str(s) for s in y.shape]


Readers = dict[str, dict[str, list[fx.Node]]]
"""By weight and component, the nodes that read it."""


def readers_of(program: Program) -> Readers:
    """What reads each weight."""
    found: Readers = {}
    for component in program.components.values():
        for node in component.graph.nodes:
            if node.op == "get_attr":
                users = found.setdefault(str(node.target), {}).setdefault(component.name, [])
                users.extend(node.users)
    return found


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Each node's place in the graph."""
    return {node: i for i, node in enumerate(graph.nodes)}


def erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing uses, and what only it used. For nodes without effects."""
    if node.users or node.op not in ("call_function", "get_attr"):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        erase_unused(source)


def refresh_views(edit: Editor, node: fx.Node) -> None:
    """Recompute the values of views behind a node whose strides have changed.

    A ``view`` that the new strides do not allow becomes a ``reshape``, which copies.
    """
    for user in list(node.users):
        if user.op != "call_function" or user.target not in VIEWS:
            continue
        try:
            edit.propagate(user)
        except (RuntimeError, ValueError):
            if user.target is not aten.view.default:
                raise
            user.target = aten.reshape.default
            edit.propagate(user)
        refresh_views(edit, user)
