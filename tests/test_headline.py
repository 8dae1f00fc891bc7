"""The headline benchmark's own side and its table, at a size that a CPU can do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import decode_step, headline, ours
from benchmarks.headline_types import SHAPES, Measured, ModelShape, qwen_setting
from benchmarks.stock import pipeline
from benchmarks.stock.transformers_generate import prompt

SETTING = qwen_setting(2, 2, side=8, text_tokens=24, new_tokens=4)


def tiny() -> ModelShape:
    whole = SHAPES["qwen2.5-vl-7b"]
    language = replace(
        whole.language, hidden=128, inter=256, layers=2, heads=4, kv_heads=2, head_dim=32,
        vocab=2048, mrope_section=(4, 6, 6),
    )  # fmt: skip
    vision = replace(
        whole.vision, hidden=64, inter=120, layers=2, heads=4, head_dim=16, out=128,
        full_attention=(1,),
    )  # fmt: skip
    return replace(whole, language=language, vision=vision)


@pytest.mark.parametrize(
    ("recipe", "scheme"), [("dense", ""), ("sparse", ""), ("sparse", "w8a8"), ("dense", "fp8")]
)
def test_our_side_compiles_and_answers(recipe: str, scheme: str) -> None:
    specs = ours.RECIPES[recipe]
    specs = ours.with_vision(specs, scheme) if scheme else specs
    side = ours.compile_side("ours", tiny(), specs, "cpu")
    given = prompt(tiny(), SETTING, torch.device("cpu"))
    out = ours._generate(side.model, given, 4)
    assert out.shape == (2, given["input_ids"].shape[1] + 4)
    usage = side.model.usage
    assert usage.visual_tokens == 2 * SETTING.visual_tokens == 64
    assert usage.cached_visual == (16 if recipe == "sparse" else 64)
    assert usage.attended_visual == (2 if recipe == "sparse" else 64)
    ran = ours._bound(side.model)
    expected = {"language w4a16_linear", "language add_rms_norm", "vision silu_mul"}
    if scheme:
        expected.add("vision w8a8_linear")
    if scheme == "fp8":
        expected = expected - {"language w4a16_linear"} | {"language w4a8_linear"}
    assert expected <= {key.rsplit(" ", 1)[0] for key in ran}


def measured(side: str, first: float, decode: float) -> Measured:
    return Measured(
        side=side, shape="tiny", setting="s", batch=1, visual_tokens=8, new_tokens=4, vision_s=0.5,
        llm_prefill_s=first - 0.5, ttft_s=first, decode_ms=decode, decode_ms_p20=decode,
        decode_ms_p80=decode, tokens_per_s=1e3 / decode, end_to_end_s=first + 0.003 * decode,
        peak_memory_bytes=2_000_000_000, idle_host_ms=None,
    )  # fmt: skip


def test_table_says_what_is_gained_over_the_stock_pipeline() -> None:
    text = headline.table(
        [measured(pipeline.SIDES["bf16"], 2.5, 4.0), measured("(d) ours, sparse", 1.0, 2.0)]
    )
    line = next(x for x in text.splitlines() if "ours" in x)
    assert "2.50x   4.00x   2.00x" in line
    assert "2.0" in line


def test_what_each_kernel_of_a_step_adds() -> None:
    """Kernels overlap; what one adds is the time since the end of the one before it."""
    ended = [("embed", 1.0)]
    for _ in range(2):  # steps of three layers and a head
        for _ in range(3):
            at = ended[-1][1]
            ended += [("_decode_kernel", at + 5), ("down", at + 7), ("norm", at + 8)]
        ended.append(("head", ended[-1][1] + 20))
    kernels = [decode_step.Kernel(name, end - 6.0, end) for name, end in reversed(ended)]
    rows = decode_step.by_place(kernels, layers=3)
    assert [(r["place"], r["kernel"], r["us"]) for r in rows] == [
        (0, "_decode_kernel", 5.0),
        (1, "down", 2.0),
        (2, "norm", 1.0),
    ]
    assert {r["seen"] for r in rows} == {4}, "the last layer of each step is left out"
