"""The backend itself: what Dynamo calls with every graph it captures.

A graph of a supported model's whole forward becomes: the engine's turn or decode step, for what
depends on the language model's weights; the inner backend's code, for the rest. Any other graph goes
to the inner backend as it is, and the report says so. See ``docs/torch-compile.md``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsevila_compile.dynamo.adapter import (
    compiled_module,
    inner_compile,
    last_graph_break,
    prepare_dynamo,
    running_model,
    running_modules,
    trace_anew,
)
from sparsevila_compile.dynamo.backend_report import BackendReport
from sparsevila_compile.dynamo.capture import Forward, NotAForward, recognise
from sparsevila_compile.dynamo.served import Served, served_of
from sparsevila_compile.dynamo.settings import Settings, read_settings
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import family_of
from sparsevila_compile.recipe import RecipeError

prepare_dynamo()

Call = Callable[..., Any]

_RESET = "if this model differs from that one, call torch._dynamo.reset() and run it again"


def sparsevila(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Any = None, mode: Any = None
) -> Call:
    """Compile one captured graph; Dynamo calls this.

    Args:
        gm: the graph, with the model's weights among its inputs.
        example_inputs: one for each input.
        options: ``recipe`` (a path, a dict or a Recipe), ``strict``, ``inner`` (``inductor``, or
            ``eager``).
        mode: not supported.

    Returns:
        What runs instead of the graph. It raises :class:`UserError` for what the user can put right,
        at the call and not here, where Dynamo would wrap it.
    """
    try:
        if mode is not None:
            raise UserError(f"backend sparsevila has no mode {mode!r}; it has options instead")
        return _compile(gm, example_inputs, read_settings(options))
    except UserError as error:
        return _refusal(str(error))


def report(model: Any) -> BackendReport:
    """What the backend did to a model so far.

    Raises:
        UserError: the model has not been run with this backend.
    """
    served = served_of(getattr(model, "_orig_mod", model))
    if served is None:
        raise UserError(
            'this model has not been run with torch.compile(backend="sparsevila"); call generate first'
        )
    return served.report


def _compile(gm: fx.GraphModule, inputs: list[Any], settings: Settings) -> Call:
    part = compiled_module()
    module = None if part is None else running_model(part)
    why = _unfit(module)
    if module is None or (why is not None and served_of(module) is None):
        change = "compile a whole model: model.compile(backend='sparsevila')"
        BackendReport().missed("*", str(why), change, settings.strict)
        other: Call = inner_compile(settings.inner, gm, inputs)
        return other
    served = _serve(module, settings)
    try:
        adopted = served.adopt()
    except UserError as error:
        return _refusal(str(error), served)
    if adopted:
        trace_anew("AWQ linears of another package are traced as ours")
    served.report.graphs += 1
    if served.dense:
        return _plain(settings, gm, inputs)
    try:
        forward = recognise(gm, served.family, served.model.config.get_text_config())
    except NotAForward as error:
        return _hidden(served, error, gm, inputs)
    rest = None
    if forward.rest is not None:
        taken = [inputs[i] for i in forward.rest_inputs]
        rest = inner_compile(settings.inner, forward.rest, taken)
    return _call(settings, forward, rest, gm)


def _serve(module: torch.nn.Module, settings: Settings) -> Served:
    served = served_of(module)
    if served is None:
        return Served(module, settings)
    if not settings.same(served.settings):
        raise UserError(
            "this model was compiled with another recipe or other options already; load it anew"
        )
    return served


def _plain(settings: Settings, gm: fx.GraphModule, inputs: list[Any]) -> Call:
    """A model's graph as it is; it may serve other models of its shape, but no compiled one."""
    inner: Call = inner_compile(settings.inner, gm, inputs)

    def call(*args: Any) -> Any:
        running = [s for s in map(served_of, running_modules()) if s is not None]
        if any(s.settled for s in running):
            raise UserError(
                "a part of the forward that is no whole forward cannot run on a compiled model; load it anew"
            )
        if not running:
            other = Served(running_model(next(running_modules())), settings)
            other.dense = True
            other.every_pass("it runs as a model of its shape does that stays as it was", _RESET)
        return inner(*args)

    return call


def _unfit(module: torch.nn.Module | None) -> str | None:
    """Why a compiled function is no vision-language model that this package knows, or None."""
    if module is None:
        return "what is compiled is not the forward of a module"
    config = getattr(module, "config", None)
    if (
        config is None
        or not hasattr(module, "generate")
        or not hasattr(module, "get_output_embeddings")
    ):
        return f"{type(module).__name__} is no transformers model that generates"
    try:
        family_of(config.to_dict())
    except UserError as error:
        return str(error)
    return None


def _hidden(served: Served, error: NotAForward, gm: fx.GraphModule, inputs: list[Any]) -> Call:
    """A graph of the model that is not its whole forward."""
    why = error.why
    if error.broken and last_graph_break():
        why = f"{why} (Dynamo: {last_graph_break()})"
    if served.settled:
        return _refusal(f"backend sparsevila: {why}; {error.change}")
    change = error.change
    if error.broken and served.adopted:  # by the frames that were traced before they were
        change = "load it by sparsevila_compile.dynamo.load_awq: these AWQ kernels break the graph"
    served.every_pass(why, change)
    served.dense = True  # for good: a cache that this forward fills is of no use to the engine
    if served.give_back():
        trace_anew("AWQ linears are those of the package that loaded them")
    return _plain(served.settings, gm, inputs)


def _refusal(message: str, served: Served | None = None) -> Call:
    """Code that refuses to run; ``served``: the model that is at fault, if one is."""

    def refuse(*args: Any) -> Any:
        if served is None or served in map(served_of, running_modules()):
            raise UserError(message)
        raise UserError(f"of another model of this shape: {message}; {_RESET}")

    return refuse


def _call(settings: Settings, forward: Forward, rest: Call | None, stock: fx.GraphModule) -> Call:
    agreed: Any = None  # weakly: Dynamo keeps this code longer than a model may live

    def call(*args: Any) -> tuple[Any, ...]:
        nonlocal agreed
        module = next(running_modules())
        served = served_of(module)
        if served is None or agreed is None or agreed() is not served:
            served = _serve(module, settings)
            agreed = weakref.ref(served)
        if not (served.settled or served.dense):
            try:
                served.settle()
            except RecipeError:
                raise
            except UserError as error:
                served.every_pass(str(error), "compile another model, or none")
                served.dense = True
                served.give_back()
        if served.dense:
            return tuple(stock(*args))
        with torch.no_grad():
            mine = iter(served.run(forward, args))
        others = iter(rest(*(args[i] for i in forward.rest_inputs)) if rest else ())
        return tuple(next(others if role == "rest" else mine) for role in forward.outputs)

    return call
