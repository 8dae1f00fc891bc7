"""``merge_linears``: linears that read the same input become one (q, k, v; gate, up).

One wide matrix product costs one launch in place of three and reads its input once. Weights are
joined along their outputs, 4-bit ones as they are stored: group scales belong to one output each,
so nothing is quantized anew.
"""

from __future__ import annotations

import operator
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
    register,
    tensor_of,
)
from sparsevila_compile.passes.scale_folding import BIAS_AT, bias_of, weight_of
from sparsevila_compile.passes.structure import (
    Readers,
    Unlike,
    erase_unused,
    need,
    positions,
    readers_of,
    refresh_views,
)
from sparsevila_compile.program import Component, Program

aten = torch.ops.aten


class MergeLinearsConfig(PassConfig):
    """Options of ``merge_linears`` (none of its own)."""


def _parts(node: fx.Node) -> list[fx.Node]:
    """The stored tensors of a linear, bias left out: a weight, or codes, scales, zero points."""
    return list(node.args[1 : BIAS_AT[node.target]])  # type: ignore[arg-type]


def _storage(node: fx.Node) -> tuple[object, ...]:
    """How a linear is stored, but for its outputs; those that differ in this cannot be merged."""
    values = [tensor_of(p) for p in _parts(node)]
    parts = tuple((v.dtype, tuple(int(s) for s in v.shape[1:])) for v in values)
    return (node.target, parts, *node.args[BIAS_AT[node.target] + 1 :])


def _linears(component: Component) -> dict[fx.Node, list[fx.Node]]:
    """Linears by the node that they read, in graph order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in component.graph.nodes:
        if node.op == "call_function" and node.target in BIAS_AT:
            found.setdefault(node.args[0], []).append(node)
    return found


@register
class MergeLinears(Pass[MergeLinearsConfig]):
    """Rewritten in every component that shares the weights, so these are stored once.

    A merged weight is named after its parts: ``…self_attn.q_proj_k_proj_v_proj.weight``.
    """

    name = "merge_linears"
    stage = "fuse"
    summary = "linears that read the same input become one"
    config_type = MergeLinearsConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        readers, tied, done = readers_of(program), _tied(program), set[str]()
        for component in program.components.values():
            for nodes in _linears(component).values():
                if len(nodes) < 2 or any(weight_of(n) in done for n in nodes):
                    continue
                kinds: dict[object, list[fx.Node]] = {}
                for node in nodes:
                    try:
                        _check(node, readers, tied)
                        kinds.setdefault(_storage(node), []).append(node)
                    except Unlike as why:
                        yield Miss(component.name, str(why), module_path(node), node.name)
                for group in kinds.values():
                    yield from _judge(component.name, group, readers, len(nodes))
                    done |= {str(weight_of(n)) for n in group}

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        names: list[str] = match.data
        stem = _stem(names)
        first = _named(program.component(match.component), names)
        rows = [int(tensor_of(_parts(n)[0]).shape[0]) for n in first]
        merged: dict[str, torch.Tensor] = {}
        for part in zip(*map(_parts, first), strict=True):
            suffix = str(part[0].target).rpartition(".")[2]
            held = [program.weights[str(p.target)] for p in part]
            merged[f"{stem}.{suffix}"] = _joined(held)
        biases = [
            None if b is None else program.weights[str(b.target)] for b in map(bias_of, first)
        ]
        if bias := _joined_biases(biases, rows):
            merged[f"{stem}.bias"] = bias[0]
        if taken := merged.keys() & program.weights.keys():
            raise GraphError(f"there is a weight {sorted(taken)[0]} already")
        program.weights |= merged
        for component in program.components.values():
            if nodes := _named(component, names):
                self._replace(component, nodes, rows, merged, stem)

    @staticmethod
    def _replace(
        component: Component,
        nodes: list[fx.Node],
        rows: list[int],
        merged: dict[str, torch.Tensor],
        stem: str,
    ) -> None:
        edit = Editor(component)
        order = positions(component.graph)
        at = min(nodes, key=order.__getitem__)
        stored = {n: edit.weight(n, tensor, before=at) for n, tensor in merged.items()}
        bias = stored.pop(f"{stem}.bias", None)
        x, target = at.args[0], at.target
        rest = [bias, *at.args[BIAS_AT[at.target] + 1 :]]
        wide = edit.call(target, x, *stored.values(), *rest, before=at, origin=at)  # type: ignore[arg-type]
        split = edit.call(aten.split_with_sizes.default, wide, rows, -1, before=at, origin=at)
        parts = [
            edit.call(operator.getitem, split, i, before=at, origin=node)
            for i, node in enumerate(nodes)
        ]
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            erase_unused(node)
            refresh_views(edit, part)

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        context.notes["merged_linears"] = sum(len(m.data) for m in matches)
        context.notes["into"] = len(matches)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"merge_linears left {found.where} behind")


def _check(node: fx.Node, readers: Readers, tied: set[str]) -> None:
    """Raise Unlike where a linear's tensors are not its own."""
    bias = bias_of(node)
    stored = [*_parts(node), *([bias] if bias is not None else [])]
    need(all(p.op == "get_attr" for p in stored), "its weight or bias is computed, not stored")
    for name in (str(p.target) for p in stored):
        need(name not in tied, "its weight is tied to another one")
        for users in readers[name].values():
            need(len(users) <= 1, "its weight serves several inputs")
            need(all(u.target in BIAS_AT for u in users), "its weight is no linear's elsewhere")


