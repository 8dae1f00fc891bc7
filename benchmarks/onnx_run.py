"""A report written step by step, and how two tensors are compared: for the benchmarks of ONNX bundles."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``norm(out - reference) / norm(reference)``."""
    return float((out - reference).norm() / reference.norm())


class Run:
    """A report that is written after every step, and steps that may fail or find no time left.

    Args:
        out: the JSON file, if any.
        seconds: no step is begun later than that after the start.
    """

    def __init__(self, report: dict[str, Any], out: Path | None, seconds: float) -> None:
        self.report, self._out, self._seconds = report, out, seconds
        self._start = time.monotonic()

    def step(self, key: str, call: Callable[[], T]) -> T | None:
        """What ``call`` returns; None where it fails, and then the report says why."""
        spent = time.monotonic() - self._start
        if spent > self._seconds:
            return self.leave_out(
                key, f"no time: {spent:.0f} s of {self._seconds:.0f} s were spent"
            )
        try:
            found = call()
        except Exception as error:  # any side may fail in its own way, and the others go on
            traceback.print_exc()
            text = " ".join(str(error).split())[:400]
            return self.leave_out(key, f"{type(error).__name__}: {text}")
        print(f"{key}: {time.monotonic() - self._start - spent:.1f} s", flush=True)
        return found

    def leave_out(self, key: str, why: str) -> None:
        print(f"{key}: {why}", flush=True)
        self.report.setdefault("left out", {})[key] = why
        self.write()

    def put(self, key: str, found: Any, within: str = "") -> None:
        """Into the report, or one of its parts, unless it is None."""
        if found is not None:
            part = self.report.setdefault(within, {}) if within else self.report
            part[key] = found
            print(" ".join([within, key]).strip(), json.dumps(found, indent=1), flush=True)
            self.write()

    def write(self) -> None:
        if self._out:
            self._out.write_text(json.dumps(self.report, indent=1) + "\n")
