"""The dense AWQ pipeline on stock kernels, measured: what the sparse engine has to beat.

Weights are random; the language model's linears are int4 (group size 128), each on the fastest of
torch's int4 kernel, GemLite and bf16 cuBLAS as measured in the same run; prefill dequantises and
calls cuBLAS; attention is the fastest of torch's own kernels; the parts between are fused by
``torch.compile``; decode is one CUDA graph a token. Nothing of sparsevila_compile is imported.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.headline_types import Measured, ModelShape, Setting
from benchmarks.stock.attention import Attention, choose_attention
from benchmarks.stock.check import check_language, check_vision
from benchmarks.stock.language import Language, rope_positions
from benchmarks.stock.linears import choose
from benchmarks.stock.vision import MOST_PATCHES, Vision

LOG = logging.getLogger(__name__)

SIDES = {
    "bf16": "stock int4, vision bf16",
    "int8": "stock int4, vision W8A8 int8",
    "fp8": "stock int4, vision W8A8 fp8",
}
TEXT_BEFORE = 16  # of the prompt's text tokens; the others follow the pictures
PREFILL_TOKENS = 98_304  # rows of a batch that one pass over the layers takes together


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stock:
    """Weights, choices and prompts of one shape and setting; the vision tower can be swapped."""

    def __init__(
        self,
        shape: ModelShape,
        setting: Setting,
        new_tokens: int,
        rows: int,
        tune_gemlite: bool = False,
    ) -> None:
        """``rows`` of the batch are prefilled when timed; decode has all of them."""
        self.shape, self.setting, self.rows, self.on = shape, setting, rows, device()
        self.notes: list[str] = []
        self.chosen: dict[str, str] = {}
        language, prompt = shape.language, setting.prompt_tokens
        kinds, figures = choose(
            language.linears, setting.batch, self.on, self.notes, tune_gemlite=tune_gemlite
        )
        self._say("linear", kinds, figures)
        LOG.info("linears chosen: %s", figures)
        self.kinds = kinds
        self._choose_attention(prompt + new_tokens // 2)
        self.errors: dict[str, float] = {}
        self.model = Language(language, kinds, setting.batch, prompt + new_tokens, self.on)
        merge = shape.vision.merge
        grids = [(h // merge, w // merge) for h, w in setting.pictures]
        positions = rope_positions(
            grids,
            TEXT_BEFORE,
            setting.text_tokens - TEXT_BEFORE + new_tokens,
            language.mrope_section is not None,
        )
        self.cos, self.sin = self.model.rope(positions)
        self.text = torch.randint(language.vocab, (setting.text_tokens,), device=self.on)
        self.pixels = [
            (grid, self._random(rows * len(list(same)), grid[0] * grid[1], shape.vision.patch_dim))
            for grid, same in itertools.groupby(setting.pictures)
        ]
        self.tokens = torch.zeros(setting.batch, dtype=torch.long, device=self.on)
        self.vision: Vision | None = None

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.on, dtype=torch.bfloat16)

    def _say(self, what: str, kinds: dict[str, str], figures: dict[str, dict[str, float]]) -> None:
        for name, kind in kinds.items():
            all_of_them = {k: round(v, 1) for k, v in figures.get(name, {}).items()}
            self.chosen[f"{what} {name}"] = f"{kind} (microseconds: {all_of_them})"

    def _choose_attention(self, decode_length: int) -> None:
        language, vision, setting = self.shape.language, self.shape.vision, self.setting

        def qkv(batch: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
            q = self._random(batch, rows, language.heads, language.head_dim)
            k, v = (
                self._random(batch, language.kv_heads, length, language.head_dim).transpose(1, 2)
                for _ in range(2)
            )
            return q, k, v

        def towers(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (self._random(batch, length, vision.heads, vision.head_dim) for _ in range(3))
            return q, k, v

        def pick(what: str, inputs: list[Any], causal: bool, graph: bool) -> Attention:
            name, call, figures = choose_attention(inputs, causal, self.notes, graph=graph)
            self._say("attention", {what: name}, {what: figures})
            LOG.info("attention for %s chosen: %s", what, figures)
            return call

        piece = min(setting.prompt_tokens, 16_384)
        self.prefill_with = pick("prefill", [qkv(1, piece, piece)], True, False)
        copies = [qkv(setting.batch, 1, decode_length) for _ in range(3)]
        self.decode_with = pick("decode", copies, False, True)
        del copies
        (height, width), count = setting.pictures[0], len(setting.pictures) * self.rows
        if vision.kind == "clip":
            at_once = min(count, MOST_PATCHES // (height * width))
            full = pick("vision", [towers(at_once, height * width + 1)], False, False)
            self.vision_with = full, full
            return
        at_once = max(1, min(count, MOST_PATCHES // (height * width)))
        windows = at_once * height * width // vision.window**2
        self.vision_with = (
            pick("vision full", [towers(at_once, height * width)], False, False),
            pick("vision window", [towers(windows, vision.window**2)], False, False),
        )

    def set_vision(self, kind: str) -> None:
        """Take the tower in another precision."""
        self.vision = None
        self.vision = Vision(self.shape.vision, kind, self.on)

    def check(self) -> None:
        """Raise unless two layers of each tower agree with float32.

        Call after a first run: what is compiled is compiled for the real sizes.
        """
        assert self.vision is not None
        kind, batch = self.vision.kind, self.setting.batch
        found = check_vision(self.shape, kind, self.on, *self.vision_with)
        self.errors[f"vision {kind}"] = found
        if "decode" not in self.errors:
            self.errors["prefill"], self.errors["decode"] = check_language(
                self.shape, self.kinds, batch, self.on, self.prefill_with, self.decode_with
            )

    def see(self) -> Tensor:
        """Visual tokens ``[rows, visual tokens, hidden]``."""
        assert self.vision is not None
        parts = [
            self.vision.forward(pixels, grid, *self.vision_with).view(
                self.rows, -1, self.shape.language.hidden
            )
            for grid, pixels in self.pixels
        ]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def read(self, visual: Tensor) -> Tensor:
        """Prefill every row; the first tokens ``[rows]``."""
        text = torch.nn.functional.embedding(self.text, self.model.embedding)
        length = self.setting.prompt_tokens
        together = max(1, PREFILL_TOKENS // length)
        logits = []
        for start in range(0, self.rows, together):
            embeds = [
                torch.cat((text[:TEXT_BEFORE], seen, text[TEXT_BEFORE:]))
                for seen in visual[start : start + together]
            ]
            cos, sin = self.cos[:length], self.sin[:length]
            logits.append(self.model.prefill(embeds, start, cos, sin, self.prefill_with))
        return torch.cat(logits).argmax(-1)

    def first_token(self) -> tuple[float, float, float]:
        """Seconds of vision, of prefill and of both with the tokens known to the host."""
        synchronize()
        start = time.perf_counter()
        visual = self.see()
        synchronize()
        seen = time.perf_counter()
        tokens = self.read(visual)
        tokens.tolist()
        end = time.perf_counter()
        self.tokens[: self.rows] = tokens
        return seen - start, end - seen, end - start

    def capture(self, length: int) -> Callable[[], None]:
        """One decode step at cache length ``length`` (its own token included), as a CUDA graph."""
        at = torch.tensor([length - 1], device=self.on)
        cos, sin = self.cos[length - 1 : length], self.sin[length - 1 : length]

        def step() -> None:
            logits = self.model.decode(self.tokens, at, length, cos, sin, self.decode_with)
            self.tokens.copy_(logits.argmax(-1))

        if self.on.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def fill(self) -> None:
        """Give rows that were not prefilled, and the places of new tokens, keys like the others."""
        for cache in (*self.model.keys, *self.model.values):
            cache[self.rows :] = cache[:1]
            new = cache.shape[2] - self.setting.prompt_tokens
            cache[:, :, -new:] = cache[:, :, :new]

    def generate(self, step: Callable[[], None], steps: int) -> tuple[float, list[float]]:
        """Seconds for ``steps`` tokens, each known to the host while the next one runs; and the
        milliseconds between one token's end and the next's on the device."""
        if self.on.type != "cuda":
            each = []
            for _ in range(steps):
                start = time.perf_counter()
                step()
                self.tokens.tolist()
                each.append(1e3 * (time.perf_counter() - start))
            return sum(each) / 1e3, each
        known = [torch.empty_like(self.tokens, device="cpu", pin_memory=True) for _ in range(2)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        synchronize()
        start = time.perf_counter()
        ends[0].record()
        for i in range(steps):
            step()
            known[i % 2].copy_(self.tokens, non_blocking=True)
            ends[i + 1].record()
            ends[i].synchronize()
            _ = known[(i + 1) % 2][0].item()  # where a stop token would be looked for
        ends[-1].synchronize()
        seconds = time.perf_counter() - start
        return seconds, [ends[i].elapsed_time(ends[i + 1]) for i in range(steps)]

    def busy_ms(self, step: Callable[[], None], steps: int) -> float | None:
        """A step's milliseconds with nothing asked in between."""
        if self.on.type != "cuda":
            return None
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(steps):
            step()
        last.record()
        synchronize()
        return first.elapsed_time(last) / steps