def _judge(
    component: str, group: list[fx.Node], readers: Readers, size: int
) -> Iterator[Match | Miss]:
    """Linears of one component that read one value and are stored alike."""
    try:
        need(
            len(group) > 1,
            f"of {size} linears that read its input, none other is stored alike (4-bit or not, "
            "dtype, group_size)",
        )
        biases = {tensor_of(b).dtype for n in group if (b := bias_of(n)) is not None}
        need(len(biases) <= 1, "the biases differ in dtype")
        shared = [readers[str(_parts(n)[0].target)] for n in group]
        for name in dict.fromkeys(c for users in shared for c in users):
            nodes = [u for users in shared for u in users.get(name, ())]
            together = (
                len(nodes) == len(group) and len({(n.args[0], _storage(n)) for n in nodes}) == 1
            )
            need(together, f"in {name} it does not read what the others read, or not alike")
    except Unlike as why:
        for node in group:
            yield Miss(component, str(why), module_path(node), node.name)
    else:
        names = [str(weight_of(n)) for n in group]
        yield Match(component, group[0], names, where=_stem(names))


def _tied(program: Program) -> set[str]:
    """Names of tensors that have another name too: joining one would store it twice."""
    seen: dict[int, list[str]] = {}
    for name, tensor in program.weights.items():
        if not tensor.is_meta and tensor.numel():
            seen.setdefault(tensor.data_ptr(), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


def _named(component: Component, names: list[str]) -> list[fx.Node]:
    """The component's linears of these weights, in that order."""
    found = {weight_of(n): n for n in component.graph.nodes}
    return [found[n] for n in names if n in found]


def _stem(names: list[str]) -> str:
    stems = [n.removesuffix(".weight") for n in names]
    parents = {s.rpartition(".")[0] for s in stems}
    if len(parents) > 1:
        return "_".join(s.replace(".", "_") for s in stems)
    (parent,) = parents
    joined = "_".join(s.rpartition(".")[2] for s in stems)
    return f"{parent}.{joined}" if parent else joined


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """``torch.cat`` after which the parts are views of the result.

    Snapshots hold the parts until the pass is over; as views they take no memory of their own, so
    at no time more than one group is stored twice. No value changes.
    """
    whole = torch.cat(parts)
    start = 0
    for part in parts:
        if not part.is_meta:
            part.data = whole[start : start + part.shape[0]]
        start += part.shape[0]
    return whole


def _joined_biases(biases: list[torch.Tensor | None], rows: list[int]) -> list[torch.Tensor]:
    """The biases one after the other, zeros for none; nothing where none has one."""
    given = [b for b in biases if b is not None]
    if not given:
        return []
    parts = [given[0].new_zeros(n) if b is None else b for b, n in zip(biases, rows, strict=True)]
    return [torch.cat(parts)]
