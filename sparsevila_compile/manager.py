"""Runs passes: order, snapshots, verification, roll-back, reports."""

from __future__ import annotations

import gc
import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sparsevila_compile.passes  # noqa: F401  (registers them)
from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.pass_base import PASSES, Context, Match, Miss, Pass, PassError
from sparsevila_compile.passes.repack_awq import RepackAwq
from sparsevila_compile.program import STAGES, Program
from sparsevila_compile.report import MissGroup, PassReport, Site
from sparsevila_compile.verify import verify

Step = tuple[Pass[Any], int | None]
"""A pass and its index in the recipe's list (None: added by the compiler)."""


def fingerprint(program: Program) -> str:
    """A hash of the graphs' structure and of which tensors the weights are."""
    digest = hashlib.sha256()
    for name, component in sorted(program.components.items()):
        digest.update(f"{name}{component.outputs}".encode())
        for node in component.graph.nodes:
            digest.update(
                f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}\n".encode()
            )
    for name, weight in sorted(program.weights.items()):
        digest.update(f"{name} {id(weight)} {weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(f"{program.prune}{program.retrieval}{program.caches}{program.taps}".encode())
    return digest.hexdigest()


def steps_for(
    passes: Sequence[Pass[Any]], lowering: Pass[Any] | None = None, *, awq: bool = False
) -> list[Step]:
    """The recipe's passes plus those that every compilation needs, where not listed.

    Args:
        lowering: the pass that ends the compilation; ``lower_ops`` by default.
        awq: the checkpoint stores linears as AWQ tools do, which ``repack_awq`` takes over.

    Raises:
        PassError: out of stage order, or a pass twice that must not repeat.
    """
    steps: list[Step] = [(p, i) for i, p in enumerate(passes)]
    seen: dict[str, int] = {}
    last = -1
    for pass_, index in steps:
        order = STAGES.index(pass_.stage)
        if pass_.name in seen and not pass_.repeatable:
            raise PassError(
                f"{pass_.name} is listed twice (first as number {seen[pass_.name] + 1}); "
                "a second run would match nothing; remove one",
                index,
            )
        if order < last:
            before = passes[(index or 0) - 1].name
            raise PassError(
                f"{pass_.name} (stage {pass_.stage}) is listed after {before} (stage "
                f"{passes[(index or 0) - 1].stage}); the order is {' → '.join(STAGES[1:])}",
                index,
            )
        seen[pass_.name] = index or 0
        last = order
    for name in ("canonicalize", *(("repack_awq",) if awq else ())):
        if name not in seen:
            steps.insert(0, (_default(name), None))
    last_pass = lowering or _default("lower_ops")
    if last_pass.name not in seen:
        steps.append((last_pass, None))
    return steps


def _default(name: str) -> Pass[Any]:
    cls = PASSES[name]
    return cls(cls.config_type())


def run_passes(
    program: Program,
    passes: Sequence[Pass[Any]],
    context: Context,
    on_report: Callable[[PassReport], None] = lambda report: None,
    on_start: Callable[[str], None] = lambda name: None,
    lowering: Pass[Any] | None = None,
) -> list[PassReport]:
    """Run passes in order over the program, in place.

    Each pass runs on a snapshot-protected program: whatever it raises, the program is as it was
    before that pass. ``on_report`` is called after each. ``lowering``: see :func:`steps_for`.

    Raises:
        PassError: a pass refused the program or matched nothing.
        GraphError: a pass broke the program (a defect); the program is restored first.
    """
    reports = []
    for pass_, index in steps_for(passes, lowering, awq=RepackAwq.needed(program)):
        on_start(pass_.name)
        reports.append(_run(program, pass_, index, context))
        on_report(reports[-1])
    return reports


def look(program: Program, pass_: Pass[Any]) -> tuple[list[Match], list[Miss]]:
    """What a pass would match and miss; changes nothing."""
    pass_.requires(program)
    found = list(pass_.match(program))
    return (
        [m for m in found if isinstance(m, Match)],
        [m for m in found if isinstance(m, Miss)],
    )


def _run(program: Program, pass_: Pass[Any], index: int | None, context: Context) -> PassReport:
    snapshot: Program | None = program.snapshot()
    nodes, size = program.node_count(), program.weight_bytes()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    context.notes = {}
    try:
        if STAGES.index(pass_.stage) < STAGES.index(program.stage):
            raise UserError(
                f"{pass_.name} (stage {pass_.stage}) comes too late: the program is at stage "
                f"{program.stage}; trace it anew"
            )
        if STAGES.index(pass_.stage) > STAGES.index("prune"):
            drop_taps(program)
        before = fingerprint(program)
        matches, misses = look(program, pass_)
        # Before rewriting: a rewrite may erase the node that a site is named after.
        sites = tuple(m.site() for m in matches)
        if not matches and not pass_.config.optional and index is not None:
            raise UserError(
                f"{pass_.name} matches nothing{_why(misses)}; fix its options, remove it, or set optional: true"
            )
        pass_.prepare(program, matches, context)
        if matches and pass_.spends_weights(program):
            snapshot = None
        for match in matches:
            pass_.rewrite(program, match, context)
        pass_.finish(program, matches, context)
        program.drop_unused_weights()
        program.stage = pass_.stage
        program.passes.append(pass_.name)
        verify(program)
        pass_.ensures(program)
    except UserError as error:
        _roll_back(program, snapshot)
        raise PassError(str(error), index) from error
    except BaseException:
        _roll_back(program, snapshot)
        raise
    modified = fingerprint(program) != before
    if matches and not modified:
        _roll_back(program, snapshot)
        raise GraphError(f"{pass_.name} matched {len(matches)} times and changed nothing")
    if program.weight_bytes() < size:
        # Graph modules made for calibration are reference cycles that hold the replaced weights.
        del snapshot
        gc.collect()
    return PassReport(
        name=pass_.name,
        index=index,
        stage=pass_.stage,
        options=pass_.config.model_dump(mode="json"),
        matches=sites,
        misses=_group(misses),
        modified=modified,
        nodes_before=nodes,
        nodes_after=program.node_count(),
        bytes_before=size,
        bytes_after=program.weight_bytes(),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory(),
        implementations=context.notes.pop("implementations", {}),
        fallbacks=context.notes.pop("fallbacks", {}),
        notes=dict(context.notes),
    )


def _roll_back(program: Program, snapshot: Program | None) -> None:
    """Back to before a pass; empty where that pass had begun to spend the weights."""
    if snapshot is not None:
        program.restore(snapshot)
    else:
        program.components.clear()
        program.weights.clear()


def drop_taps(program: Program) -> None:
    """Forget outputs that only kept encoder layers alive for pruning, and what is dead without them.

    Done once pruning is over, so that no later pass works on layers that never run.
    """
    for component in program.components.values():
        edit = Editor(component)
        for tap in set(program.taps) & set(component.outputs):
            edit.drop_output(tap)
            edit.sweep()
    program.taps = ()


def _why(misses: list[Miss]) -> str:
    groups = _group(misses)
    if not groups:
        return ": nothing in the model looks like it"
    text = "; ".join(f"{len(g.sites)} × {g.reason}" for g in groups[:3])
    return f" ({text})"


def _group(misses: list[Miss]) -> tuple[MissGroup, ...]:
    groups: dict[str, list[Site]] = {}
    for miss in misses:
        groups.setdefault(miss.reason, []).append(miss.site())
    return tuple(MissGroup(reason=r, sites=tuple(s)) for r, s in groups.items())


def peak_memory() -> int:
    """Bytes: CUDA peak since the last reset, or the process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
