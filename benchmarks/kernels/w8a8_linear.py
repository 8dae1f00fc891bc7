"""``w8a8_linear``, int8 and float8, against bf16 cuBLAS, all in one run.

    python -m benchmarks.kernels.w8a8_linear --out w8a8_linear.json [--only TEXT] [--all]

Times include rounding the tokens. The floor is the larger of the operations at the rate of a large
8-bit matrix product and of the bytes (x, weight and output once, codes written and read) at
the speed of a large device copy, both measured in the same run. bf16 is timed as the model has it
and, where its width or outputs are no multiple of 16, on operands padded to one. An implementation
whose result is off is not timed.
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
from torch.nn.functional import linear, pad

from benchmarks.timing import copy_speed, environment, relative_error, time_graph
from sparsevila_compile.kernels.w8a8_linear.op import OP
from sparsevila_compile.kernels.w8a8_linear.rounding import padded, quantize_rows

DEVICE = torch.device("cuda")
ROTATED = 150e6
"""Bytes that the sets of inputs have together at least: three times the cache."""

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Setting:
    name: str
    rows: int
    width: int
    outputs: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.width * self.outputs

    @property
    def bytes(self) -> int:
        """x and the output in bf16; codes written and read; the weight."""
        return self.rows * (4 * self.width + 2 * self.outputs) + self.width * self.outputs


VISION = 16384
SETTINGS = [
    Setting("vision qkv", VISION, 1280, 3840),
    Setting("vision out", VISION, 1280, 1280),
    Setting("vision gate_up", VISION, 1280, 6840),
    Setting("vision down", VISION, 3420, 1280),
    Setting("merger 1", VISION // 4, 5120, 5120),
    Setting("merger 2", VISION // 4, 5120, 3584),
    Setting("7B qkv", 4096, 3584, 4608),
    Setting("7B out", 4096, 3584, 3584),
    Setting("7B gate_up", 4096, 3584, 37888),
    Setting("7B down", 4096, 18944, 3584),
]
MORE = [
    Setting("vision gate", VISION, 1280, 3420),
    Setting("CLIP qkv, 16 pictures", 9232, 1024, 3072),
    Setting("SigLIP up, 16 pictures", 11664, 1152, 4304),
    Setting("3B gate_up", 4096, 2048, 22016),
    Setting("32B down", 4096, 27648, 5120),
    *(Setting(f"7B gate_up, {m} rows", m, 3584, 37888) for m in (1, 8, 64, 512)),
    *(Setting(f"7B out, {m} rows", m, 3584, 3584) for m in (1, 8, 64, 512)),
]


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes and operations a microsecond."""

    copy: float
    rate: dict[str, float]

    def floor(self, setting: Setting) -> float:
        # Both 8-bit dtypes have the same rate by the data sheet; torch's int8 product is slower.
        return max(setting.bytes / self.copy, setting.operations / max(self.rate.values()))


def ceilings() -> Ceilings:
    copy, n = copy_speed(), 8192
    x, weight = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = {"bf16": 2 * n**3 / time_graph([lambda: linear(x, weight)]).median}
    for name, code in CODES.items():
        (a, _), (b, one) = quantize_rows(x, code), quantize_rows(weight, code)
        if name == "int8":
            product: Callable[[], Any] = lambda a=a, b=b: torch._int_mm(a, b.T)  # noqa: E731
        else:
            product = lambda a=a, b=b, s=one: torch._scaled_mm(  # noqa: E731
                a, b.T, s[:, None], s[None], out_dtype=torch.bfloat16, use_fast_accum=True
            )
        rate[name] = 2 * n**3 / time_graph([product]).median
    return Ceilings(copy, rate)


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    weight: torch.Tensor
    stored: dict[str, tuple[torch.Tensor, torch.Tensor]]


def make(setting: Setting, seed: int) -> Inputs:
    g = torch.Generator(DEVICE).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=DEVICE, dtype=torch.bfloat16)

    x, weight = random(setting.rows, setting.width), random(setting.outputs, setting.width)
    return Inputs(x, weight, {name: quantize_rows(weight, c) for name, c in CODES.items()})


