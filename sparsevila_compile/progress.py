"""Progress of compiling: bars on a terminal, one plain line a stage elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from sparsevila_compile.compiler import Observer
from sparsevila_compile.display import console, seconds_text


class PlainLines(Observer):
    """``[3/9] trace: llava, 1200 nodes (2.1 s)`` on stderr when a stage is done."""

    def __init__(self) -> None:
        self._stages = self._done = 0

    def total(self, stages: int) -> None:
        self._stages = stages

    def end(self, stage: str, seconds: float, detail: str) -> None:
        self._done += 1
        of = f"[{self._done}/{self._stages}] " if self._done <= self._stages else ""
        said = f": {detail}" if detail else ""
        print(f"{of}{stage}{said} ({seconds_text(seconds)})", file=sys.stderr, flush=True)


class Bars(Observer):
    """A bar a stage on stderr; a stage that cannot be counted pulses until it is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, stage: str) -> None:
        self._task = self._progress.add_task(stage, total=None, detail="")

    def progress(self, what: str, done: int, total: int) -> None:
        if self._task is not None:
            self._progress.update(
                self._task, completed=done, total=total, detail=f"{what} {done}/{total}"
            )

    def end(self, stage: str, seconds: float, detail: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1, total=1, detail=detail)
            self._progress.stop_task(self._task)


@contextlib.contextmanager
def observer(*, quiet: bool, bars: bool) -> Iterator[Observer]:
    """The observer for this terminal.

    Args:
        quiet: report nothing.
        bars: draw bars if stderr is a terminal.
    """
    if quiet:
        yield Observer()
    elif bars and sys.stderr.isatty():
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False, style="dim"),
        )
        with Progress(*columns, console=console(stderr=True)) as progress:
            yield Bars(progress)
    else:
        yield PlainLines()


@contextlib.contextmanager
def timed(watch: Observer, stage: str) -> Iterator[None]:
    """Report what runs within as one stage."""
    start = time.perf_counter()
    watch.start(stage)
    yield
    watch.end(stage, time.perf_counter() - start, "")
