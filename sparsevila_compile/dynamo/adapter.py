"""Everything that the backend takes from Dynamo beyond its public API, and the one look at a caller.

Dynamo hands a backend a graph and example inputs. Which module's forward the graph is of, and which
argument each input came from, it keeps in the translator and on the placeholders.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import fx

_DICT = re.compile(r"\.__dict__\['(\w+)'\]")

RECOMPILE_LIMIT = 64
"""Graphs of one forward at least: with or without padding, pictures and a past, and for one row or
several, there are more than Dynamo's default of eight, behind which it would silently run the stock
forward."""


def prepare_dynamo() -> None:
    """Set what the backend needs, for the whole process.

    transformers compares the numbers of placeholders and visual tokens, which breaks the graph at
    the token merge unless scalars are captured.
    """
    config: Any = torch._dynamo.config
    config.capture_scalar_outputs = True
    config.recompile_limit = max(int(config.recompile_limit), RECOMPILE_LIMIT)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        # There the token merge (masked_scatter) makes a size that nothing uses, which Dynamo takes
        # for an error unless told to warn.
        symbolic: Any = torch.fx.experimental._config
        symbolic.soft_pending_unbacked_not_found_error = True


def compiled_module() -> torch.nn.Module | None:
    """The module whose method Dynamo is compiling, or None."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tx: Any = InstructionTranslator.current_tx()
    root = getattr(tx.output, "root_tx", None) or tx
    found = root.f_locals.get("self")
    return found if isinstance(found, torch.nn.Module) else None


def trace_anew(reason: str) -> NoReturn:
    """Called by a backend: let Dynamo trace the frame that it is compiling again, from the start."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis  # backends may raise no other one
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tx: Any = InstructionTranslator.current_tx()
    root = getattr(tx.output, "root_tx", None) or tx
    root.speculation_log.clear()  # it holds the path through what has changed
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def running_modules() -> Iterator[torch.nn.Module]:
    """The modules in whose methods the current code runs, from the inside out.

    Code that Dynamo compiled takes weights as inputs, so it serves every model of the same shape;
    which one is calling, only the caller's frame says.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, torch.nn.Module):
            yield found
        frame = frame.f_back


def running_model(part: torch.nn.Module) -> torch.nn.Module:
    """The generating model that is running and has ``part`` among its modules, else ``part``."""
    for module in running_modules():
        if hasattr(module, "generate") and any(part is m for m in module.modules()):
            return module
    return part


def last_graph_break() -> str | None:
    """The first line of why Dynamo last broke a graph, or None."""
    from torch._dynamo.utils import counters

    reasons = list(counters["graph_break"])
    return str(reasons[-1]).strip().splitlines()[0] if reasons else None


def source_of(placeholder: fx.Node) -> str:
    """Where an input comes from, as Python (``L['kwargs']['input_ids']``).

    Modules are reached by ``._modules[…]`` always: where a package has wrapped ``nn.Module``'s
    methods (GPTQModel does), Dynamo writes ``.__dict__['_modules'][…]``.
    """
    source: Any = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name  # a method up to torch 2.9, a property later
    return _DICT.sub(r".\1", str(name() if callable(name) else name))


def inner_compile(name: str, graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile a graph that Dynamo captured with another backend."""
    return torch._dynamo.lookup_backend(name)(graph, inputs)


def may_vary(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Tell Dynamo that this size differs from call to call."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


Size = Callable[[Sequence[Any]], int]


class Sizes:
    """Turns symbolic sizes of a captured graph into functions of a call's arguments."""

    def __init__(self, graph: fx.Graph) -> None:
        self._at: dict[Any, int] = {}
        for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                self._at.setdefault(value.node.expr, i)

    def of(self, size: int | torch.SymInt) -> Size:
        """What gives one size; lengths of caches are sums, which need no symbolic algebra a call."""
        if not isinstance(size, torch.SymInt):
            fixed = int(size)
            return lambda args: fixed
        return self._of(size.node.expr)

    def _of(self, expr: Any) -> Size:
        if expr.is_Integer:
            fixed = int(expr)
            return lambda args: fixed
        if expr.is_Symbol:
            at = self._at[expr]
            return lambda args: int(args[at])
        if expr.is_Add:
            parts = [self._of(part) for part in expr.args]
            return lambda args: sum(part(args) for part in parts)
        known = {s: self._at[s] for s in expr.free_symbols if s in self._at}
        return lambda args: int(expr.subs({s: int(args[i]) for s, i in known.items()}))


def generate_arguments(model: Any) -> dict[str, Any] | None:
    """Keyword arguments of the ``generate`` call that the current code runs in, or None.

    ``generate`` encodes pictures before the first forward, that is, before a backend is first
    called; so for the very first prompt the pixels are to be had from its frame only.
    """
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is model:
            return dict(frame.f_locals.get("kwargs") or {})
        frame = frame.f_back
    return None
