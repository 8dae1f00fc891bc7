"""How reports, plans and answers look on a terminal or in a file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsevila_compile.asking import PictureAnswers, same
from sparsevila_compile.budget import keep_count
from sparsevila_compile.compiler import Compiled, counts_text
from sparsevila_compile.planning import Looked, Planned
from sparsevila_compile.program import Program
from sparsevila_compile.report import MissGroup, PassReport, Site

PIPE_WIDTH = 160  # columns where the output is no terminal: nothing there says how wide it is


def console(stderr: bool = False) -> Console:
    """A console that does not squeeze tables where nobody looks at them through a window."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False)


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit: ``24.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def near(path: Path) -> str:
    """The path from the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def change(before: int, after: int) -> str:
    """``24.5 MB → 8.1 MB``, or one figure where nothing changed."""
    return bytes_text(after) if before == after else f"{bytes_text(before)} → {bytes_text(after)}"


# ------------------------------------------------------------------ module paths


def fold(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Module paths with their numbers folded, and how many paths each pattern stands for.

    ``layers.0.attn`` … ``layers.7.attn`` is ``layers.{0..7}.attn``. Paths that are no full grid of
    numbers are not folded together.
    """
    groups: dict[str, list[tuple[int, ...]]] = {}
    for path in paths:
        template = re.sub(r"(?<![^.])\d+(?![^.])", "#", path)
        numbers = tuple(int(p) for p in path.split(".") if p.isdecimal())
        groups.setdefault(template, []).append(numbers)
    out = []
    for template, rows in groups.items():
        columns = [sorted(set(c)) for c in zip(*rows, strict=True)]
        if len(set(rows)) == prod(len(c) for c in columns):
            out.append((_fill(template, [_ranges(c) for c in columns]), len(rows)))
            continue
        for row, repeated in groupby(sorted(rows)):
            out.append((_fill(template, [str(n) for n in row]), len(list(repeated))))
    return out


def _fill(template: str, words: list[str]) -> str:
    filled = iter(words)
    return re.sub(r"(?<![^.])#(?![^.])", lambda _: next(filled), template)


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    parts = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [n for _, n in run]
        if len(values) > 2:
            parts.append(f"{values[0]}..{values[-1]}")
        else:
            parts += [str(v) for v in values]
    return "{" + ",".join(parts) + "}"


def site_lines(sites: Iterable[Site]) -> list[str]:
    """``component: folded path × count`` for each pattern, components in order of appearance."""
    by_component: dict[str, list[str]] = {}
    for site in sites:
        by_component.setdefault(site.component, []).append(site.where or site.node)
    return [
        f"{component}: {pattern}" + (f" × {count}" if count > 1 else "")
        for component, paths in by_component.items()
        for pattern, count in fold(paths)
    ]


# ------------------------------------------------------------------ after compiling


def report_table(result: Compiled, width: int) -> Table:
    """One row a pass: what it matched, and what it changed; ``width`` is the terminal's."""
    # Narrow enough for 80 columns with names of passes whole.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1) if width >= 100 else 0, pad_edge=False)
    table.add_column("pass", no_wrap=True)
    least = {"matches": 7, "misses": 6, "parameter bytes": 10, "visual tokens": 8}
    for name, chars in (least | {"seconds": 7, "peak memory": 8}).items():
        table.add_column(name, justify="right", min_width=chars)
    for report in result.reports:
        tokens = visual_tokens(result.program) if report.stage == "prune" else ""
        table.add_row(
            report.name + ("" if report.index is not None else " +"),
            str(len(report.matches)),
            str(report.miss_count),
            change(report.bytes_before, report.bytes_after),
            tokens,
            f"{report.seconds:.2f}",
            bytes_text(report.peak_memory_bytes),
        )
    table.add_section()
    table.add_row(
        "in all",
        "",
        "",
        change(result.weight_bytes, result.program.weight_bytes()),
        visual_tokens(result.program),
        f"{result.seconds:.2f}",
        bytes_text(max(r.peak_memory_bytes for r in result.reports)),
        style="bold",
    )
    return table


def visual_tokens(program: Program) -> str:
    """Visual tokens of a picture before and after pruning; a share where its size decides."""
    prune, count = program.prune, program.layout.tokens_per_picture
    if prune is None:
        return "" if count is None else str(count)
    if count is None:
        return f"{prune.keep_ratio:.0%} kept a {prune.budget}"
    if prune.budget == "prompt":
        return f"{prune.keep_ratio:.0%} kept a prompt"
    return f"{count} → {keep_count(prune.keep_ratio, count)}"


def table_notes(result: Compiled) -> str:
    """What the table's words mean here."""
    gpu = result.program.device.type == "cuda"
    notes = [f"peak memory: {'on the GPU during the pass' if gpu else 'of the process so far'}"]
    prune = result.program.prune
    if prune is None or (prune.budget != "prompt" and result.program.layout.tokens_per_picture):
        notes.append("visual tokens: of a picture")
    if any(r.index is None for r in result.reports):
        notes.append("+: added by the compiler")
    return "; ".join(notes)


def unfinished_lines(reports: Iterable[PassReport]) -> list[str]:
    """Everything that a pass left alone or fell back from; never hidden."""
    lines = []
    for report in reports:
        for group in report.misses:
            lines += _group_lines(f"{report.name} left alone", group)
        lines += fallback_lines(report)
    return lines


def fallback_lines(report: PassReport) -> list[str]:
    """Implementations that would have been better and could not be taken."""
    return [f"{report.name} passed over {what}: {why}" for what, why in report.fallbacks.items()]


