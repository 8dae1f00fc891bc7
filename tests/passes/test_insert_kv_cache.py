"""``insert_kv_cache``: one cache a causal attention, and the same results without recomputation."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.engine import Engine
from sparsevila_compile.errors import GraphError
from sparsevila_compile.families import family_of
from sparsevila_compile.ops import ATTENTION, CACHED_ATTENTION
from sparsevila_compile.pass_base import PassError
from sparsevila_compile.program import CacheSpec
from tests import tiny
from tests.passes.rules import check, count

PASS = "insert_kv_cache"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str) -> None:
    program = tiny.at_stage(name, "canonicalize")
    report = check(program, PASS)
    layers = [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    assert [s.where for s in report.matches] == layers
    assert [s.component for s in report.matches] == ["language"] * 2
    assert report.misses == ()
    assert count(program, "language", ATTENTION) == 0
    assert count(program, "language", CACHED_ATTENTION) == 2
    # The encoder has no past; LLaVA reads its features before the last layer, which is dead now.
    assert count(program, "vision", ATTENTION) == (4 if name == "qwen" else 2)
    expected = [CacheSpec(layer, 2, 16, torch.float32) for layer in layers]
    assert list(program.caches) == expected
    assert program.component("language").inputs[3:] == (
        "cache_lens",
        "new_lens",
        *(f"{kind}_cache_{i}" for i in range(2) for kind in "kv"),
    )
    assert report.notes["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert program.max_length == report.notes["max_length"] == 2048


def test_windows_reach_the_cache() -> None:
    program = tiny.at_stage("qwen_windowed", PASS)
    assert [c.window for c in program.caches] == [0, 9, 0]
    nodes = [n for n in program.component("language").graph.nodes if n.target is CACHED_ATTENTION]
    assert [n.args[8] for n in nodes] == [0, 9, 0]


def test_capacity_is_its_own_size() -> None:
    program = tiny.at_stage("llava", PASS)
    component = program.component("language")
    capacity, length = (
        str(component.input(name).meta["val"].shape[i])
        for name, i in (("k_cache_1", 2), ("inputs_embeds", 1))
    )
    assert capacity != length
    assert str(component.input("v_cache_0").meta["val"].shape[2]) == capacity


def test_max_length() -> None:
    program = tiny.at_stage("llava", (PASS, {"max_length": 77}))
    assert program.max_length == 77
    with pytest.raises(ValueError, match="greater than 0"):
        tiny.make_passes((PASS, {"max_length": 0}))


def test_misses_have_reasons() -> None:
    program = tiny.traced("llava")
    first, second = (n for n in program.component("language").graph.nodes if n.target is ATTENTION)
    lens = program.component("language").input("position_ids")
    first.args = (*first.args[:5], False, 0)
    second.args = (*second.args[:3], lens, *second.args[4:])
    with pytest.raises(PassError, match=r"1 × attention is not causal.*1 × attention is packed"):
        tiny.step(program, PASS)


def test_one_layer_that_cannot_be_cached() -> None:
    """Half a cache would be wrong: the program is refused."""
    program = tiny.traced("llava")
    second = [n for n in program.component("language").graph.nodes if n.target is ATTENTION][1]
    lens = program.component("language").input("position_ids")
    second.args = (*second.args[:3], lens, *second.args[4:])
    with pytest.raises(GraphError, match="causal attention without a cache"):
        tiny.step(program, PASS)
    assert program.caches == ()
    assert program.component("language").inputs[-1] == "logit_rows"


def test_a_causal_encoder_is_refused() -> None:
    program = tiny.traced("llava")
    node = next(n for n in program.component("vision").graph.nodes if n.target is ATTENTION)
    node.args = (*node.args[:5], True, *node.args[6:])
    with pytest.raises(PassError, match=r"encoder has causal attention at model.vision_tower"):
        tiny.step(program, PASS)


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "qwen_windowed", "llava_windowed"])
def test_pieces_give_what_the_whole_gives(name: str) -> None:
    """Two rows of different lengths, fed in uneven pieces into an unclean cache."""
    lengths, pieces = (11, 7), [(3, 1), (1, 5), (0, 1), (7, 0)]
    traced, cached = tiny.traced(name), tiny.at_stage(name, "canonicalize", PASS)
    whole, parts = (Engine(p, family_of(p.config)) for p in (traced, cached))
    embeds = torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(1))

    def positions(starts: list[int], n: int) -> torch.Tensor:
        p = torch.stack([torch.arange(s, s + n) for s in starts])
        return torch.stack([p, p, p]) if tiny.is_qwen(name) else p

    caches = {
        f"{kind}_cache_{i}": torch.full((2, c.kv_heads, 16, c.head_dim), float("nan"))
        for i, c in enumerate(cached.caches)
        for kind in "kv"
    }
    at = [0, 0]
    for new in pieces:
        n = max(new)
        part = torch.zeros(2, n, 64)
        for b in range(2):
            part[b, : new[b]] = embeds[b, at[b] : at[b] + new[b]]
        inputs = {
            "inputs_embeds": part,
            "position_ids": positions(at, n),
            "logit_rows": torch.tensor([[max(k - 1, 0)] for k in new]),
            "cache_lens": torch.tensor(at, dtype=torch.int32),
            "new_lens": torch.tensor(new, dtype=torch.int32),
            **caches,
        }
        got = parts.run("language", inputs)["logits"]
        at = [a + k for a, k in zip(at, new, strict=True)]
        for b in range(2):
            if not new[b]:
                continue
            alone = {
                "inputs_embeds": embeds[b : b + 1, : at[b]],
                "position_ids": positions([0], at[b]),
                "logit_rows": torch.tensor([[at[b] - 1]]),
            }
            expected = whole.run("language", alone)["logits"]
            assert (got[b] - expected[0]).norm() < 1e-5 * expected.norm()
    assert tuple(at) == lengths
    for cache in caches.values():
        for b, n in enumerate(lengths):
            assert cache[b, :, :n].isfinite().all()
            assert cache[b, :, n:].isnan().all(), "nothing is written past a row's end"
