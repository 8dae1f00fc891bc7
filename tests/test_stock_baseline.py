"""The stock baselines compute what a plain float32 forward computes, and their check can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.headline_types import SETTINGS, SHAPES, Setting
from benchmarks.stock import check, linears, pipeline
from benchmarks.stock import elementwise as ew
from benchmarks.stock.elementwise import Operand, Product
from benchmarks.stock.rope import rope_and_cache
from benchmarks.stock.vision import Vision, window_layout

QWEN, LLAVA = SHAPES["qwen2.5-vl-7b"], SHAPES["llava-1.5-7b"]
SMALL = {"inter": 384, "layers": 2, "vocab": 300}
TINY = {
    "qwen": replace(
        QWEN,
        language=replace(QWEN.language, hidden=512, heads=4, kv_heads=2, **SMALL),
        vision=replace(
            QWEN.vision,
            hidden=160,
            inter=172,  # no multiple of 64: padded
            layers=3,
            heads=2,
            out=512,
            patch_dim=24,
            full_attention=(1,),
        ),
    ),
    "llava": replace(
        LLAVA,
        language=replace(LLAVA.language, hidden=256, heads=2, kv_heads=2, **SMALL),
        vision=replace(
            LLAVA.vision, hidden=128, inter=256, layers=3, heads=2, out=256, patch_dim=24
        ),
    ),
}
REQUESTS = {
    "qwen": Setting("two grids", ((16, 16), (16, 16), (8, 16)), batch=2),
    "llava": Setting("one picture", ((24, 24),), merge=1),
}


@pytest.fixture(autouse=True)
def _seeded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(pipeline, "device", lambda: torch.device("cpu"))


def test_presets_have_the_published_sizes() -> None:
    assert QWEN.language.linears == {
        "qkv": (3584, 4608),
        "o": (3584, 3584),
        "gate_up": (3584, 37888),
        "down": (18944, 3584),
    }
    assert [SETTINGS[n].visual_tokens for n in ("8k", "49k", "98k", "llava")] == [
        8192,
        49152,
        98304,
        9216,
    ]


@pytest.mark.parametrize("name", TINY)
def test_measures_every_precision_and_agrees_with_float32(name: str) -> None:
    setting = REQUESTS[name]
    results = pipeline.measure(
        TINY[name], setting, new_tokens=3, repeats=1, visions=("bf16", "int8", "fp8")
    )
    assert [r.side for r in results] == list(pipeline.SIDES.values())
    for result in results:
        assert result.visual_tokens == setting.visual_tokens
        assert result.ttft_s >= result.vision_s + result.llm_prefill_s > 0
        assert result.end_to_end_s > result.ttft_s
        assert sum(result.shares.values()) == pytest.approx(1, rel=0.01)
        assert any("no GPU" in note for note in result.notes)
        assert any("relative errors" in note for note in result.notes)
        assert "dequantised" in result.chosen["linear qkv"]


@pytest.mark.parametrize("what", ["silu_mul", "prefill_rope", "decode_rope"])
def test_the_language_check_fails_on_zeros(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ew, what)

    def zeroed(*arguments: object) -> object:
        out = right(*arguments)
        return out._replace(value=out.value * 0) if isinstance(out, Operand) else out * 0

    monkeypatch.setattr(ew, what, zeroed)
    stock = pipeline.Stock(TINY["qwen"], REQUESTS["qwen"], 2, 1)
    with pytest.raises(ArithmeticError, match="relative error"):
        check.check_language(
            TINY["qwen"], stock.kinds, 2, stock.on, stock.prefill_with, stock.decode_with
        )


def test_the_vision_check_fails_on_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = pipeline.Stock(TINY["qwen"], REQUESTS["qwen"], 2, 1)
    right = Vision.layout

    def unordered(self: Vision, grid: tuple[int, int]) -> object:
        layout, cos, sin = right(self, grid)
        return replace(layout, back=torch.arange(len(layout.back))), cos, sin

    monkeypatch.setattr(Vision, "layout", unordered)
    with pytest.raises(ArithmeticError, match="vision tower, bf16"):
        check.check_vision(TINY["qwen"], "bf16", stock.on, *stock.vision_with)


def test_error_refuses_a_reference_of_zeros_and_nans() -> None:
    with pytest.raises(ArithmeticError, match="scale"):
        check.error(torch.zeros(3), torch.zeros(3))
    assert check.error(torch.full((3,), torch.nan), torch.ones(3)) == float("inf")
    assert check.error(torch.zeros(3), torch.ones(3)) == pytest.approx(1)


def test_torchs_int4_layout_is_unpacked() -> None:
    """Packs by the layout's definition, word by word, and expects the weights back."""
    n, k = 16, 256
    q = torch.randint(0, 16, (n, k))
    packed = torch.zeros(n // 8, k // 128, 32, 4, dtype=torch.int64)
    for row in range(n):
        for column in range(k):
            outer, inner = divmod(column, 128)
            tile, within = divmod(inner, 16)
            high, rest = divmod(within, 8)
            lane = 4 * (row % 8) + rest // 2
            nibble = 2 * (tile % 2) + high + 4 * (rest % 2)
            packed[row // 8, outer, lane, tile // 2] |= q[row, column] << 4 * nibble
    assert torch.equal(linears.unpack_tinygemm(packed.int()), q)


def test_plain_int4_keeps_four_bits_and_its_product() -> None:
    weights = linears.Int4.random(256, 64, torch.device("cpu"))
    plain = linears.PlainInt4Linear(weights)
    assert plain.bytes() == 64 * 256 // 2 + 2 * 2 * 64 * 2
    x = torch.randn(3, 256).bfloat16()
    wanted = x.float() @ weights.dense().t()
    assert wanted.std() > 0.3
    assert check.error(plain.few(x), wanted) < 0.01


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.005), ("int8", 0.02), ("fp8", 0.05)])
def test_eight_bit_linear(kind: str, bound: float) -> None:
    weight, bias = torch.randn(64, 128).bfloat16(), torch.randn(64).bfloat16()
    x = torch.randn(40, 128)
    given = ew.to_operand(x, kind)
    wanted = given.value.float() * (1 if given.scale is None else given.scale)
    assert check.error(wanted, x) < bound
    product = linears.Linear(weight, bias, kind)(given)
    assert check.error(ew.finish(product), wanted @ weight.float().t() + bias.float()) < bound


