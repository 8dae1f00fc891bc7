"""Where AWQ's per-channel scales can go without costing a kernel: into the op before.

Dividing a linear's input by ``s`` is free where that input is a product with stored per-channel
values. Four such producers are known: a norm's weight (RMSNorm as a product, LayerNorm with its
bias), a linear whose output reaches the input through a product with something else (up_proj
before down_proj), and v_proj through attention where every query head has its own value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from sparsevila_compile.ops import (
    ATTENTION,
    CACHED_ATTENTION,
    RETRIEVAL_ATTENTION,
    W4A16_LINEAR,
)
from sparsevila_compile.program import Component, Program

aten = torch.ops.aten
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.transpose.int,
    aten.permute.default,
)
ATTENTIONS = (ATTENTION, CACHED_ATTENTION, RETRIEVAL_ATTENTION)


@dataclass(frozen=True)
class Fold:
    """A producer that can absorb a division per channel.

    ``elements``: weights divided element by element (``[K]``). ``rows``: linears (by weight name)
    whose output rows are divided.
    """

    kind: Literal["norm", "product", "value"]
    elements: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def find_fold(components: list[Component], group: list[str]) -> Fold | None:
    """Where the scale of a group of linears (by weight name) can go; None where nowhere.

    It must be the same place in every component that holds the group, and nothing but the group
    may see it.
    """
    folds = set()
    for component in components:
        nodes = [n for n in component.graph.nodes if _weight(n) in group]
        if not nodes:
            continue
        inputs = {n.args[0] for n in nodes}
        if len(inputs) != 1:
            return None
        (x,) = inputs
        if not isinstance(x, fx.Node) or any(u not in nodes for u in x.users):
            return None
        folds.add(_producer(x))
    if len(folds) != 1:
        return None
    (fold,) = folds
    if fold is None or not _private(components, fold):
        return None
    return fold


def _weight(node: fx.Node) -> str | None:
    """Name of the weight of a linear, quantized or not (``….weight``)."""
    if node.op != "call_function" or node.target not in (aten.linear.default, W4A16_LINEAR):
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target)
    return name.removesuffix(".qweight") + ".weight" if name.endswith(".qweight") else name


def _producer(x: fx.Node) -> Fold | None:
    if x.target is aten.layer_norm.default:
        stored = [a for a in x.args[2:4] if isinstance(a, fx.Node)]
        if len(stored) == 2 and all(a.op == "get_attr" for a in stored):
            return Fold("norm", elements=tuple(str(a.target) for a in stored))
        return None
    if x.target is aten.mul.Tensor:
        sides = [a for a in x.args[:2] if isinstance(a, fx.Node)]
        width = x.meta["val"].shape[-1]
        for side in sides:
            if side.op == "get_attr" and tuple(side.meta["val"].shape) == (width,):
                return Fold("norm", elements=(str(side.target),))
        for side in sides:
            if (name := _weight(side)) is not None and len(side.users) == 1:
                return Fold("product", rows=(name,))
        return None
    return _value_projection(x)


def _value_projection(x: fx.Node) -> Fold | None:
    """v_proj → heads → attention → heads joined → x, where query heads do not share values."""
    attention = _through_views(x)
    if attention is None or attention.target not in ATTENTIONS:
        return None
    q, v = attention.args[0], attention.args[2]
    if not isinstance(q, fx.Node) or not isinstance(v, fx.Node):
        return None
    if q.meta["val"].shape[1] != v.meta["val"].shape[1]:
        return None  # GQA: one value channel feeds several channels of x
    projection = _through_views(v)
    name = None if projection is None else _weight(projection)
    return None if name is None else Fold("value", rows=(name,))


def _through_views(node: fx.Node) -> fx.Node | None:
    """The first node behind reshapes that each have one user."""
    while node.target in VIEWS:
        if len(node.users) != 1:
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node = source
    return node if len(node.users) == 1 else None


def _private(components: list[Component], fold: Fold) -> bool:
    """Whether each weight to be changed is read at one place of a component only."""
    names = set(fold.elements) | set(fold.rows)
    for component in components:
        for name in names:
            readers = [
                user
                for node in component.graph.nodes
                if node.op == "get_attr" and node.target == name
                for user in node.users
            ]
            if len(readers) > 1:
                return False
    return True


def apply_fold(program: Program, fold: Fold, scale: torch.Tensor) -> None:
    """Divide what the fold names by ``scale`` (float32 ``[K]``).

    Rows of a quantized linear are divided through its group scales: codes stay as they are.
    """
    for name in fold.elements:
        _divide(program, name, scale)
    for name in fold.rows:
        stem = name.removesuffix(".weight")
        target = f"{stem}.scales" if f"{stem}.scales" in program.weights else name
        _divide(program, target, scale[:, None])
        if f"{stem}.bias" in program.weights:
            _divide(program, f"{stem}.bias", scale)


def _divide(program: Program, name: str, scale: torch.Tensor) -> None:
    held = program.weights[name]
    program.weights[name] = (held.float() / scale).to(held.dtype)