def call(inputs: Inputs, code: str, impl: str) -> Callable[[], torch.Tensor]:
    return lambda: OP.overload(inputs.x, *inputs.stored[code], None, impl=impl)


def wrong(inputs: Inputs, code: str, impl: str) -> str | None:
    """Why a result does not count, or None: against float64 on a sample of rows and all outputs."""
    weight, scales = inputs.stored[code]
    out = call(inputs, code, impl)()
    rows = torch.arange(0, len(inputs.x), max(1, len(inputs.x) // 64), device=DEVICE)
    codes, token_scales = quantize_rows(inputs.x[rows], CODES[code])
    exact = codes.double() @ weight.double().T * token_scales.double()[:, None] * scales.double()
    error = relative_error(out[rows], exact)
    if error > 6e-3:
        return f"off by {error:.2g} from the same codes in float64"
    real = relative_error(out[rows], inputs.x[rows].double() @ inputs.weight.double().T)
    return None if real < 0.06 else f"off by {real:.2g} from the float linear"


def measure(setting: Setting, limits: Ceilings, every: bool) -> dict[str, Any]:
    size = 2 * setting.width * (setting.rows + setting.outputs)
    sets = [make(setting, i) for i in range(max(2, min(24, int(ROTATED / size) + 1)))]
    x, weight = sets[0].x, sets[0].weight
    result: dict[str, Any] = {**asdict(setting), "microseconds": {}, "refused": {}}
    result["floor"] = limits.floor(setting)
    times = result["microseconds"]
    times["bf16"] = time_graph([lambda s=s: linear(s.x, s.weight) for s in sets]).median
    k, n = padded(setting.width), padded(setting.outputs)
    if (k, n) != (setting.width, setting.outputs):
        wide = [
            (
                pad(s.x, (0, k - setting.width)),
                pad(s.weight, (0, k - setting.width, 0, n - setting.outputs)),
            )
            for s in sets
        ]
        times["bf16 padded"] = time_graph([lambda s=s: linear(*s) for s in wide]).median
        del wide
    for code in CODES:
        chosen = OP.choose(DEVICE, x, *sets[0].stored[code], None).name
        for impl in [chosen, *(i for i in ("cublas", "triton") if every and i != chosen)]:
            if OP.implementations[impl].supports_args(x, *sets[0].stored[code], None):
                continue
            label = code if impl == chosen else f"{code} {impl}"
            off = wrong(sets[0], code, impl)
            if off is not None:
                result["refused"][label] = off
                continue
            times[label] = time_graph([call(s, code, impl) for s in sets]).median
        result[f"{code} chosen"] = chosen
    del weight
    return result


def show(result: dict[str, Any]) -> None:
    times, base = result["microseconds"], result["microseconds"]["bf16"]
    cells = [f"{result['name']:24} {result['rows']:6} {result['width']:6}x{result['outputs']:<6}"]
    for label, time in times.items():
        code = label.partition(" ")[0]
        share = f" {base / time:4.2f}x" if label != "bf16" else ""
        part = f" {result['floor'] / time:3.0%} of floor" if code in CODES else ""
        cells.append(f"{label} {time:7.1f}{share}{part}")
    cells += [f"{k}: REFUSED {v}" for k, v in result["refused"].items()]
    print(" | ".join(cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--only", default="", help="settings whose name has this text")
    parser.add_argument("--all", action="store_true", help="more shapes, every implementation")
    options = parser.parse_args()
    limits = ceilings()
    print(f"copy {limits.copy / 1e6:.2f} TB/s; " + ", ".join(
        f"{k} {v / 1e6:.0f} T/s" for k, v in limits.rate.items()), flush=True)  # fmt: skip
    results = []
    for setting in SETTINGS + (MORE if options.all else []):
        if options.only in setting.name:
            results.append(measure(setting, limits, options.all))
            show(results[-1])
            torch.cuda.empty_cache()
    if options.out:
        data = {"environment": environment(), "ceilings": asdict(limits), "results": results}
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 1 if any(r["refused"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
