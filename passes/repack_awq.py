"""``repack_awq``: linears that the checkpoint stores in AWQ's 4 bits become ``w4a16_linear``.

Codes, scales and zero points are moved into our layout and stay what they are: nothing is
dequantized or rounded, and scales keep their dtype. The compiler adds the pass where a checkpoint
asks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.kernels.awq_linear.layout import repack
from sparsevila_compile.ops import AWQ_LINEAR
from sparsevila_compile.pass_base import Context, Match, Miss, Pass, PassConfig, calls, register
from sparsevila_compile.program import Component, Program

from .linear_schemes import W4A16, Parts, named
from .structure import erase_unused


class RepackAwqConfig(PassConfig):
    """Options of ``repack_awq`` (none of its own)."""


@register
class RepackAwq(Pass[RepackAwqConfig]):
    """Every ``awq_linear``, in every component; the parts keep the linear's name."""

    name = "repack_awq"
    stage = "canonicalize"
    summary = "linears that the checkpoint stores in AWQ's 4 bits are taken over, code for code"
    config_type = RepackAwqConfig

    @classmethod
    def needed(cls, program: Program) -> bool:
        """Whether the program holds what this pass rewrites."""
        return any(True for name in program.components for _ in calls(program, name, AWQ_LINEAR))

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for name in program.components:
            for node in calls(program, name, AWQ_LINEAR):
                yield Match(name, node, f"w4a16_linear, group_size {node.args[5]}")

    def prepare(self, program: Program, matches: list[Match], context: Context) -> None:
        self._stored: dict[str, Parts] = {}
        sizes = Counter(int(m.node.args[5]) for m in matches)  # type: ignore[arg-type]
        context.notes["group_sizes"] = dict(sizes)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        node = match.node
        stem = str(node.args[1].target).removesuffix(".qweight")  # type: ignore[union-attr]
        if stem not in self._stored:
            parts = self._parts(program, node, stem, context.dry)
            self._stored[stem] = named(f"{stem}.weight", parts)
            program.weights |= self._stored[stem]
        self._replace(program.component(match.component), node, self._stored[stem])

    @staticmethod
    def _parts(program: Program, node: fx.Node, stem: str, dry: bool) -> Parts:
        qweight, qzeros, scales = (program.weights[str(a.target)] for a in node.args[1:4])  # type: ignore[union-attr]
        group_size: Any = node.args[5]
        scheme = W4A16(group_size, clip=False)
        if dry:
            return scheme.empty(scales.shape[1], qweight.shape[0], scales.dtype)
        if not bool(scales.isfinite().all()):
            raise UserError(f"{stem}.scales: holds inf or NaN; the checkpoint is damaged")
        return scheme.parts(*repack(qweight, qzeros, scales, group_size))

    @staticmethod
    def _replace(component: Component, node: fx.Node, stored: dict[str, torch.Tensor]) -> None:
        edit = Editor(component)
        x, *old, bias, group_size = node.args
        parts = [edit.weight(n, tensor, before=node) for n, tensor in stored.items()]
        arguments = W4A16(group_size, clip=False).arguments(parts, bias)  # type: ignore[arg-type]
        new = edit.call(W4A16.op, x, *arguments, before=node, origin=node)
        edit.replace(node, new)
        for part in old:
            erase_unused(part)  # type: ignore[arg-type]

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            raise GraphError(f"repack_awq left {found.site().where} behind")
