"""``canonicalize``: remove what tracing leaves behind and no later pass wants to see."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.pass_base import Context, Match, Miss, Pass, PassConfig, register
from sparsevila_compile.program import Program

aten = torch.ops.aten

CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
IDENTITIES = (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
)


class CanonicalizeConfig(PassConfig):
    """Options of ``canonicalize`` (none of its own)."""


def _same(node: fx.Node) -> bool:
    """Whether a node's result is its first argument, value for value and type for type."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    a, b = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return a.dtype == b.dtype and a.device == b.device and a.layout == b.layout


def _kind(node: fx.Node) -> str | None:
    """What is superfluous about a node, or None."""
    if node.op != "call_function":
        return None
    if node.target in CHECKS:
        return "check"
    if node.target in CASTS and _same(node) and node.kwargs.get("memory_format") is None:
        return "identity"
    if node.target in IDENTITIES:
        return "identity"
    if node.target is aten.mul.Tensor and node.args[1] == 1 and _same(node):
        return "identity"  # by the number one: a tensor is equal to no number
    if node.target is aten.dropout.default and not (node.args[2] and node.args[1]):
        return "identity"
    return None


@register
class Canonicalize(Pass[CanonicalizeConfig]):
    name = "canonicalize"
    stage = "canonicalize"
    summary = "removes trace-time checks, casts to the same type, factors of one and dead code"
    config_type = CanonicalizeConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for component in program.components.values():
            for node in component.graph.nodes:
                if kind := _kind(node):
                    yield Match(component.name, node, kind)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        node = match.node
        if match.data == "identity":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
        node.graph.erase_node(node)

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        context.notes["dead_nodes"] = sum(Editor(c).sweep() for c in program.components.values())

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            raise GraphError(f"canonicalize left {found.site().node} behind")