@pytest.mark.parametrize("biased", [True, False])
def test_decode_ropes_kernel(biased: bool, device: torch.device) -> None:
    """Its one kernel against the plain form; both write one position and no other."""
    heads, kv_heads, dim, at = 6, 2, 128, 5
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(3, width).bfloat16()
    bias = torch.randn(width).bfloat16() if biased else None
    angle = torch.randn(1, dim // 2).repeat(1, 2)
    plain = [torch.zeros(3, kv_heads, 9, dim).bfloat16() for _ in range(2)]
    given = Product(qkv, bias=bias), angle.cos(), angle.sin(), *plain, torch.tensor([at])
    wanted = ew.decode_rope(*given)
    caches = [torch.zeros_like(t, device=device) for t in plain]
    moved = [None if t is None else t.to(device) for t in (qkv, bias, given[1], given[2])]
    out = rope_and_cache(*moved, *caches, given[-1].to(device))  # type: ignore[arg-type]
    for found, expected in zip((out, *caches), (wanted, *plain), strict=True):
        assert check.error(found.cpu(), expected) < 0.005
    for cache in (*caches, *plain):
        written = cache.float().square().sum((0, 1, 3)).nonzero().flatten().tolist()
        assert written == [at]


def test_a_grid_that_windows_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="12 x 16 grid: sides must be multiples of 8"):
        window_layout(12, 16, 2, 8)
