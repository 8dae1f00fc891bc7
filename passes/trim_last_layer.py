"""``trim_last_layer``: behind the last attention, only rows whose logits are asked for are computed.

A prompt's last layer must write its keys and values for every token, but nothing reads what its
output projection and MLP make of any row but the last. The gather of the asked rows moves from
before the language-model head to behind the attention; what is between works row by row, so its
results stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import ADD_RMS_NORM, SILU_MUL
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
from sparsevila_compile.passes.scale_folding import BIAS_AT
from sparsevila_compile.passes.structure import Unlike, call_of, erase_unused, need
from sparsevila_compile.program import Program

aten = torch.ops.aten
GATHER = aten.gather.default

PREFILL = ("language", "turn")
ROWS = "logit_rows"
NOT_ROWS = "it does not pick rows by logit_rows"

ROW_BY_ROW = (
    *BIAS_AT,
    ADD_RMS_NORM,
    SILU_MUL,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.silu.default,
    aten.gelu.default,
    aten.to.dtype,
    operator.getitem,
)
"""Ops that make each row ``[..., :]`` of that row of their inputs alone."""


class TrimLastLayerConfig(PassConfig):
    """Options of ``trim_last_layer`` (none of its own)."""


@dataclass(frozen=True)
class Behind:
    """What lies between the values that are gathered instead (``given``) and a gather of rows.

    ``nodes`` are in graph order; nothing but the gather depends on them.
    """

    nodes: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]


def _row_by_row(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.mean.dim:
        return node.args[1] == [-1] and node.args[2:3] == (True,)
    if node.target is aten.split_with_sizes.default:
        return node.args[2:3] == (-1,)
    return node.target in ROW_BY_ROW


def find_behind(gather: fx.Node, rows: fx.Node) -> Behind:
    """What a gather of rows can move in front of.

    Raises:
        Unlike: nothing; says why.
    """
    x, dim, index = gather.args[:3]
    need(isinstance(x, fx.Node) and tensor_of(x).dim() == 3 and bool(dim == 1), NOT_ROWS)
    picked = call_of(index, [aten.expand.default], NOT_ROWS).args[0]
    source = call_of(picked, [aten.unsqueeze.default], NOT_ROWS)
    need(source.args[1] in (2, -1), NOT_ROWS)
    need(_whole(source.args[0]) is rows, NOT_ROWS)
    found = {gather}
    earlier = gather.prev
    while earlier.op != "root":
        if earlier.users and _row_by_row(earlier) and all(u in found for u in earlier.users):
            found.add(earlier)
        earlier = earlier.prev
    # A part of a result that is needed whole is a value like any other.
    found -= {n for n in found if n.target is operator.getitem and n.args[0] not in found}
    nodes = tuple(n for n in gather.graph.nodes if n in found and n is not gather)
    need(any(n.target in BIAS_AT for n in nodes), "no linear lies between it and other uses")
    inputs = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in found)
    given = tuple(i for i in inputs if i.op != "get_attr")
    lengths = [str(s) for s in tensor_of(x).shape[:2]]  # type: ignore[arg-type]
    for node in given:
        held = node.meta.get("val")
        sizes = [str(s) for s in held.shape] if isinstance(held, torch.Tensor) else []
        need(len(sizes) == 3 and sizes[:2] == lengths, f"{node.name} has no such rows")
    return Behind(nodes, given)


def _whole(node: object) -> object:
    """What slices of everything are taken of."""
    while isinstance(node, fx.Node) and node.target is aten.slice.Tensor:
        start, end, *step = node.args[2:]
        if start != 0 or not isinstance(end, int) or end < 2**62 or step not in ([], [1]):
            return node
        node = node.args[0]
    return node


@register
class TrimLastLayer(Pass[TrimLastLayerConfig]):
    name = "trim_last_layer"
    stage = "fuse"
    summary = "behind the last attention, prefill computes only rows whose logits are asked for"
    config_type = TrimLastLayerConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for name, component in program.components.items():
            if ROWS not in component.inputs:
                continue
            for node in calls(program, name, GATHER):
                try:
                    need(name in PREFILL, "a decode step has one row a sequence")
                    find_behind(node, component.input(ROWS))
                except Unlike as why:
                    yield Miss(name, str(why), module_path(node), node.name)
                else:
                    yield Match(name, node)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        component = program.component(match.component)
        edit = Editor(component)
        rows = component.input(ROWS)
        behind = find_behind(match.node, rows)
        for node in behind.given:
            first = next(n for n in behind.nodes if node in n.all_input_nodes)
            picked = edit.call(aten.unsqueeze.default, rows, 2, before=first)
            width = tensor_of(node).shape[2]
            index = edit.call(aten.expand.default, picked, [-1, -1, width], before=first)
            short = edit.call(GATHER, node, 1, index, before=first, origin=node)
            for user in behind.nodes:
                user.replace_input_with(node, short)
        for node in behind.nodes:
            edit.propagate(node)
        match.node.replace_all_uses_with(match.node.args[0])  # type: ignore[arg-type]
        erase_unused(match.node)
        context.notes["linears"] = sum(n.target in BIAS_AT for n in behind.nodes)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"trim_last_layer left {found.node.name} behind")
