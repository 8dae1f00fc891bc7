"""The log-sum-exp of an attention's rows, which its forward computes anyway."""

from __future__ import annotations

import operator

import torch
from torch import fx

from sparsevila_compile.graph_edit import Editor


def with_lse(edit: Editor, node: fx.Node, op: torch._ops.OpOverload) -> tuple[fx.Node, fx.Node]:
    """An attention replaced by the op of the same arguments that also returns its log-sum-exp.

    Returns the new node and the log-sum-exp, float32 ``[batch, heads, rows]``, the last of the
    nodes inserted.
    """
    new = edit.call(op, *node.args, before=node, origin=node)
    out = edit.call(operator.getitem, new, 0, before=node, origin=node)
    lse = edit.call(operator.getitem, new, 1, before=node, origin=node)
    edit.replace(node, out)
    return new, lse
