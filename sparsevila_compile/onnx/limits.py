"""What a recipe may not ask of an ONNX bundle, known before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sparsevila_compile.yaml_position import Problem

_MODULE = "or set emit.format: module"


def pass_problems(passes: Iterable[tuple[str, Any]]) -> list[Problem]:
    """Passes (name and options, as listed) whose result no ONNX Runtime op holds."""
    found = []
    for i, (name, config) in enumerate(passes):
        path = ("passes", i, name)
        if name == "fp8_prefill":
            why = f"ONNX Runtime has no float8 linear; remove the pass, {_MODULE}"
            found.append(Problem(path, why))
        elif name == "lower_ops":
            why = f"binds kernels of this package, which ONNX Runtime does not run; remove it, {_MODULE}"
            found.append(Problem(path, why))
        elif name == "quantize_linear" and config.scheme == "fp8":
            why = f"ONNX Runtime has no float8 linear; take w8a8 or w4a16, {_MODULE}"
            found.append(Problem((*path, "scheme"), why))
    return found
