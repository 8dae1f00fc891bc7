"""How every figure here is measured: CUDA graphs over rotating inputs, timed with device events.

One graph holds a call for each set of inputs, so that replays read from memory and not from the
cache where the sets together exceed it, and launches cost what they cost inside a captured decode
step. Medians and percentiles are over replays.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile, and how many replays they are over."""

    median: float
    p20: float
    p80: float
    replays: int

    def json(self) -> dict[str, float]:
        return asdict(self)


def _percentiles(microseconds: list[float]) -> Timing:
    ordered = sorted(microseconds)
    last = len(ordered) - 1
    p20, median, p80 = (ordered[round(q * last)] for q in (0.2, 0.5, 0.8))
    return Timing(median, p20, p80, len(ordered))


def time_graph(
    calls: Sequence[Callable[[], Any]], *, budget_ms: float = 150.0, most: int = 200
) -> Timing:
    """Time one call, the mean over ``calls`` (the same work on different inputs) in one CUDA graph.

    Args:
        calls: one closure for each set of inputs; they run one after the other.
        budget_ms: about how long to measure; warm-up comes on top.
        most: replays at most; never fewer than 10.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    timing = time_events(graph.replay, budget_ms=budget_ms, most=most)
    del kept
    n = len(calls)
    return Timing(timing.median / n, timing.p20 / n, timing.p80 / n, timing.replays)


def time_events(
    call: Callable[[], Any], *, budget_ms: float = 150.0, most: int = 200, least: int = 10
) -> Timing:
    """Time ``call`` as it is (launch gaps included), with an event pair around every run."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    second.record()
    torch.cuda.synchronize()
    once = max(first.elapsed_time(second), 1e-3)
    runs = int(min(max(budget_ms / once, least), most))
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return _percentiles([1e3 * before.elapsed_time(after) for before, after in pairs])


def copy_speed() -> float:
    """Bytes a microsecond, read and written, of a large copy by the processors.

    Not ``copy_``: in a graph that goes through the copy engine, which is slower.
    """
    source = torch.empty(2**29, dtype=torch.int16, device="cuda").random_()
    target = torch.empty_like(source)
    return 4 * source.numel() / time_graph([lambda: torch.neg(source, out=target)]).median


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``|out - reference| / |reference|``; infinite where out is not finite or reference is zero."""
    wanted = reference.double()
    norm = float(wanted.norm())
    if norm == 0 or not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out.double() - wanted).norm()) / norm


def commit() -> str:
    """The commit measured: of this checkout, or ``COMMIT`` where a copy has another history."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return os.environ.get("COMMIT") or run.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """What a result must say about where it was measured."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
    }


def within(seconds: float, settings: Sequence[Setting]) -> Iterator[Setting]:
    """Yield the settings until so many seconds (0: no limit) are over; print which are left out."""
    start = time.monotonic()
    for at, setting in enumerate(settings):
        if seconds and time.monotonic() - start > seconds:
            print(f"{seconds:g} s are over, not measured: {[str(s) for s in settings[at:]]}")
            return
        yield setting


def save(path: Path, document: dict[str, Any]) -> None:
    """Write the document as JSON, with the environment: the whole file or nothing."""
    text = json.dumps({"environment": environment(), **document}, indent=1) + "\n"
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
