"""The fused small ops of a layer against the kernels that a model runs for them, all in one run.

    python -m benchmarks.kernels.fused_elementwise --out fused_elementwise.json [--only TEXT]

``model`` is the op's reference: torch's own kernels, as transformers' code calls them. The floor is
the time to read inputs and write results once at the speed of a large device copy, measured in the
same run; short calls are bound by the launch instead, which ``launch`` gives (a copy of one value).
An op whose result is off is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_speed, environment, relative_error, time_graph
from sparsevila_compile.ops import ADD_RMS_NORM, ROTARY, SILU_MUL

DEVICE = torch.device("cuda")
L2_TIMES_THREE = 150e6
MOST_SETS = 40
BOUND = 1e-3

Call = Callable[[str], tuple[Tensor, ...]]
"""One call by implementation."""


@dataclass(frozen=True)
class Shape:
    """A layer: width, MLP width, query and KV heads, head dim."""

    name: str
    width: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    tables: torch.dtype = torch.bfloat16


SHAPES = [
    Shape("Qwen2.5-VL-7B", 3584, 18944, 28, 4, 128),
    Shape("Qwen2.5-VL-3B", 2048, 11008, 16, 2, 128),
    Shape("Qwen2.5-VL-32B", 5120, 27648, 40, 8, 128),
    Shape("LLaVA-1.5-7B", 4096, 11008, 32, 32, 128),
    Shape("Qwen2.5-VL encoder", 1280, 3420, 16, 16, 80, torch.float32),
]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def add_rms_norm(s: Shape, tokens: int) -> Call:
    x, residual, weight = normal(tokens, s.width), normal(tokens, s.width), normal(s.width)
    return lambda impl: ADD_RMS_NORM(x, residual, weight, 1e-6, impl=impl)  # type: ignore[no-any-return]


def silu_mul(s: Shape, tokens: int) -> Call:
    gate, up = normal(tokens, 2 * s.inner).split(s.inner, dim=-1)
    return lambda impl: (SILU_MUL(gate, up, impl=impl),)


def rotary(s: Shape, tokens: int) -> Call:
    """q and k as views of one merged projection."""
    sizes = [s.heads * s.dim, s.kv_heads * s.dim, s.kv_heads * s.dim]
    q, k, _ = normal(1, tokens, sum(sizes)).split(sizes, dim=-1)
    q, k = q.unflatten(-1, (s.heads, s.dim)), k.unflatten(-1, (s.kv_heads, s.dim))
    cos, sin = (normal(1, tokens, s.dim, dtype=s.tables) for _ in range(2))
    return lambda impl: ROTARY(q, k, cos, sin, impl=impl)  # type: ignore[no-any-return]


def moved(s: Shape, tokens: int) -> dict[str, int]:
    """Bytes that an op reads and writes at least."""
    table = 2 * s.dim * s.tables.itemsize
    return {
        "add_rms_norm": tokens * 2 * 4 * s.width,
        "silu_mul": tokens * 2 * 3 * s.inner,
        "rotary": tokens * (2 * 2 * (s.heads + s.kv_heads) * s.dim + table),
    }


def launch() -> float:
    """Microseconds of the shortest kernel in a graph of dependent ones."""
    x, y = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    return time_graph([lambda: x.copy_(y), lambda: y.copy_(x)] * 20).median


def row(
    op: str, make: Callable[[Shape, int], Call], s: Shape, tokens: int, speed: float
) -> dict[str, Any]:
    size = moved(s, tokens)[op]
    sets = [make(s, tokens) for _ in range(max(2, min(MOST_SETS, int(L2_TIMES_THREE / size) + 1)))]
    out = {"op": op, "shape": s.name, "tokens": tokens}
    errors = [
        relative_error(a, b) for a, b in zip(sets[0]("triton"), sets[0]("reference"), strict=True)
    ]
    out["error"] = max(errors)
    if max(errors) > BOUND:
        return out | {"refused": f"relative error {max(errors):.2g} exceeds {BOUND}"}
    for impl, name in (("triton", "ours"), ("reference", "model")):
        timing = time_graph([lambda c=c, i=impl: c(i) for c in sets])
        out |= {name: timing.median, f"{name}_timing": asdict(timing)}
    floor = size / speed * 1e6
    return out | {"floor": floor, "of_floor": floor / out["ours"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    speed, shortest = 1e6 * copy_speed(), launch()
    print(f"copy {speed / 1e12:.2f} TB/s, launch {shortest:.2f} us; microseconds a call")
    print(
        f"{'op':13} {'shape':19} {'tokens':>6} {'ours':>8} {'model':>8} {'floor':>8} {'reached':>8}"
    )
    rows = []
    for op, make in (("add_rms_norm", add_rms_norm), ("silu_mul", silu_mul), ("rotary", rotary)):
        for s in SHAPES:
            for tokens in (1, 8, 64, 4096):
                if args.only not in f"{op} {s.name} {tokens}":
                    continue
                found = row(op, make, s, tokens, speed)
                rows.append(found)
                head = f"{op:13} {s.name:19} {tokens:6}"
                if "refused" in found:
                    print(head, found["refused"], flush=True)
                    continue
                times = " ".join(f"{found[k]:8.2f}" for k in ("ours", "model", "floor"))
                print(f"{head} {times} {found['of_floor']:8.0%}", flush=True)
    if args.out:
        result = {"environment": environment(), "copy": speed, "launch": shortest, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("refused" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
