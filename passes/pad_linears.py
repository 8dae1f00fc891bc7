"""``pad_linears``: an MLP whose inner width is no multiple of 16 gets zero channels up to one.

Matrix units load rows in pieces of 16 bytes: a product over 3420 channels (Qwen2.5-VL's encoder)
takes three times as long as one over 3424. The added channels are zero from end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.graph_edit import Editor, module_path
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
from sparsevila_compile.passes.structure import Readers, Unlike, erase_unused, need, readers_of
from sparsevila_compile.program import Program

aten = torch.ops.aten
LINEAR = aten.linear.default

KEEPS_ZERO = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.mul.Tensor)
"""Elementwise ops of which zeros give zeros; a product needs one zero factor, here both are."""


class PadLinearsConfig(PassConfig):
    """Options of ``pad_linears``."""

    multiple: int = Field(
        default=16, ge=2, le=256, description="Inner widths are padded to a multiple of this."
    )


@dataclass(frozen=True)
class Inner:
    """What computes a linear's input: the linears that make its channels, and what is between."""

    linears: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]


def inner_of(down: fx.Node, readers: Readers) -> Inner:
    """The inner part of an MLP, in graph order.

    Raises:
        Unlike: it cannot be padded; says why.
    """
    linears: dict[fx.Node, None] = {}
    between: dict[fx.Node, None] = {}

    def visit(node: object, user: fx.Node) -> None:
        if not isinstance(node, fx.Node):
            raise Unlike("its input is scaled by a number")
        need(
            all(u in between or u is down for u in node.users) or node in between,
            "its input is used elsewhere too",
        )
        if node.target is LINEAR:
            linears[node] = None
            return
        need(
            node.op == "call_function" and node.target in KEEPS_ZERO,
            "its input is not made by linears and elementwise ops that keep zeros",
        )
        between[node] = None
        for source in node.args[:2] if node.target is aten.mul.Tensor else node.args[:1]:
            visit(source, node)

    visit(down.args[0], down)
    for node in (down, *linears):
        stored = [a for a in node.args[1:3] if a is not None]
        for part in stored:
            if not isinstance(part, fx.Node) or part.op != "get_attr":
                raise Unlike("a weight is computed or shared")
            users = list(readers[str(part.target)].values())
            need(all(len(u) == 1 for u in users), "a weight is computed or shared")
            need(len(users) == 1, "a weight is shared with another component")
    order = {n: i for i, n in enumerate(down.graph.nodes)}
    return Inner(
        tuple(sorted(linears, key=order.__getitem__)), tuple(sorted(between, key=order.__getitem__))
    )


@register
class PadLinears(Pass[PadLinearsConfig]):
    """Widths are those of weights in floating point; 8-bit rows are padded where they are stored."""

    name = "pad_linears"
    stage = "fuse"
    summary = "inner widths of MLPs are padded to what matrix units load fast"
    config_type = PadLinearsConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        readers = readers_of(program)
        for component in program.components.values():
            for node in calls(program, component.name, LINEAR):
                width = int(tensor_of(node.args[1]).shape[1])  # type: ignore[arg-type]
                if width % self.config.multiple == 0:
                    continue
                try:
                    yield Match(component.name, node, inner_of(node, readers))
                except Unlike as reason:
                    yield Miss(component.name, str(reason), module_path(node), node.name)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        edit = Editor(program.component(match.component))
        inner: Inner = match.data
        width = int(tensor_of(match.node.args[1]).shape[1])  # type: ignore[arg-type]
        more = -width % self.config.multiple
        for node in inner.linears:
            self._pad(program, edit, node, 1, (0, 0, 0, more))
            if len(node.args) > 2 and node.args[2] is not None:
                self._pad(program, edit, node, 2, (0, more))
        for node in (*inner.linears, *inner.between):
            edit.propagate(node)
        self._pad(program, edit, match.node, 1, (0, more))
        edit.propagate(match.node)
        widths = context.notes.setdefault("widths", {})
        widths[f"{width} -> {width + more}"] = widths.get(f"{width} -> {width + more}", 0) + 1

    @staticmethod
    def _pad(
        program: Program, edit: Editor, node: fx.Node, at: int, sides: tuple[int, ...]
    ) -> None:
        old = node.args[at]
        assert isinstance(old, fx.Node)
        name = str(old.target)
        program.weights[name] = torch.nn.functional.pad(program.weights[name], sides)
        new = edit.weight(name, program.weights[name], before=node)
        node.args = (*node.args[:at], new, *node.args[at + 1 :])
        erase_unused(old)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"pad_linears left {found.node.name} behind")
