"""``fuse_rms_norm``: an RMSNorm, and the residual addition before it, become ``add_rms_norm``.

A traced norm is six to eight small kernels; with the addition it is one that reads each value once.
Found by structure: what is scaled by the reciprocal root of its own mean square, rounded, and
multiplied by a stored weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import ADD_RMS_NORM
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
    alike,
    call_of,
    cast_source,
    erase_unused,
    need,
    only_user,
    other,
)
from sparsevila_compile.program import Program

aten = torch.ops.aten

NO_MEAN_SQUARE = "what is under the root is not the mean square of the last dim plus a constant"
NOT_SCALED = "the root does not scale the value that it is of, and nothing else"
ROUNDED_OTHERWISE = "the scaled value is not rounded to the input's dtype before the weight"
NO_WEIGHT = "the normalised value is not multiplied by a stored weight of its dtype"


class FuseRmsNormConfig(PassConfig):
    """Options of ``fuse_rms_norm`` (none of its own)."""


@dataclass(frozen=True)
class Norm:
    """``result`` is the norm of ``x``."""

    x: fx.Node
    weight: str
    eps: float
    result: fx.Node


def find_norm(root: fx.Node) -> Norm:
    """The norm around an ``rsqrt``.

    Raises:
        Unlike: there is none; says why.
    """
    plus = call_of(root.args[0], [aten.add.Tensor], NO_MEAN_SQUARE)
    mean = call_of(plus.args[0], [aten.mean.dim], NO_MEAN_SQUARE)
    square = call_of(mean.args[0], [aten.pow.Tensor_Scalar, aten.mul.Tensor], NO_MEAN_SQUARE)
    wide, eps = square.args[0], plus.args[1]
    if not isinstance(wide, fx.Node) or not isinstance(eps, float):
        raise Unlike(NO_MEAN_SQUARE)
    squared = square.args[1] is wide if square.target is aten.mul.Tensor else square.args[1] == 2
    last = tensor_of(wide).dim() - 1
    need(
        bool(squared) and mean.args[1] in ([-1], [last]) and True in mean.args[2:3], NO_MEAN_SQUARE
    )
    need(all(len(n.users) == 1 for n in (square, mean, plus)), NOT_SCALED)
    scaled = call_of(only_user(root, NOT_SCALED), [aten.mul.Tensor], NOT_SCALED)
    need(other(scaled, root, NOT_SCALED) is wide, NOT_SCALED)
    need(tensor_of(wide).dtype == torch.float32, "the mean square is not computed in float32")
    x, rounded = wide, scaled
    if (source := cast_source(wide)) is not None:
        x, rounded = source, only_user(scaled, ROUNDED_OTHERWISE)
        need(cast_source(rounded) is scaled, ROUNDED_OTHERWISE)
        need(tensor_of(rounded).dtype == tensor_of(x).dtype, ROUNDED_OTHERWISE)
    result = call_of(only_user(rounded, NO_WEIGHT), [aten.mul.Tensor], NO_WEIGHT)
    weight = other(result, rounded, NO_WEIGHT)
    need(weight.op == "get_attr", NO_WEIGHT)
    held = tensor_of(weight)
    need(held.dtype == tensor_of(x).dtype and held.shape == tensor_of(x).shape[-1:], NO_WEIGHT)
    return Norm(x, str(weight.target), eps, result)


def _addition(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of one shape that x is the plain sum of, or None."""
    if x.op != "call_function" or x.target is not aten.add.Tensor or x.kwargs:
        return None
    a, b = x.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    return (a, b) if alike(a, x) and alike(b, x) else None


@register
class FuseRmsNorm(Pass[FuseRmsNormConfig]):
    """Matches in every component; a sum that is also used elsewhere is the op's second result."""

    name = "fuse_rms_norm"
    stage = "fuse"
    summary = "RMSNorm and the residual addition before it become one op"
    config_type = FuseRmsNormConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for component in program.components.values():
            added: set[fx.Node] = set()
            for node in calls(program, component.name, aten.rsqrt.default):
                try:
                    x = find_norm(node).x
                except Unlike as reason:
                    yield Miss(component.name, str(reason), module_path(node), node.name)
                    continue
                # Two norms of one sum: the first adds, the second finds the sum made.
                adds = _addition(x) is not None and x not in added
                added |= {x} if adds else set()
                yield Match(component.name, node, adds)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        edit = Editor(program.component(match.component))
        norm = find_norm(match.node)
        pair = _addition(norm.x) if match.data else None
        x, residual = (norm.x, None) if pair is None else (pair[1], pair[0])
        at = norm.result if pair is None else norm.x
        weight = edit.weight(norm.weight, program.weights[norm.weight], before=at)
        new = edit.call(ADD_RMS_NORM, x, residual, weight, norm.eps, before=at, origin=norm.result)
        normed = edit.call(operator.getitem, new, 0, before=at, origin=norm.result)
        norm.result.replace_all_uses_with(normed)
        if pair is not None:
            total = edit.call(operator.getitem, new, 1, before=at, origin=norm.x)
            norm.x.replace_all_uses_with(total)
            erase_unused(norm.x)
        erase_unused(norm.result)

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        context.notes["with_addition"] = sum(m.data for m in matches)
        context.notes["without_addition"] = sum(not m.data for m in matches)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"fuse_rms_norm left {found.node.name} behind")
