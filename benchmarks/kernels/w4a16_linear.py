"""``w4a16_linear`` against torch's and GemLite's int4 products and bf16 cuBLAS, all in one run.

    python -m benchmarks.kernels.w4a16_linear --out w4a16_linear.json [--rows 1 8] [--layers 7B]

Group size 128, bf16 x, codes, scales and zero points at random. Weights rotate over more than the
cache holds. From 512 rows on also the op that `fp8_prefill` puts in, which multiplies in float8. The floor is the larger of the bytes (int4 weight, scales, zero points, x and output
once) at the speed of a large device copy and of the operations at the rate of a large bf16 product,
both measured in the same run. A result that is off is not timed. GemLite searches for its own tiles,
up to a minute for each shape and number of rows: ``--gemlite`` includes it where it is installed, at
1, 8 and 64 rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.stock.linears import GemliteLinear, Int4, TinygemmLinear, gemlite_runs
from benchmarks.timing import copy_speed, environment, relative_error, time_graph
from sparsevila_compile.kernels.w4a8_linear.op import OP as FP8
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.packing import pack_int4

DEVICE = torch.device("cuda")
GROUP = 128
ROTATED = 150e6
"""Bytes that the weights of one graph have together at least: three times the cache."""
BOUND = 6e-3
"""Relative error that counts as right: rounding weights and results to bf16 makes 0.0023."""
FP8_BOUND = 5e-2
"""The same where activations and weights are rounded to float8, which makes 0.03 to 0.04."""
FP8_ROWS = 512
"""From so many rows on `fp8_prefill`'s op is measured too."""

LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "7B": {
        "qkv": (3584, 4608),
        "o": (3584, 3584),
        "gate_up": (3584, 37888),
        "down": (18944, 3584),
    },
    "3B": {"qkv": (2048, 2560), "o": (2048, 2048), "gate_up": (2048, 22016), "down": (11008, 2048)},
    "32B": {
        "qkv": (5120, 7168),
        "o": (5120, 5120),
        "gate_up": (5120, 55296),
        "down": (27648, 5120),
    },
    "7B head": {"head": (3584, 152064)},
}
"""Input and output channels of the linears of a decoder layer, as a model with so many parameters
has them with q, k, v in one and gate and up in one."""
ROWS = (1, 2, 3, 4, 8, 16, 17, 32, 64, 100, 128, 256, 512, 777, 1024, 2048, 4096, 8192)
GEMLITE_ROWS = (1, 8, 64)
"""Rows at which GemLite is asked: it searches for each anew."""
TINYGEMM_ROWS = 64
"""Up to here torch's int4 product is asked: its time grows with every eight rows."""


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes and operations a microsecond."""

    copy: float
    rate: float

    def floor(self, rows: int, k: int, n: int) -> float:
        moved = n * k / 2 + 3 * n * k / GROUP + 2 * rows * (k + n)
        return max(moved / self.copy, 2 * rows * k * n / self.rate)


def ceilings() -> Ceilings:
    n = 8192
    x, weight = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(copy_speed(), 2 * n**3 / time_graph([lambda: linear(x, weight)]).median)


@dataclass(frozen=True)
class Ours:
    """The op on the stored layout."""

    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    impl: str

    def few(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = OP.overload(x, *self.stored, None, GROUP, impl=self.impl)
        return out


@dataclass(frozen=True)
class Fp8:
    """The op that `fp8_prefill` puts in its place for prompts."""

    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    impl: str

    def few(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = FP8.overload(x, *self.stored, None, GROUP, FP8_ROWS, impl=self.impl)
        return out


@dataclass(frozen=True)
class Bf16:
    weight: torch.Tensor

    def few(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


def _stored(weights: Int4) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """An x to choose by, and the weight as this package stores it."""
    x = torch.empty(1, weights.q.shape[1], dtype=torch.bfloat16, device=DEVICE)
    return x, (pack_int4(weights.q), weights.scale, weights.zero.to(torch.uint8))


def ours(weights: Int4) -> Ours:
    x, stored = _stored(weights)
    return Ours(stored, OP.choose(DEVICE, x, *stored, None, GROUP).name)


def fp8(weights: Int4) -> Fp8:
    x, stored = _stored(weights)
    return Fp8(stored, FP8.choose(DEVICE, x, *stored, None, GROUP, FP8_ROWS).name)


def sides(gemlite: bool) -> dict[str, Callable[[Int4], Any]]:
    chosen: dict[str, Callable[[Int4], Any]] = {
        "ours": ours,
        "ours, fp8 activations": fp8,
        "bf16 cuBLAS": lambda w: Bf16(w.dense().bfloat16()),
        "torch int4": TinygemmLinear,
    }
    if gemlite:
        chosen["GemLite"] = GemliteLinear
    return chosen


def asked(side: str, rows: int) -> bool:
    if side == "GemLite":
        return rows in GEMLITE_ROWS
    if "fp8" in side:
        return rows >= FP8_ROWS
    return side != "torch int4" or rows <= TINYGEMM_ROWS


def measure(k: int, n: int, all_rows: Sequence[int], gemlite: bool) -> list[dict[str, Any]]:
    """Microseconds of every side at each number of rows; one side's weights in memory at a time."""
    results: list[dict[str, Any]] = [
        {"k": k, "n": n, "rows": rows, "microseconds": {}, "refused": {}} for rows in all_rows
    ]
    weights = Int4.random(k, n, DEVICE)
    tokens = {rows: torch.randn(rows, k, device=DEVICE).bfloat16() for rows in all_rows}
    dense = weights.dense().T
    exact = {rows: x[-256:].float() @ dense for rows, x in tokens.items()}
    del dense
    for name, build in sides(gemlite).items():
        size = k * n * (2 if name.startswith("bf16") else 0.5)
        built = [build(weights)]
        while len(built) * size < ROTATED:
            built.append(build(Int4.random(k, n, DEVICE)))
        for result in results:
            rows = result["rows"]
            if not asked(name, rows):
                continue
            x = tokens[rows]
            error = relative_error(built[0].few(x)[-256:], exact[rows])
            if error > (FP8_BOUND if "fp8" in name else BOUND):
                result["refused"][name] = f"off by {error:.2g}"
                continue
            calls = [lambda b=b, x=x: b.few(x) for b in built]
            result["microseconds"][name] = time_graph(calls, budget_ms=40, most=100).median
        del built
        torch.cuda.empty_cache()
    return results


