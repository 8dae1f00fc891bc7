"""Where a session's nodes ran, and what crossed the bus: from ONNX Runtime's own profiles."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

CONTROL = ("If", "Loop", "Scan")
"""Ops whose time is that of the nodes within them."""


def read_profile(file: Path, runs: int) -> dict[str, Any]:
    """A profile's nodes, a run: how many on which provider, the slowest ops, the copies.

    Args:
        file: what ``InferenceSession.end_profiling`` wrote.
        runs: how often the session ran meanwhile.

    Returns:
        ``nodes`` by provider; ``microseconds`` by op, the twelve that took most; ``copies``: of every
        Memcpy node what it copied (``MemcpyToHost bool [1]``) and how often, all in one run; and
        ``largest copy`` in elements.
    """
    nodes: Counter[str] = Counter()
    took: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    largest = 0
    for event in json.loads(file.read_text(encoding="utf-8")):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        op = facts["op_name"]
        nodes[facts.get("provider", "unknown")] += 1
        if op not in CONTROL:
            took[op] += event["dur"]
        if op.startswith("Memcpy"):
            for tensor in facts.get("output_type_shape", []):
                [(kind, shape)] = tensor.items()
                copies[f"{op} {kind} {shape}"] += 1
                largest = max(largest, _elements(shape))
    return {
        "nodes": {n: c / runs for n, c in sorted(nodes.items())},
        "microseconds": {op: round(t / runs, 1) for op, t in took.most_common(12)},
        "copies": {c: n / runs for c, n in sorted(copies.items())},
        "largest copy": largest,
    }


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
