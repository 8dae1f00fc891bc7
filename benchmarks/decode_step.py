"""Where a decode step's time goes: kernel by kernel, from the profiler, over captured steps.

    python -m benchmarks.decode_step --settings 49k-b8,8k-b8 [--side dense] [--out step.json]

Kernels of a step are launched before their predecessors end, so how long one lasts says little. What
counts is the time from the end of the kernel before to its own end; those add up to the step. Given
are medians over layers and steps, by place in a layer, beginning behind its attention.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours
from benchmarks.headline_types import SETTINGS, SHAPES
from benchmarks.stock.transformers_generate import prompt
from benchmarks.timing import environment
from sparsevila_compile.decoding import Decoder

ATTENTION = "_decode_kernel"
FIRST, STEPS = 16, 24
"""Steps that pass before the profiler looks, and how many it looks at."""


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel: microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


def by_place(kernels: list[Kernel], layers: int) -> list[dict[str, Any]]:
    """Medians of what each kernel of a layer adds, in order.

    A layer reaches from one attention kernel to the next; the last one of a step, which the head and
    the embedding follow, is left out.
    """
    ordered = sorted(kernels, key=lambda k: k.end)
    starts = [i for i, k in enumerate(ordered) if ATTENTION in k.name]
    added: dict[tuple[int, str], list[float]] = collections.defaultdict(list)
    for at, (i, j) in enumerate(itertools.pairwise(starts)):
        if (at + 1) % layers == 0 or i == 0:
            continue
        for place in range(j - i):
            one = ordered[i + place]
            added[place, one.name].append(one.end - ordered[i + place - 1].end)
    most = max((len(v) for v in added.values()), default=0)
    return [
        {"place": place, "kernel": name, "us": statistics.median(v), "seen": len(v)}
        for (place, name), v in sorted(added.items())
        if 2 * len(v) > most  # not the few that another order of ends has made
    ]


def profile(model: Any, inputs: dict[str, Any]) -> list[Kernel]:
    """The kernels of STEPS captured decode steps."""
    real, done = Decoder.step, 0
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def step(self: Decoder, greedy: bool) -> torch.Tensor:
        nonlocal done
        if done in (FIRST, FIRST + STEPS):
            torch.cuda.synchronize()
            profiler.start() if done == FIRST else profiler.stop()
        done += 1
        return real(self, greedy)

    Decoder.step = step  # type: ignore[method-assign]
    try:
        new = FIRST + STEPS + 8
        model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)
    finally:
        Decoder.step = real  # type: ignore[method-assign]
    return [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-vl-7b", choices=sorted(SHAPES))
    parser.add_argument("--settings", default="49k", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--side", default="sparse", choices=sorted(ours.RECIPES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    side = ours.compile_side(given.side, shape, ours.with_vision(ours.RECIPES[given.side], "fp8"))
    results = []
    for name in given.settings.split(","):
        setting = SETTINGS[name]
        kernels = profile(side.model, prompt(shape, setting, torch.device("cuda")))
        rows = by_place(kernels, shape.language.layers)
        total = sum(r["us"] for r in rows)
        print(
            f"{setting.name}: {total:.1f} us a layer; {side.model.usage.dense_because or 'sparse'}"
        )
        for row in rows:
            print(f"  {row['us']:8.2f}  {row['kernel'][:70]}", flush=True)
        results.append({"setting": setting.name, "layer_us": total, "kernels": rows})
    if given.out:
        document = {"environment": environment(), "side": given.side, "results": results}
        given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