def line(title: str, times: dict[str, float], floor: float) -> str:
    cells = [f"{title:30}", f"floor {floor:8.1f}"]
    for name, time in times.items():
        cells.append(f"{name} {time:8.1f}" + (f" ({floor / time:3.0%})" if name == "ours" else ""))
    return " | ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x")
    parser.add_argument("--layers", nargs="+", default=["7B"], choices=LAYERS, help="shapes")
    parser.add_argument("--gemlite", action="store_true", help="include GemLite; slow to start")
    options = parser.parse_args()
    notes: list[str] = []
    gemlite = options.gemlite and gemlite_runs(notes)
    print("\n".join(notes), flush=True)
    limits = ceilings()
    print(f"copy {limits.copy / 1e6:.2f} TB/s; bf16 {limits.rate / 1e6:.0f} TFLOP/s", flush=True)
    results: list[dict[str, Any]] = []
    for layer in options.layers:
        together: dict[int, dict[str, float]] = {rows: {} for rows in options.rows}
        floors = dict.fromkeys(options.rows, 0.0)
        for name, (k, n) in LAYERS[layer].items():
            torch.manual_seed(n)
            for result in measure(k, n, options.rows, gemlite):
                rows = result["rows"]
                floor = limits.floor(rows, k, n)
                results.append({"layer": layer, "linear": name, "floor": floor, **result})
                print(line(f"{layer} {name}, {rows} rows", result["microseconds"], floor))
                for side, why in result["refused"].items():
                    print(f"  {side}: REFUSED, {why}")
                floors[rows] += floor
                for side, time in result["microseconds"].items():
                    together[rows][side] = together[rows].get(side, 0.0) + time
        for rows, total in together.items():
            print(line(f"{layer} together, {rows} rows", total, floors[rows]), flush=True)
    if options.out:
        data = {"environment": environment(), "ceilings": asdict(limits), "results": results}
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 1 if any(r["refused"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
