"""``conv_to_linear``: a convolution whose kernel covers its whole input becomes a linear.

Packed encoders cut pictures into patches beforehand and then convolve each patch with kernels of its
own size (Qwen2.5-VL): a matrix product, for which convolution libraries take slow general kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


class ConvToLinearConfig(PassConfig):
    """Options of ``conv_to_linear`` (none of its own)."""


def _check(node: fx.Node, readers: Readers) -> None:
    """Raise Unlike where a convolution is more than one product for each picture or patch."""
    arguments = [*node.args, *[None] * (7 - len(node.args))]
    _, weight, bias, _, padding, dilation, groups = arguments
    need(isinstance(weight, fx.Node) and weight.op == "get_attr", "its weight is computed")
    need(bias is None or isinstance(bias, fx.Node), "its bias is no tensor")
    plain = all(p == 0 for p in padding or ()) and all(d == 1 for d in dilation or ())  # type: ignore[union-attr]
    need(plain and groups in (None, 1), "it is padded, dilated or grouped")
    kernel = list(tensor_of(weight).shape[1:])  # type: ignore[arg-type]
    inside = list(tensor_of(node.args[0]).shape[1:])  # type: ignore[arg-type]
    # Symbolic sizes compare as text: comparing them as numbers would fix them.
    need([str(s) for s in inside] == [str(s) for s in kernel], "its kernel moves over its input")
    users = readers[str(weight.target)].values()  # type: ignore[union-attr]
    need(list(users) == [[node]], "its weight is used elsewhere too")


@register
class ConvToLinear(Pass[ConvToLinearConfig]):
    """The weight ``[out, in, *kernel]`` is stored as ``[out, in · kernel]`` from then on."""

    name = "conv_to_linear"
    stage = "fuse"
    summary = "a convolution over single patches becomes a linear"
    config_type = ConvToLinearConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        readers = readers_of(program)
        for component in program.components.values():
            for target in CONVOLUTIONS:
                for node in calls(program, component.name, target):
                    try:
                        _check(node, readers)
                    except Unlike as reason:
                        yield Miss(component.name, str(reason), module_path(node), node.name)
                    else:
                        yield Match(component.name, node)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        edit = Editor(program.component(match.component))
        node = match.node
        x, old = node.args[0], node.args[1]
        assert isinstance(old, fx.Node)
        name = str(old.target)
        program.weights[name] = program.weights[name].flatten(1)
        outputs, width = (int(n) for n in program.weights[name].shape)
        ones = [1] * (tensor_of(node).ndim - 2)
        weight = edit.weight(name, program.weights[name], before=node)
        rows = edit.call(aten.reshape.default, x, [-1, width], before=node, origin=node)
        bias = node.args[2] if len(node.args) > 2 else None
        product = edit.call(aten.linear.default, rows, weight, bias, before=node, origin=node)
        shaped = edit.call(
            aten.reshape.default, product, [-1, outputs, *ones], before=node, origin=node
        )
        edit.replace(node, shaped)
        erase_unused(old)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"conv_to_linear left {found.node.name} behind")
