"""Measure the stock pipeline and print what it is.

python -m benchmarks.stock --out results.json --settings 8k,49k --visions bf16,int8,fp8
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.headline_types import SETTINGS, SHAPES, Measured
from benchmarks.stock.pipeline import device, measure
from benchmarks.stock.transformers_generate import build, run
from benchmarks.timing import environment


def line(result: Measured) -> str:
    """One result in one line."""
    vision = "-" if result.vision_s is None else f"{result.vision_s:.3f}"
    prefill = "-" if result.llm_prefill_s is None else f"{result.llm_prefill_s:.3f}"
    idle = "-" if result.idle_host_ms is None else f"{result.idle_host_ms:.3f}"
    return (
        f"{result.side:32} {result.shape} {result.setting}: vision {vision} s, llm prefill "
        f"{prefill} s, ttft {result.ttft_s:.3f} s, decode {result.decode_ms:.3f} ms/token "
        f"(p20 {result.decode_ms_p20:.3f}, p80 {result.decode_ms_p80:.3f}), idle host {idle} ms, "
        f"{result.tokens_per_s:.1f} tokens/s, end to end {result.end_to_end_s:.3f} s, "
        f"peak {result.peak_memory_bytes / 1e9:.1f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2.5-vl-7b", choices=sorted(SHAPES))
    parser.add_argument("--settings", default="49k", help="names, comma-separated")
    parser.add_argument("--visions", default="bf16,int8,fp8")
    parser.add_argument("--layers", type=int, help="shorten both towers, for a quick look")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill-rows", type=int, help="of a batch; the others are not run")
    parser.add_argument(
        "--transformers", action="store_true", help="measure transformers' own generate as well"
    )
    parser.add_argument(
        "--tune-gemlite",
        action="store_true",
        help="let GemLite search for its block sizes (a minute a size) where none are saved",
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="benchmarks.stock")  # kernels torch cannot use here
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    shape = SHAPES[given.shape]
    if given.layers is not None:
        shape = replace(
            shape,
            name=f"{shape.name} cut to {given.layers} layers",
            language=replace(shape.language, layers=given.layers),
            vision=replace(shape.vision, layers=given.layers),
        )
    saved: dict[str, Any] = {"environment": environment(), "results": []}
    visions = tuple(filter(None, given.visions.split(",")))
    sizes = {"new_tokens": given.new_tokens, "repeats": given.repeats}

    def report(result: Measured) -> None:
        print(f"[{time.perf_counter() - begun:.0f} s] {line(result)}", flush=True)
        saved["results"].append(result.json())
        given.out.write_text(json.dumps(saved, indent=1) + "\n")

    built: Any = None
    begun = time.perf_counter()
    for name in given.settings.split(","):
        setting = SETTINGS[name]
        try:
            if visions:
                results = measure(
                    shape,
                    setting,
                    **sizes,
                    visions=visions,
                    prefill_rows=given.prefill_rows,
                    tune_gemlite=given.tune_gemlite,
                    report=report,
                )
                print(f"  chosen: {json.dumps(results[0].chosen, indent=2)}")
                print("  notes: " + "\n         ".join(results[-1].notes), flush=True)
            if given.transformers:
                built = built or build(shape, device())
                report(run(shape, setting, **sizes, model=built))
        except (ArithmeticError, RuntimeError) as problem:
            print(f"{name}: not measured: {str(problem)[:500]}", flush=True)
            saved["results"].append({"setting": name, "failed": str(problem)[:2000]})


if __name__ == "__main__":
    main()