def note_lines(reports: Iterable[PassReport]) -> list[str]:
    """Figures that passes noted: single values and small tables."""
    lines = []
    for report in reports:
        for key, value in report.notes.items():
            if isinstance(value, dict) and len(value) <= 8:
                value = ", ".join(f"{k} {_figure(v)}" for k, v in value.items())
            elif isinstance(value, (dict, list, tuple)):
                continue  # long ones stand in the artifact's report.json
            lines.append(f"{report.name}: {key.replace('_', ' ')} {_figure(value)}")
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _group_lines(head: str, group: MissGroup) -> list[str]:
    return [f"{head} {line}: {group.reason}" for line in site_lines(group.sites)]


def show_result(out: Console, result: Compiled) -> None:
    """The table, what was left alone, and where the artifact is."""
    out.print(report_table(result, out.width))
    out.print(table_notes(result), markup=False, soft_wrap=True, style="dim")
    for line in note_lines(result.reports):
        out.print(line, markup=False, soft_wrap=True)
    for line in unfinished_lines(result.reports):
        out.print(line, markup=False, soft_wrap=True, style="yellow")


# ------------------------------------------------------------------ answers


def _whole_words(columns: list[str]) -> Table:
    """A table that breaks long words where the terminal is narrow; rich would cut them off."""
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def show_answers(out: Console, answers: list[PictureAnswers]) -> None:
    """For each picture its path and, a question a row, what was answered."""
    for asked in answers:
        out.print(f"\n{near(asked.path)}", markup=False, soft_wrap=True, style="bold")
        columns = ["question", "compiled"]
        dense = any(t.dense is not None for t in asked.turns)
        reference = any(t.reference is not None for t in asked.turns)
        columns += ["dense"] if dense else []
        columns += ["reference"] if reference else []
        table = _whole_words(columns)
        for turn in asked.turns:
            row = [turn.question, turn.compiled]
            row += [turn.dense or ""] if dense else []
            row += [turn.reference or ""] if reference else []
            right = turn.reference is None or same(turn.compiled, turn.reference)
            alike = turn.dense is None or same(turn.compiled, turn.dense)
            table.add_row(
                *(escape(cell) for cell in row), style=None if right and alike else "yellow"
            )
        out.print(table)


def summary_lines(answers: list[PictureAnswers], weights: tuple[int, int]) -> list[str]:
    """What was saved, and how many answers agree.

    Args:
        weights: bytes before and after.
    """

    def total(name: str) -> int:
        return sum(getattr(a, name) for a in answers)

    turns = [t for a in answers for t in a.turns]
    pictures = f"{len(answers)} picture{'s' if len(answers) != 1 else ''}"
    lines = [
        f"visual tokens of {pictures}: {total('visual_tokens')} before pruning, "
        f"{total('kept_tokens')} in the KV cache, "
        f"{total('attended_tokens')} attended by a decode step",
        f"visual KV that a decode step reads: {bytes_text(total('dense_kv_bytes'))} dense, "
        f"{bytes_text(total('kv_bytes'))} compiled",
        f"weights: {bytes_text(weights[0])} dense, {bytes_text(weights[1])} compiled",
    ]
    with_dense = [t for t in turns if t.dense is not None]
    if with_dense:
        alike = sum(same(t.compiled, t.dense) for t in with_dense)
        lines.append(f"compiled and dense answers agree: {alike} of {len(with_dense)}")
    known = [t for t in turns if t.reference is not None]
    if known:
        right = sum(same(t.compiled, t.reference) for t in known)
        line = f"right answers: {right} of {len(known)} compiled"
        if with_dense:
            line += f", {sum(same(t.dense, t.reference) for t in known)} of {len(known)} dense"
        lines.append(line)
    return lines


# ------------------------------------------------------------------ plan and explain


def show_plan(out: Console, steps: list[Planned]) -> None:
    """Each pass with what it would match and miss, layers folded."""
    for number, step in enumerate(steps, 1):
        name, report = step.pass_.name, step.report
        added = "" if step.index is not None else ", added by the compiler"
        counts = "not reached" if step.error is None else "refused"
        if report is not None:
            counts = counts_text(len(report.matches), report.miss_count)
        out.print(
            f"{number}. {name} (stage {step.pass_.stage}{added}): {counts}",
            markup=False,
            soft_wrap=True,
        )
        for line in site_lines(report.matches) if report else ():
            out.print(f"   match  {line}", markup=False, soft_wrap=True)
        for group in report.misses if report else ():
            for line in _group_lines("  miss ", group):
                out.print(f" {line}", markup=False, soft_wrap=True)
        for line in [*note_lines([report]), *fallback_lines(report)] if report else ():
            out.print(f"   {line}", markup=False, soft_wrap=True, style="dim")
        if step.error:
            out.print(f"   error  {step.error}", markup=False, soft_wrap=True, style="red")


def _verdict(node: Looked) -> str:
    if node.reason is not None:
        return escape(f"miss: {node.reason}")
    return escape(f"match: {node.becomes}") if node.becomes else "match"


def show_nodes(out: Console, looked: list[Looked]) -> None:
    """One row a node that a pass looked at."""
    table = _whole_words(["component", "node", "module", "result", "match or miss"])
    for node in looked:
        table.add_row(
            node.component,
            node.node,
            escape(node.where),
            escape(node.shape),
            _verdict(node),
            style=None if node.reason is None else "yellow",
        )
    out.print(table)
    matches = sum(n.reason is None for n in looked)
    out.print(counts_text(matches, len(looked) - matches), markup=False, soft_wrap=True)
