"""``fuse_rotary``: the rotary embedding of an attention's q and k becomes one ``rotary``.

Traced, it is ten kernels a layer. Found by structure: ``x · cos + [-b, a] · sin`` for the halves a
and b of x, on both q and k of one attention, by the same tables. How positions turn into angles
does not matter, so one-dimensional, multimodal and two-dimensional (vision) positions are alike.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import (
    ATTENTION,
    ATTENTION_LSE,
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    RETRIEVAL_ATTENTION,
    ROTARY,
)
from sparsevila_compile.pass_base import (
    Context,
    Match,
    Miss,
    Pass,
    PassConfig,
    calls,
    register,
    tensor_of,
)
from sparsevila_compile.passes.structure import (
    Unlike,
    call_of,
    cast_source,
    erase_unused,
    need,
    only_user,
    other,
    positions,
    refresh_views,
)
from sparsevila_compile.program import Component, Program

aten = torch.ops.aten
ATTENTIONS = (
    ATTENTION,
    ATTENTION_LSE,
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    RETRIEVAL_ATTENTION,
)
"""Ops whose first arguments are q and k."""

NOT_TURNED = "it negates the upper half of a value, but does not put it before the lower half"
NO_SUM = "the turned value times a table is not added to the value times a table"
NO_TABLE = "cos and sin are not tables [batch, length, head_dim] for all heads"
NOT_CAST_BACK = "the result does not have the dtype of what is rotated"
ALONE = "q and k of one attention are not both rotated by the same tables"
TOO_EARLY = "q or k is used before the other one is made"


class FuseRotaryConfig(PassConfig):
    """Options of ``fuse_rotary`` (none of its own)."""


@dataclass(frozen=True)
class Rotation:
    """``result`` is x, ``[B, H, S, D]`` or (packed) ``[N, H, D]``, rotated by tables without H."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    result: fx.Node