@torch.no_grad()
def measure(
    shape: ModelShape,
    setting: Setting,
    *,
    new_tokens: int,
    repeats: int,
    visions: tuple[str, ...] = ("bf16",),
    prefill_rows: int | None = None,
    tune_gemlite: bool = False,
    report: Callable[[Measured], None] = lambda result: None,
) -> list[Measured]:
    """Measure one setting with the vision tower in each precision of ``visions``.

    ``tune_gemlite``: see :func:`choose`; ``report`` is called with each result as it comes.

    ``prefill_rows``: how many of the batch's rows are really prefilled; the time of the others is
    taken as the same (rows are prefilled one after the other) and the result says so. Decode is
    timed at the length of mid-generation, all rows, and shared by the precisions.
    """
    torch._dynamo.config.recompile_limit = 64
    batch, prompt = setting.batch, setting.prompt_tokens
    rows = min(batch, prefill_rows or batch)
    stock = Stock(shape, setting, new_tokens, rows, tune_gemlite)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    results = []
    timed: tuple[float, list[float], float | None] | None = None
    for kind in visions:
        try:
            stock.set_vision(kind)
            warm = stock.first_token()  # compiles, plans, allocates
            LOG.info("%s: first run %s", kind, warm)
            stock.check()
            LOG.info("errors %s", stock.errors)
        except (ArithmeticError, RuntimeError) as problem:
            if kind == "bf16":
                raise
            stock.notes.append(f"vision {kind} left out: {str(problem)[:200]}")
            continue
        assert stock.vision is not None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        firsts = [stock.first_token() for _ in range(repeats)]
        LOG.info("%s: first tokens %s", kind, firsts)
        if timed is None:
            stock.fill()
            step = stock.capture(prompt + new_tokens // 2)
            stock.generate(step, 8)
            runs = [stock.generate(step, new_tokens - 1) for _ in range(repeats)]
            each = sorted(ms for run in runs for ms in run[1])
            timed = median(run[0] for run in runs), each, stock.busy_ms(step, new_tokens - 1)
        seconds, each, busy = timed
        vision_s, prefill_s, ttft_s = (
            median(f[i] for f in firsts) * batch / rows for i in (0, 1, 2)
        )
        last = len(each) - 1
        end_to_end = ttft_s + seconds
        results.append(
            Measured(
                side=SIDES[kind],
                shape=shape.name,
                setting=setting.name,
                batch=batch,
                visual_tokens=setting.visual_tokens,
                new_tokens=new_tokens,
                vision_s=vision_s,
                llm_prefill_s=prefill_s,
                ttft_s=ttft_s,
                decode_ms=median(each),
                decode_ms_p20=each[round(0.2 * last)],
                decode_ms_p80=each[round(0.8 * last)],
                tokens_per_s=batch * (new_tokens - 1) / seconds,
                end_to_end_s=end_to_end,
                peak_memory_bytes=torch.cuda.max_memory_allocated() if busy is not None else 0,
                idle_host_ms=(
                    None if busy is None else max(0.0, 1e3 * seconds / (new_tokens - 1) - busy)
                ),
                weight_bytes=stock.model.weight_bytes() + stock.vision.weight_bytes(),
                cache_bytes=stock.model.cache_bytes(),
                repeats=repeats,
                shares={
                    "vision": vision_s / end_to_end,
                    "llm prefill": prefill_s / end_to_end,
                    "decode": seconds / end_to_end,
                },
                chosen=stock.chosen,
                notes=[
                    *stock.notes,
                    f"relative errors against float32, two layers: {stock.errors}",
                    "decode: every step at the length of mid-generation, one CUDA graph a token",
                    "geometry (positions, window order) is computed before the clock starts",
                    *(
                        [f"{rows} of {batch} rows prefilled, the time taken times {batch / rows:g}"]
                        if rows < batch
                        else []
                    ),
                    *(["decode as measured beside the bf16 tower"] if kind != visions[0] else []),
                ],
            )
        )
        report(results[-1])
    return results


def run(shape: ModelShape, setting: Setting, *, new_tokens: int, repeats: int) -> Measured:
    """Baseline (b): dense AWQ on stock kernels, vision tower in bf16."""
    return measure(shape, setting, new_tokens=new_tokens, repeats=repeats)[0]


def run_w8a8(shape: ModelShape, setting: Setting, *, new_tokens: int, repeats: int) -> Measured:
    """Baseline (b8): the same with the vision tower in int8 W8A8 (``torch._int_mm``)."""
    return measure(shape, setting, new_tokens=new_tokens, repeats=repeats, visions=("int8",))[0]


def run_fp8(shape: ModelShape, setting: Setting, *, new_tokens: int, repeats: int) -> Measured:
    """Baseline (b8) with fp8 instead of int8 (``torch._scaled_mm``, row-wise scales)."""
    return measure(shape, setting, new_tokens=new_tokens, repeats=repeats, visions=("fp8",))[0]
