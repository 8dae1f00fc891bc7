"""``lower_ops``: bind every canonical op to an implementation, once, and record it in the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import fx

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, value
from sparsevila_compile.kernels.registry import NAMESPACE, OPS, REFERENCE, Op
from sparsevila_compile.pass_base import Context, Match, Miss, Pass, PassConfig, register
from sparsevila_compile.program import Program


class LowerOpsConfig(PassConfig):
    """Options of ``lower_ops``."""

    implementations: dict[str, str] = Field(
        default_factory=dict,
        description="Force an implementation for an op, e.g. {w4a16_linear: reference}.",
    )


def canonical_op(node: fx.Node) -> Op | None:
    """The canonical op that a node calls, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    return OPS[target._opname] if target.namespace == NAMESPACE else None


def require_cache(program: Program) -> None:
    """Raise UserError where the program has no KV cache: it could not answer."""
    if not program.caches:
        raise UserError("the language model has no KV cache to answer with; list insert_kv_cache")


@register
class LowerOps(Pass[LowerOpsConfig]):
    """Every node of the namespace ``sparsevila`` gets its ``impl`` argument."""

    name = "lower_ops"
    stage = "lower"
    summary = "binds every op to a kernel for the device"
    config_type = LowerOpsConfig

    def requires(self, program: Program) -> None:
        require_cache(program)
        for op, name in self.config.implementations.items():
            if op not in OPS:
                raise UserError(
                    f"implementations: there is no op {op}; there are {', '.join(sorted(OPS))}"
                )
            known = [*OPS[op].implementations, REFERENCE]
            if name not in known:
                raise UserError(
                    f"implementations: {op} has no implementation {name!r}; it has {', '.join(known)}"
                )

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for component in program.components.values():
            for node in component.graph.nodes:
                op = canonical_op(node)
                if op is not None and "impl" not in node.kwargs:
                    yield Match(component.name, node, op)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        op: Op = match.data
        node = match.node
        args = fx.node.map_arg(node.args, value)  # type: ignore[arg-type]
        name = self._choose(op, program.device, args, context)
        node.kwargs = {**node.kwargs, "impl": name}
        context.notes.setdefault("implementations", {})[f"{match.component}/{node.name}"] = name

    def _choose(self, op: Op, device: torch.device, args: Any, context: Context) -> str:
        forced = self.config.implementations.get(op.name)
        if forced is None:
            choice = op.choose(device, *args)
            for name, reason in choice.rejected.items():
                context.notes.setdefault("fallbacks", {})[f"{op.name}: {name}"] = reason
            return choice.name
        if forced != REFERENCE:
            chosen = op.implementations[forced]
            refused = chosen.supported(device) or chosen.supports_args(*args)
            if refused is not None:
                raise UserError(f"implementations: {op.name} cannot be {forced}: {refused}")
        return forced

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        unused = set(self.config.implementations) - {m.data.name for m in matches}
        if unused:
            raise UserError(
                f"implementations: no {', '.join(sorted(unused))} in the graph; remove the entry"
            )
        for component in program.components.values():
            Editor(component).sweep()
        counts = Counter(
            f"{m.data.name}: {m.node.kwargs['impl']}" for m in matches if "impl" in m.node.kwargs
        )
        context.notes["bound"] = dict(counts)

    def ensures(self, program: Program) -> None:
        for component in program.components.values():
            for node in component.graph.nodes:
                if canonical_op(node) is not None and "impl" not in node.kwargs:
                    raise GraphError(f"{component.name}/{node.name} is not bound")
