"""What a recipe would do, from the model's configuration alone: nothing is loaded or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsevila_compile.compiler import trace_empty, wanted_device
from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import module_path
from sparsevila_compile.manager import look, run_passes, steps_for
from sparsevila_compile.pass_base import Context, Match, Miss, Pass
from sparsevila_compile.passes.repack_awq import RepackAwq
from sparsevila_compile.program import Program
from sparsevila_compile.recipe import Recipe
from sparsevila_compile.report import PassReport


@dataclass
class Planned:
    """What one pass would do.

    Attributes:
        pass_: the pass with the recipe's options.
        index: its place in the recipe's list, or None where the compiler adds it.
        report: what it matches and misses, or None where it was not reached or refused.
        error: why compiling would stop here, as it would be reported, or None.
    """

    pass_: Pass[Any]
    index: int | None
    report: PassReport | None = None
    error: str | None = None


@dataclass(frozen=True)
class Looked:
    """One node that a pass looked at.

    Attributes:
        shape: of its result; symbolic sizes by name.
        reason: why it was left alone, or None where it matches.
        becomes: what it becomes, where the pass says so.
    """

    component: str
    node: str
    where: str
    shape: str
    reason: str | None
    becomes: str = ""


def plan(recipe: Recipe) -> list[Planned]:
    """Run the recipe's passes dry, on a model without weights.

    A pass that matches nothing is noted as the error that it would be, and planning goes on; where
    a pass refuses the program, planning ends there.

    Raises:
        UserError: there is no such checkpoint, or the model is not supported.
    """
    program = trace_empty(recipe)
    lowering = recipe.lowering()
    awq = RepackAwq.needed(program)
    steps = [Planned(p, i) for p, i in steps_for(recipe.build(), lowering, awq=awq)]
    patient = [_allow_nothing(p) for p in recipe.build()]
    reports: list[PassReport] = []

    def started(_: str) -> None:
        if steps[len(reports)].pass_.stage == "lower":
            program.device = wanted_device(recipe)  # kernels are chosen for it, not for meta

    try:
        run_passes(program, patient, Context(dry=True), reports.append, started, lowering)
    except (UserError, GraphError) as error:
        stopped = steps[len(reports)]
        with_place = error if isinstance(error, UserError) else UserError(str(error))
        stopped.error = _as_reported(recipe, with_place)
    for step, report in zip(steps, reports, strict=False):
        step.report = report
        if not report.matches and step.index is not None and not step.pass_.config.optional:
            problem = UserError(
                f"{report.name} matches nothing; fix its options, remove it, or set optional: true"
            )
            problem.index = step.index  # type: ignore[attr-defined]
            step.error = _as_reported(recipe, problem)
    return steps


def _allow_nothing(pass_: Pass[Any]) -> Pass[Any]:
    return type(pass_)(pass_.config.model_copy(update={"optional": True}))


def _as_reported(recipe: Recipe, error: UserError) -> str:
    try:
        with recipe.blame("passes"):
            raise error
    except UserError as placed:
        return str(placed)


class _Seen(Exception):
    """Ends the run: the pass in question has been looked at."""


def explain(recipe: Recipe, name: str) -> list[list[Looked]]:
    """What a pass sees where it would run, node by node; one list for each time it is listed.

    Raises:
        UserError: the recipe has no such pass, or an earlier pass fails.
    """
    passes, lowering = recipe.build(), recipe.lowering()
    program = trace_empty(recipe)
    steps = steps_for(passes, lowering, awq=RepackAwq.needed(program))
    if name not in {p.name for p, _ in steps}:
        listed = ", ".join(p.name for p, _ in steps)
        raise UserError(f"{recipe.file}: runs no pass {name!r}; it runs {listed}")
    queue = iter(steps)
    wanted = sum(p.name == name for p, _ in steps)
    found: list[list[Looked]] = []

    def started(_: str) -> None:
        pass_, _index = next(queue)
        if pass_.name == name:
            found.append(_nodes(program, pass_))
            if len(found) == wanted:
                raise _Seen

    try:
        with recipe.blame("passes"):
            run_passes(program, passes, Context(dry=True), on_start=started, lowering=lowering)
    except _Seen:
        pass
    return found


def _nodes(program: Program, pass_: Pass[Any]) -> list[Looked]:
    look(program, pass_)  # refuses where the pass would
    return [_looked(program, found) for found in pass_.match(program)]


def _looked(program: Program, found: Match | Miss) -> Looked:
    site = found.site()
    reason = found.reason if isinstance(found, Miss) else None
    nodes = {n.name: n for n in program.component(site.component).graph.nodes}
    node = nodes.get(site.node)
    shape = shape_text(node.meta.get("val")) if node is not None else ""
    where = site.where or (module_path(node) if node is not None else "")
    becomes = found.data if isinstance(found, Match) and isinstance(found.data, str) else ""
    return Looked(site.component, site.node, where, shape, reason, becomes)


def shape_text(value: Any) -> str:
    """``float32 [s0, 577, 1024]`` for a fake tensor; several in brackets."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(s) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} [{sizes}]"
    if isinstance(value, (list, tuple)):
        return "(" + "; ".join(shape_text(v) for v in value) + ")"
    return "" if value is None else type(value).__name__
