"""``merge_linears``: what it merges, that results and memory stay, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsevila_compile.errors import GraphError
from sparsevila_compile.manager import fingerprint
from sparsevila_compile.ops import W4A16_LINEAR, W8A8_LINEAR
from sparsevila_compile.pass_base import Context, PassError
from sparsevila_compile.passes.merge_linears import MergeLinears
from sparsevila_compile.program import Program
from tests import tiny
from tests.kernels.compare import assert_close_to
from tests.passes.fusing import misses, program_of, result
from tests.passes.quantizing import outputs, prompt, quantize, rtn
from tests.passes.rules import check, count

PASS = "merge_linears"
LINEAR = torch.ops.aten.linear.default
LAYER = "model.language_model.layers.0"
QKV, GATE_UP = f"{LAYER}.self_attn.q_proj_k_proj_v_proj", f"{LAYER}.mlp.gate_proj_up_proj"

# Groups of language and vision, and linears less in vision. Qwen2.5-VL's encoder has one linear for
# q, k and v already; of the last CLIP and SigLIP layer that runs, pruning needs q and k alone.
MERGED = {"llava": (4, 3, 5), "llava_siglip": (4, 3, 5), "qwen": (4, 4, 4)}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str) -> None:
    program = tiny.at_stage(name, "canonicalize", *tiny.FULL)
    before = {c: outputs(program, c, prompt(name)) for c in ("language", "vision")}
    size, linears = program.weight_bytes(), count(program, "vision", LINEAR)
    parts = {n: program.weights[f"{LAYER}.self_attn.{n}.weight"] for n in ("q_proj", "v_proj")}
    report = check(program, PASS)
    language, vision, less = MERGED[name]
    assert len(report.matches) == language + vision
    assert report.misses == ()
    assert [s.where for s in report.matches if s.component == "language"][:2] == [QKV, GATE_UP]
    assert report.notes["into"] == language + vision
    for component in ("language", "turn", "decode"):
        assert count(program, component, LINEAR) == 2 * 4 + 1
        names = program.component(component).weight_names()
        assert {f"{QKV}.weight", f"{GATE_UP}.weight"} <= names
        assert f"{LAYER}.self_attn.q_proj.weight" not in names
    assert count(program, "vision", LINEAR) == linears - less
    assert program.weight_bytes() == size
    whole = program.weights[f"{QKV}.weight"]
    assert torch.equal(whole[:64], parts["q_proj"])
    assert torch.equal(whole[-32:], parts["v_proj"])
    for component, wanted in before.items():
        assert_close_to(outputs(program, component, prompt(name)), wanted, 1e-5, component)


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_quantized(name: str) -> None:
    """Codes, scales and zero points are joined as they are; the result is what it was."""
    program = tiny.at_stage(name, "canonicalize", *tiny.FULL)
    rtn(program)
    parts = [f"{LAYER}.self_attn.{n}_proj" for n in "qkv"]
    stored = {k: v.clone() for k, v in program.weights.items() if k.startswith(tuple(parts))}
    before = outputs(program, "language", prompt(name))
    size = program.weight_bytes()
    report = check(program, PASS)
    assert report.misses == ()
    assert sum(s.component == "language" for s in report.matches) == 4
    for component in ("language", "turn", "decode"):
        assert count(program, component, W4A16_LINEAR) == 2 * 4
    for part, dim in (("qweight", 64 // 8), ("scales", 2), ("zero_points", 2)):
        whole = program.weights[f"{QKV}.{part}"]
        assert whole.shape == (128, dim)
        assert torch.equal(whole, torch.cat([stored[f"{p}.{part}"] for p in parts]))
    assert program.weight_bytes() == size
    assert_close_to(outputs(program, "language", prompt(name)), before, 1e-6, "logits")


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_quantized_in_8_bits(scheme: str) -> None:
    program = tiny.at_stage("qwen", "canonicalize", *tiny.FULL)
    quantize(program, Context(), scheme=scheme, method="rtn")
    before = outputs(program, "language", prompt("qwen"))
    assert sum(s.component == "language" for s in check(program, PASS).matches) == 4
    assert count(program, "decode", W8A8_LINEAR) == 2 * 4
    assert_close_to(outputs(program, "language", prompt("qwen")), before, 1e-6, "logits")


def test_explicit_scales_are_one_input() -> None:
    """Linears that share an explicitly scaled input read one node, and are merged behind it."""

    def layer(x: torch.Tensor, s: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scaled = x * s
        return torch.nn.functional.linear(scaled, a) * torch.nn.functional.linear(scaled, b)

    weights = {"s": torch.rand(8), "a.weight": torch.randn(4, 8), "b.weight": torch.randn(4, 8)}
    program = program_of(layer, {"x": (torch.float32, ("rows", 8))}, weights)
    assert len(check(program, PASS).matches) == 1


# ---------------------------------------------------------------------- memory


def test_parts_take_no_memory_of_their_own() -> None:
    """Whoever still holds the parts (a snapshot) holds views of the merged weight."""
    program = tiny.at_stage("llava", "canonicalize", *tiny.DENSE)
    snapshot = program.snapshot()
    names = [f"{LAYER}.self_attn.{n}_proj.weight" for n in "qkv"]
    values = {n: snapshot.weights[n].clone() for n in names}
    tiny.step(program, PASS)
    whole = program.weights[f"{QKV}.weight"]
    ends = whole.data_ptr() + whole.numel() * whole.element_size()
    for name in names:
        held = snapshot.weights[name]
        assert whole.data_ptr() <= held.data_ptr() < ends
        assert torch.equal(held, values[name])
        assert name not in program.weights


def test_the_model_keeps_its_weights() -> None:
    weight = tiny.model("llava").get_parameter(f"{LAYER}.self_attn.k_proj.weight")
    before = weight.clone()
    tiny.at_stage("llava", "canonicalize", *tiny.DENSE, PASS)
    assert torch.equal(weight, before)


def test_a_failure_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, program: Program) -> None:
        raise GraphError("broken")

    program = tiny.at_stage("qwen", "canonicalize", *tiny.FULL)
    was, wanted = fingerprint(program), outputs(program, "language", prompt("qwen"))
    monkeypatch.setattr(MergeLinears, "ensures", fail)
    with pytest.raises(GraphError, match="broken"):
        tiny.step(program, PASS)
    assert fingerprint(program) == was
    assert torch.equal(outputs(program, "language", prompt("qwen")), wanted)


# ---------------------------------------------------------------------- left alone

X = {"x": (torch.float32, ("rows", 8))}
linear = torch.nn.functional.linear


def weights(*names: str, rows: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(len(names))
    return {n: torch.randn(rows, 8, generator=g).to(dtype) for n in names}


def two(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return linear(x, a) + linear(x, b)


def test_biases_are_joined_zeros_where_there_is_none() -> None:
    def layer(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        a, b, c, bias = w
        return torch.cat([linear(x, a), linear(x, b, bias), linear(x, c)], dim=-1)

    given = {**weights("m.a.weight", "m.b.weight", "m.c.weight"), "m.b.bias": torch.randn(4)}
    program = program_of(layer, X, given)
    x = torch.randn(5, 8)
    before = result(program, x)
    check(program, PASS)
    zeros = torch.zeros(4)
    assert torch.equal(
        program.weights["m.a_b_c.bias"], torch.cat([zeros, given["m.b.bias"], zeros])
    )
    assert_close_to(result(program, x), before, 1e-6, "y")


def test_views_that_strides_forbid_become_copies() -> None:
    """A ``view`` that joins rows of a part cannot be one any more."""

    def layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.view.default(linear(x, a), [-1]) * linear(x, b).reshape(-1)

    program = program_of(layer, X, weights("a.weight", "b.weight"))
    x = torch.randn(5, 8)
    before = result(program, x)
    check(program, PASS)
    assert_close_to(result(program, x), before, 1e-6, "y")


def test_only_what_is_stored_alike() -> None:
    """One in 4 bits, two not: those two are merged."""
    program = program_of(
        lambda x, a, b, c: linear(x, a) + linear(x, b) + linear(x, c),
        {"x": (torch.float32, ("rows", 32))},
        {n: torch.randn(4, 32) for n in ("a.weight", "b.weight", "c.weight")},
    )
    program.caches = (None,)  # type: ignore[assignment]  # of no use but to get past quantization
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsevila_compile.manager.verify", lambda program: None)
        paths = iter(["p.a", "p.b", "p.c"])
        for node in program.component("language").graph.nodes:
            if node.target is LINEAR:
                node.meta["module_path"] = next(paths)
        rtn(program, ignore=["a", "c"])
    program.caches = ()
    x = torch.randn(5, 32)
    before = result(program, x)
    report = check(program, PASS)
    assert len(report.matches) == 1
    [group] = report.misses
    assert group.reason.startswith("of 3 linears that read its input, none other is stored alike")
    assert "a_c.weight" in program.weights
    assert_close_to(result(program, x), before, 1e-6, "y")


def twice(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return linear(x, a) + linear(x, b) + linear(x + 1, b)


def computed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return linear(x, a) + linear(x, b * 2)


def apart(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return linear(x, a) + linear(x * 2, b)


def looked_up(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x @ b.t()


ALONE = (
    "of 2 linears that read its input, none other is stored alike (4-bit or not, dtype, group_size)"
)


@pytest.mark.parametrize(
    "function, others, reasons",
    [
        (twice, {}, {"its weight serves several inputs": 1, ALONE: 1}),
        (computed, {}, {"its weight or bias is computed, not stored": 1, ALONE: 1}),
        (two, {"turn": apart}, {"in turn it does not read what the others read, or not alike": 2}),
        (two, {"turn": looked_up}, {"its weight is no linear's elsewhere": 1, ALONE: 1}),
        (apart, {}, {}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_misses(
    function: Callable[..., torch.Tensor],
    others: dict[str, Callable[..., torch.Tensor]],
    reasons: dict[str, int],
) -> None:
    program = program_of(function, X, weights("a.weight", "b.weight"), **others)
    with pytest.raises(PassError, match="merge_linears matches nothing"):
        tiny.step(program, PASS)
    [report] = tiny.step(program, (PASS, {"optional": True}))
    assert report.matches == ()
    assert misses(report) == reasons


def test_tied_weights_are_left_alone() -> None:
    given = weights("a.weight", "b.weight")
    given["embed.weight"] = given["b.weight"]
    program = program_of(
        lambda x, a, b, table: two(x, a, b),
        X,
        given,
        embed=lambda x, a, b, table: x[:, :4] @ table,  # the same tensor by another name
    )
    [report] = tiny.step(program, (PASS, {"optional": True}))
    assert misses(report) == {"its weight is tied to another one": 1, ALONE: 1}


def test_biases_of_different_dtypes() -> None:
    given: dict[str, torch.Tensor] = {}
    for name, dtype in (("a", torch.float16), ("b", torch.float32)):
        given |= {
            f"{name}.qweight": torch.ones(4, 4, dtype=torch.int32),
            f"{name}.scales": torch.rand(4, 1),
            f"{name}.zero_points": torch.ones(4, 1, dtype=torch.uint8),
            f"{name}.bias": torch.randn(4).to(dtype),
        }

    def both(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return W4A16_LINEAR(x, *w[:4], 32) + W4A16_LINEAR(x, *w[4:], 32)  # type: ignore[no-any-return]

    program = program_of(both, {"x": (torch.float32, ("rows", 32))}, given)
    [report] = tiny.step(program, (PASS, {"optional": True}))
    assert misses(report) == {"the biases differ in dtype": 2}


def test_names_of_different_parents() -> None:
    program = program_of(two, X, weights("one.a.weight", "two.b.weight"))
    check(program, PASS)
    assert list(program.weights) == ["one_a_two_b.weight"]


def test_planning_needs_no_weights() -> None:
    program = tiny.at_stage("llava", "canonicalize", *tiny.DENSE)
    program.weights = {k: w.to("meta") for k, w in program.weights.items()}
    tiny.step(program, PASS)
    assert program.weights[f"{QKV}.weight"].shape == (128, 64)
