"""The headline: four sides of one request, measured in one process on one GPU.

    python -m benchmarks.headline --out results.json [--settings 8k,49k,98k] [--sides b,c,d]

(a) transformers' own generate in bf16; (b) a dense AWQ pipeline on the best stock kernels, with the
vision tower in bf16 and in 8 bits; (c) this package, nothing sparse; (d) this package, 25 % of the
visual tokens kept at prefill and 10 % of those attended at decode. ``+fp8`` and ``+w8a8`` are (c)
and (d) with the vision tower's linears in 8 bits. (d) over (c) is what sparsity gives, (c) over (b)
what better kernels and fewer launches give. Weights are random: no checkpoint is needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours
from benchmarks.headline_types import SETTINGS, SHAPES, Measured, ModelShape, Setting
from benchmarks.stock import pipeline, transformers_generate
from benchmarks.timing import environment

Run = Callable[[Setting], list[Measured]]

LONG = 60_000
"""Visual tokens of all rows from which one run must do: it takes seconds, and varies by percents."""

OURS = {"c": "dense", "d": "sparse"}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _sides(
    shape: ModelShape, names: list[str], new_tokens: int, repeats: int
) -> Iterator[tuple[str, Run]]:
    """Each side, built when its turn comes and freed after it."""

    def sizes(setting: Setting) -> dict[str, int]:
        long = setting.batch * setting.visual_tokens > LONG
        return {"new_tokens": new_tokens, "repeats": 1 if long else repeats}

    for name in names:
        letter, _, scheme = name.partition("+")
        if letter == "a":
            model = transformers_generate.build(shape, pipeline.device())
            yield (
                name,
                lambda s, m=model: [transformers_generate.run(shape, s, **sizes(s), model=m)],
            )
            del model
        elif letter == "b":
            kinds = ("bf16", "int8", "fp8") if shape.vision.kind == "qwen2_5_vl" else ("bf16",)
            yield name, lambda s, k=kinds: _stock(shape, s, sizes(s), k)
        elif letter in OURS:
            recipe = ours.RECIPES[OURS[letter]]
            recipe = ours.with_vision(recipe, scheme) if scheme else recipe
            label = f"({name}) ours, {OURS[letter]}" + (f", vision {scheme}" if scheme else "")
            side = ours.compile_side(label, shape, recipe)
            yield name, lambda s, m=side: [ours.run(m, shape, s, **sizes(s))]
            del side
        else:
            raise SystemExit(f"--sides: {name} is none of a, b, c, d, c+fp8, d+fp8, d+w8a8, …")
        _free()


def _stock(
    shape: ModelShape, setting: Setting, sizes: dict[str, int], kinds: tuple[str, ...]
) -> list[Measured]:
    rows = 1 if setting.batch > 1 else None
    if setting.batch * setting.visual_tokens != 49152:
        kinds = ("bf16",)  # the towers are compared at one setting
    return pipeline.measure(shape, setting, **sizes, visions=kinds, prefill_rows=rows)


def table(results: list[Measured]) -> str:
    """One line a side, and what each gains over the first (b) of its setting."""
    lines = []
    for setting in dict.fromkeys(r.setting for r in results):
        mine = [r for r in results if r.setting == setting]
        lines.append(f"{mine[0].shape}, {setting}")
        lines.append(
            f"  {'':36}{'vision s':>9}{'prefill s':>10}{'first s':>9}{'decode ms':>10}"
            f"{'tok/s':>8}{'all s':>8}{'peak GB':>8}   first, prefill, decode, all over (b)"
        )
        base = next((r for r in mine if r.side == pipeline.SIDES["bf16"]), None)
        for r in mine:
            gains = ""
            if base is not None and r is not base:
                pairs = [
                    (base.ttft_s, r.ttft_s),
                    (base.llm_prefill_s, r.llm_prefill_s),
                    (base.decode_ms, r.decode_ms),
                    (base.end_to_end_s, r.end_to_end_s),
                ]
                gains = "  ".join(f"{a / b:5.2f}x" if a and b else "    -" for a, b in pairs)
            parts = [f"{v:.3f}" if v is not None else "-" for v in (r.vision_s, r.llm_prefill_s)]
            lines.append(
                f"  {r.side[:36]:36}{parts[0]:>9}{parts[1]:>10}{r.ttft_s:9.3f}{r.decode_ms:10.3f}"
                f"{r.tokens_per_s:8.1f}{r.end_to_end_s:8.3f}{r.peak_memory_bytes / 1e9:8.1f}   {gains}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2.5-vl-7b", choices=sorted(SHAPES))
    parser.add_argument("--settings", default="8k,49k,98k", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--sides", default="a,b,c,d,d+fp8")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    settings = given.settings.split(",")
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise SystemExit(f"--settings: {', '.join(unknown)}: not one of {', '.join(SETTINGS)}")
    start = time.perf_counter()
    results: list[Measured] = []
    failed: list[dict[str, str]] = []

    def save() -> None:
        data: dict[str, Any] = {
            "environment": environment(),
            "results": [r.json() for r in results],
            "failed": failed,
        }
        given.out.write_text(json.dumps(data, indent=1) + "\n")

    sides = _sides(SHAPES[given.shape], given.sides.split(","), given.new_tokens, given.repeats)
    for name, run in sides:
        for setting in settings:
            try:
                results += (found := run(SETTINGS[setting]))
                for one in found:
                    print(json.dumps(one.json()), flush=True)
            except Exception as problem:  # the other sides are still worth measuring
                traceback.print_exc(limit=3)
                failed.append({"side": name, "setting": setting, "why": str(problem)[:500]})
            _free()
            print(f"{name} {setting}: {time.perf_counter() - start:.0f} s so far", flush=True)
            save()
        del run  # it holds the side, which the next one's memory figures must not count
    print(table(results))
    for one in failed:
        print(f"not measured: ({one['side']}) {one['setting']}: {one['why'][:200]}")


if __name__ == "__main__":
    main()