def find_rotation(neg: fx.Node) -> Rotation:
    """The rotation around the negation of an upper half.

    Raises:
        Unlike: there is none; says why.
    """
    high = call_of(neg.args[0], [aten.slice.Tensor], NOT_TURNED)
    x = high.args[0]
    if not isinstance(x, fx.Node):
        raise Unlike(NOT_TURNED)
    rank, width = tensor_of(x).dim(), int(tensor_of(x).shape[-1])
    turned = call_of(only_user(neg, NOT_TURNED), [aten.cat.default], NOT_TURNED)
    halves = list(turned.args[0])  # type: ignore[arg-type]
    need(len(halves) == 2 and halves[0] is neg, NOT_TURNED)
    low = call_of(halves[1], [aten.slice.Tensor], NOT_TURNED)
    need(turned.args[1:] in ((-1,), (rank - 1,)), NOT_TURNED)
    need(low.args[0] is x and _bounds(low, rank) == (0, width // 2), NOT_TURNED)
    need(_bounds(high, rank) == (width // 2, width) and width % 2 == 0, NOT_TURNED)
    by_sin = call_of(only_user(turned, NO_SUM), [aten.mul.Tensor], NO_SUM)
    result = call_of(only_user(by_sin, NO_SUM), [aten.add.Tensor], NO_SUM)
    need(not result.kwargs, NO_SUM)
    by_cos = call_of(other(result, by_sin, NO_SUM), [aten.mul.Tensor], NO_SUM)
    sin = _table(other(by_sin, turned, NO_SUM), rank, width)
    cos = _table(other(by_cos, x, NO_SUM), rank, width)
    need(tensor_of(cos).dtype == tensor_of(sin).dtype, NO_TABLE)
    if (source := cast_source(x)) is not None:
        x, result = source, only_user(result, NOT_CAST_BACK)
        need(cast_source(result) is not None, NOT_CAST_BACK)
    need(tensor_of(result).dtype == tensor_of(x).dtype, NOT_CAST_BACK)
    wide = torch.promote_types(tensor_of(x).dtype, tensor_of(cos).dtype)
    need(tensor_of(by_cos).dtype == wide, "it is computed in a wider dtype than x and cos")
    return Rotation(x, cos, sin, result)


def _bounds(part: fx.Node, rank: int) -> tuple[int, int]:
    """First and last value that a slice of the last dim takes, or Unlike."""
    dim, start, end = ([*part.args[1:4], None, None, None])[:3]
    need(dim in (-1, rank - 1) and len(part.args) < 5, NOT_TURNED)
    if not isinstance(start, int) or not isinstance(end, int):
        raise Unlike(NOT_TURNED)
    return start, min(end, int(tensor_of(part.args[0]).shape[-1]))  # type: ignore[arg-type]


def _table(node: fx.Node, rank: int, width: int) -> fx.Node:
    """The table behind an ``unsqueeze`` at the dim of the heads, or Unlike."""
    held = call_of(node, [aten.unsqueeze.default], NO_TABLE)
    need(held.args[1] in (1, 1 - rank), NO_TABLE)
    table = held.args[0]
    if not isinstance(table, fx.Node):
        raise Unlike(NO_TABLE)
    need(rank in (3, 4) and tensor_of(table).dim() == rank - 1, NO_TABLE)
    need(tensor_of(table).shape[-1] == width, NO_TABLE)
    return table


def _behind_views(node: object) -> object:
    """What an attention's argument is, transposed or with a dim of 1 or not."""
    while isinstance(node, fx.Node) and node.target in (
        aten.transpose.int,
        aten.unsqueeze.default,
    ):
        node = node.args[0]
    return node


@register
class FuseRotary(Pass[FuseRotaryConfig]):
    name = "fuse_rotary"
    stage = "fuse"
    summary = "rotary embedding of q and k becomes one op"
    config_type = FuseRotaryConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for component in program.components.values():
            yield from self._match(program, component)

    @staticmethod
    def _match(program: Program, component: Component) -> Iterator[Match | Miss]:
        found: dict[fx.Node, Rotation] = {}
        looked_at: dict[fx.Node, Rotation | str] = {}
        for node in calls(program, component.name, aten.neg.default):
            source = node.args[0]
            if not isinstance(source, fx.Node) or source.target is not aten.slice.Tensor:
                continue
            try:
                rotation = find_rotation(node)
                found[rotation.result] = looked_at[node] = rotation
            except Unlike as why:
                looked_at[node] = str(why)
        pairs = _pairs(component, found)
        order = positions(component.graph) if pairs else {}
        for node, seen in looked_at.items():
            pair = pairs.get(seen.result) if isinstance(seen, Rotation) else None
            if isinstance(seen, str):
                reason = seen
            else:
                reason = ALONE if pair is None else _in_order(pair, order)
            if reason:
                yield Miss(component.name, reason, module_path(node), node.name)
            elif pair is not None and seen is pair[0]:  # one match for q and k
                yield Match(component.name, node, pair)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        component = program.component(match.component)
        edit = Editor(component)
        pair: tuple[Rotation, Rotation] = match.data
        q, k = pair
        order = positions(component.graph)
        at = max((q.result, k.result), key=order.__getitem__)
        packed = tensor_of(q.x).dim() == 3

        def table(node: fx.Node) -> fx.Node:
            return edit.call(aten.unsqueeze.default, node, 0, before=at) if packed else node

        def heads(x: fx.Node) -> fx.Node:
            """``[B, S, H, D]``, before a transposition rather than transposed back."""
            if packed:
                return edit.call(aten.unsqueeze.default, x, 0, before=at)
            if x.target is aten.transpose.int and {d % 4 for d in x.args[1:]} == {1, 2}:  # type: ignore[operator]
                return x.args[0]  # type: ignore[return-value]
            return edit.call(aten.transpose.int, x, 1, 2, before=at)

        new = edit.call(
            ROTARY, heads(q.x), heads(k.x), table(q.cos), table(q.sin), before=at, origin=at
        )
        for i, rotation in enumerate(pair):
            part = edit.call(operator.getitem, new, i, before=at, origin=rotation.result)
            if packed:
                part = edit.call(aten.squeeze.dim, part, 0, before=at, origin=rotation.result)
                part = edit.call(aten.transpose.int, part, 0, 1, before=at, origin=rotation.result)
            rotation.result.replace_all_uses_with(part)
            refresh_views(edit, part)
        for rotation in pair:
            erase_unused(rotation.result)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"fuse_rotary left {found.node.name} behind")


def _pairs(
    component: Component, found: dict[fx.Node, Rotation]
) -> dict[fx.Node, tuple[Rotation, Rotation]]:
    """Rotated q and k of each attention, by either's result; each belongs to one pair."""
    pairs: dict[fx.Node, tuple[Rotation, Rotation]] = {}
    for node in component.graph.nodes:
        if node.op != "call_function" or node.target not in ATTENTIONS:
            continue
        q, k = (found.get(_behind_views(a)) for a in node.args[:2])  # type: ignore[call-overload]
        if q is None or k is None or q is k or q.result in pairs or k.result in pairs:
            continue
        same = (q.cos, q.sin) == (k.cos, k.sin)
        if same and tensor_of(q.x).dim() == tensor_of(k.x).dim():
            pairs[q.result] = pairs[k.result] = (q, k)
    return pairs


def _in_order(pair: tuple[Rotation, Rotation], order: dict[fx.Node, int]) -> str:
    """Why one op cannot make both, or ''."""
    made = max(order[r.result] for r in pair)
    if any(order[user] < made for r in pair for user in r.result.users):
        return TOO_EARLY
    return ""
