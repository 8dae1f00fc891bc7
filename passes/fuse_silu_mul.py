"""``fuse_silu_mul``: silu of one projection times another (SwiGLU) becomes ``silu_mul``.

With ``merge_linears`` both projections are halves of one result, which the op reads in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import SILU_MUL
from sparsevila_compile.pass_base import Context, Match, Miss, Pass, PassConfig, calls, register
from sparsevila_compile.passes.structure import (
    Unlike,
    alike,
    call_of,
    erase_unused,
    need,
    only_user,
    other,
)
from sparsevila_compile.program import Program

aten = torch.ops.aten
NOT_MULTIPLIED = "silu is not multiplied by something else, once"


class FuseSiluMulConfig(PassConfig):
    """Options of ``fuse_silu_mul`` (none of its own)."""


def find_product(silu: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The product that a silu goes into, and its other factor.

    Raises:
        Unlike: there is none; says why.
    """
    product = call_of(only_user(silu, NOT_MULTIPLIED), [aten.mul.Tensor], NOT_MULTIPLIED)
    up = other(product, silu, NOT_MULTIPLIED)
    need(alike(up, silu), "silu is multiplied by a value of another shape or dtype")
    return product, up


@register
class FuseSiluMul(Pass[FuseSiluMulConfig]):
    name = "fuse_silu_mul"
    stage = "fuse"
    summary = "silu(gate) · up becomes one op"
    config_type = FuseSiluMulConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for component in program.components.values():
            for node in calls(program, component.name, aten.silu.default):
                try:
                    find_product(node)
                except Unlike as reason:
                    yield Miss(component.name, str(reason), module_path(node), node.name)
                else:
                    yield Match(component.name, node)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        edit = Editor(program.component(match.component))
        product, up = find_product(match.node)
        new = edit.call(SILU_MUL, match.node.args[0], up, before=product, origin=product)
        edit.replace(product, new)
        erase_unused(match.node)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"fuse_silu_mul left {found.node.name} behind")
