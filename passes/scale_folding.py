"""Where per-channel scales of AWQ and SmoothQuant can go without costing a kernel: into the op before.

Dividing a linear's input by ``s`` is free where that input is a product with stored per-channel
values. Three such producers are known: a norm (RMSNorm as a product, LayerNorm with or without a
bias), a linear whose output reaches the input through a product with something else (up_proj before
down_proj), and v_proj through attention where every query head has its own value head.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from sparsevila_compile.ops import (
    ATTENTION,
    ATTENTION_LSE,
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    RETRIEVAL_ATTENTION,
    W4A8_LINEAR,
    W4A16_LINEAR,
    W8A8_LINEAR,
)
from sparsevila_compile.program import Component

aten = torch.ops.aten
# None of these changes the order of values in memory, so none moves a channel elsewhere.
SAME_ORDER = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
)
ATTENTIONS = (
    ATTENTION,
    ATTENTION_LSE,
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    RETRIEVAL_ATTENTION,
)
BIAS_AT = {aten.linear.default: 2, W4A16_LINEAR: 4, W4A8_LINEAR: 4, W8A8_LINEAR: 3}
"""Linears, quantized or not, and which of their arguments is the bias."""


@dataclass(frozen=True)
class Fold:
    """A producer that can absorb a division per channel.

    Attributes:
        kind: ``norm``: ``weight`` is ``[K]``, divided element by element. ``product`` and
            ``value``: ``weight`` is a linear's ``[K, N]``, whose rows are divided.
        bias: ``[K]``, divided too; None where there is none.
    """

    kind: Literal["norm", "product", "value"]
    weight: str
    bias: str | None = None


def find_fold(components: Sequence[Component], group: Collection[str]) -> Fold | None:
    """Where the scale of a group of linears (by weight name) can go; None where nowhere.

    It must be the same place in every component that holds the group, and nothing but the group
    may see it.
    """
    folds = set()
    for component in components:
        nodes = [n for n in component.graph.nodes if weight_of(n) in group]
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


def weight_of(node: fx.Node) -> str | None:
    """Checkpoint name of the stored weight of a linear, quantized or not; None for others."""
    if node.op != "call_function" or node.target not in BIAS_AT:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target)
    return name.removesuffix(".qweight") + ".weight" if name.endswith(".qweight") else name


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of a linear, quantized or not; None for other nodes."""
    at = BIAS_AT.get(node.target, len(node.args))  # type: ignore[arg-type]
    bias = node.args[at] if len(node.args) > at else None
    return bias if isinstance(bias, fx.Node) else None


def _producer(x: fx.Node) -> Fold | None:
    width = (x.meta["val"].shape[-1],)
    if x.target is aten.layer_norm.default:
        weight, bias = ([*x.args[2:4], None, None])[:2]
        if _stored(weight, width) and (bias is None or _stored(bias, width)):
            return Fold("norm", str(weight.target), None if bias is None else str(bias.target))  # type: ignore[union-attr]
        return None
    if x.target is aten.mul.Tensor:
        sides = [a for a in x.args[:2] if isinstance(a, fx.Node)]
        for side in sides:
            if _stored(side, width):
                return Fold("norm", str(side.target))
        for side in sides:
            if len(side.users) == 1 and (side.meta["val"].shape[-1],) == width:
                fold = _linear("product", side)
                if fold is not None:
                    return fold
        return None
    return _value_projection(x)


def _stored(node: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    return tuple(node.meta["val"].shape) == shape


def _linear(kind: Literal["product", "value"], node: fx.Node) -> Fold | None:
    """A linear whose rows can be divided."""
    name, bias = weight_of(node), bias_of(node)
    if name is None or (bias is not None and bias.op != "get_attr"):
        return None
    return Fold(kind, name, None if bias is None else str(bias.target))


def _value_projection(x: fx.Node) -> Fold | None:
    """v_proj → heads → attention → heads joined → x, where query heads do not share values."""
    attention = _behind(x)
    if attention is not None and attention.target is operator.getitem and attention.args[1] == 0:
        attention = attention.args[0]  # type: ignore[assignment]  # one that returns more
    if attention is None or attention.target not in ATTENTIONS:
        return None
    q, v = attention.args[0], attention.args[2]
    if not isinstance(q, fx.Node) or not isinstance(v, fx.Node):
        return None
    _, heads, _, dim = v.meta["val"].shape
    if q.meta["val"].shape[1] != heads or x.meta["val"].shape[-1] != heads * dim:
        return None  # GQA: one value channel feeds several channels of x
    # v is [batch, heads, length, dim]: channel h * dim + d of x only if it was split that way.
    if v.target is not aten.transpose.int or set(v.args[1:]) != {1, 2} or len(v.users) != 1:
        return None
    split = v.args[0]
    if not isinstance(split, fx.Node) or tuple(split.meta["val"].shape[2:]) != (heads, dim):
        return None
    projection = _behind(split)
    return None if projection is None else _linear("value", projection)


def _behind(node: fx.Node) -> fx.Node | None:
    """The first node behind reshapes; None where something else sees it or one of them."""
    while node.target in SAME_ORDER:
        if len(node.users) != 1:
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node = source
    return node if len(node.users) == 1 else None


def _private(components: Sequence[Component], fold: Fold) -> bool:
    """Whether each weight to be changed is read at one place of a component only."""
    names = {fold.weight, _scales_name(fold.weight)} | ({fold.bias} if fold.bias else set())
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


def _scales_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".scales"


def folded(
    weights: Mapping[str, torch.Tensor], fold: Fold, scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the fold's weights become, by name, divided by ``scale`` (float32 ``[K]``).

    Rows of a quantized linear are divided through its group scales: codes stay as they are.
    """
    names = [_scales_name(fold.weight) if _scales_name(fold.weight) in weights else fold.weight]
    if fold.bias is not None:
        names.append(fold.bias)
    return {name: _divided(weights[name], scale) for name in names}


def applied_scale(
    weights: Mapping[str, torch.Tensor], fold: Fold, scale: torch.Tensor
) -> torch.Tensor:
    """The scale that activations are really divided by when ``scale`` is folded (float32 ``[K]``).

    A norm's weight is rounded when it is stored; the search should see that. (The group scales of a
    quantized row are rounded one by one, by a hundredth of what its codes are: that is left out.)
    A channel whose folded value would overflow or vanish keeps a scale of 1.
    """
    result = scale
    for name, new in folded(weights, fold, scale).items():
        old = weights[name]
        broken = ~new.isfinite() | ((new == 0) & (old != 0))
        result = torch.where(broken.flatten(1).any(1) if new.ndim > 1 else broken, 1.0, result)
    if fold.kind != "norm":
        return result
    old = weights[fold.weight]
    new = _divided(old, result)
    return torch.where(old == 0, result, old.float() / new.float())


def _divided(held: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    by = scale.reshape(-1, *[1] * (held.ndim - 1))
    return (held.float() / by).to(held.dtype)
