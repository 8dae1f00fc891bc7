"""Scales in the op before: the same outputs, wherever a scale may go, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from sparsevila_compile.awq import (
    ActivationStats,
    AwqResult,
    Quantized,
    ScaleChoice,
    quantize_groupwise,
)
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.ops import ATTENTION, CACHED_ATTENTION
from sparsevila_compile.passes import linear_schemes, quantize_linear
from sparsevila_compile.passes.scale_folding import (
    Fold,
    applied_scale,
    find_fold,
    folded,
    weight_of,
)
from sparsevila_compile.program import Component, Program
from tests import tiny
from tests.kernels.compare import relative_error
from tests.passes.quantizing import awq, outputs, prompt

aten = torch.ops.aten
STEP = 2.0**-6


def _multi_head() -> Any:
    """LLaVA as its first versions are: every query head has its own value head; biases too."""
    config = tiny.CONFIGS["llava"]()
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    return config


@pytest.fixture(autouse=True)
def multi_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "llava_multi_head", _multi_head)


# ---- the whole pass, with a quantization that is exact

# Of each component's groups (those of one input), how many fold into what.
KINDS = {
    ("llava", "language"): {"norm": 4, "product": 2, None: 2},
    ("llava_multi_head", "language"): {"norm": 4, "product": 2, "value": 2},
    ("llava", "vision"): {"norm": 4, "value": 2, None: 4},
    ("llava_siglip", "vision"): {"norm": 4, "value": 2, None: 4},
    ("qwen", "language"): {"norm": 4, "product": 2, None: 2},
    ("qwen", "vision"): {"norm": 8, "product": 4, None: 6},
}
CASES = [pytest.param(*case, id="-".join(case)) for case in KINDS]


def grid_weight(rows: int, width: int, seed: int) -> torch.Tensor:
    """Codes of 4 bits less 8, times STEP; every group of a row has the codes 0 and 15, and every
    column a code 0, so that :func:`recovered` finds what a column was divided by."""
    assert rows >= 32
    codes = torch.randint(1, 16, (rows, width), generator=torch.Generator().manual_seed(seed))
    at = torch.arange(width)
    for row in range(rows):
        codes[row, at % 32 == row % 32] = 0
        codes[row, at % 32 == (row + 1) % 32] = 15
    return (codes - 8) * STEP


def recovered(weight: torch.Tensor) -> torch.Tensor:
    return 8 * STEP / weight.abs().amax(0)


def quantizable(name: str) -> Program:
    """Its linears' weights are ``grid / s`` with powers of two ``s``: times ``s``, 4 bits are exact."""
    program = tiny.at_stage(name, "canonicalize", "insert_kv_cache")
    seed = 0
    for component in ("vision", "language"):
        by_input: dict[fx.Node, torch.Tensor] = {}
        for node in program.component(component).graph.nodes:
            if node.target is not aten.linear.default:
                continue
            weight, seed = weight_of(node), seed + 1
            assert weight is not None
            rows, width = program.weights[weight].shape
            powers = torch.randint(-3, 4, (width,), generator=torch.Generator().manual_seed(seed))
            scale = by_input.setdefault(node.args[0], 2.0**powers)
            program.weights[weight] = grid_weight(rows, width, seed) / scale
    return program


def exact_awq(
    weights: list[torch.Tensor],
    stats: ActivationStats,
    group_size: int,
    *,
    applied: Callable[[torch.Tensor], torch.Tensor],
    scale_dtype: torch.dtype,
    **options: Any,
) -> AwqResult:
    """In place of the search: the scales that :func:`quantizable` divided by."""
    assert stats.tokens > 0
    wanted = recovered(weights[0])
    scale = applied(wanted)
    assert torch.equal(scale, wanted), "powers of two fold without rounding"
    quantized: list[Quantized] = []
    for weight in weights:
        assert torch.equal(recovered(weight), wanted), "one scale for all that share an input"
        quantized.append(quantize_groupwise(weight * scale, group_size, scale_dtype=scale_dtype))
        assert torch.equal(quantized[-1].dequantize(), weight * scale), "exact"
    return AwqResult(ScaleChoice(scale, 0.5, True, 1.0, 0.5), quantized, 0.5, 1.0, 0.0)


@pytest.mark.parametrize("name, component", CASES)
def test_outputs_stay(
    name: str, component: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scales of up to 8 and down to 1/8 go everywhere a scale can go; outputs keep all digits."""
    program = quantizable(name)
    before = outputs(program, component, prompt(name))
    others = dict(program.weights)
    monkeypatch.setattr(linear_schemes, "quantize_awq", exact_awq)
    report, pass_ = awq(program, name, tmp_path, component=component)
    kinds = Counter(g.fold.kind if g.fold else None for g in pass_._groups)
    assert kinds == KINDS[name, component]
    assert report.notes["folded_into"] == {k: n for k, n in kinds.items() if k}
    assert report.notes["explicit_scales"] == kinds[None]
    after = outputs(program, component, prompt(name))
    assert before.std() > 0.01
    assert relative_error(after, before) < 3e-6
    for group in pass_._groups:
        if group.fold is not None and group.fold.kind == "norm":
            held = program.weights[group.fold.weight]
            assert torch.equal(held, others[group.fold.weight] / group.scale)


@pytest.mark.parametrize("name, component", CASES)
def test_forgotten_folds_are_seen(
    name: str, component: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The test above can fail: without the folds, outputs are others."""
    program = quantizable(name)
    before = outputs(program, component, prompt(name))
    monkeypatch.setattr(linear_schemes, "quantize_awq", exact_awq)
    monkeypatch.setattr(quantize_linear, "folded", lambda weights, fold, scale: {})
    awq(program, name, tmp_path, component=component)
    assert relative_error(outputs(program, component, prompt(name)), before) > 0.1


def test_every_copy_of_the_language_model_is_scaled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = quantizable("llava_multi_head")
    tiny.step(program, ("sparsify_decode_attention", {"keep_ratio": 1.0}))
    monkeypatch.setattr(linear_schemes, "quantize_awq", exact_awq)
    asked = prompt("llava_multi_head")
    before = outputs(program, "language", asked)
    awq(program, "llava_multi_head", tmp_path)
    for part in ("language", "turn"):
        assert relative_error(outputs(program, "language", asked, part), before) < 3e-6
    muls = {
        part: sum(n.target is aten.mul.Tensor for n in program.component(part).graph.nodes)
        for part in ("language", "turn", "decode")
    }
    assert len(set(muls.values())) == 1


# ---- where a scale can go


def groups(component: Component) -> Iterator[tuple[str, list[str]]]:
    """The weights of each group by the last part of the first one's module."""
    found: dict[fx.Node, list[str]] = {}
    for node in component.graph.nodes:
        if node.target is aten.linear.default:
            name = weight_of(node)
            assert name is not None
            found.setdefault(node.args[0], []).append(name)
    for names in found.values():
        yield names[0].removesuffix(".weight").rpartition(".")[2], names


def first(program: Program, component: str, kind: str) -> list[str]:
    return next(names for k, names in groups(program.component(component)) if k == kind)


def linear(component: Component, weight: str) -> fx.Node:
    found: fx.Node = next(n for n in component.graph.nodes if weight_of(n) == weight)
    return found


def test_what_folds_into_what() -> None:
    program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    parts = list(program.components.values())
    layer = "model.language_model.layers.0"
    assert find_fold(parts, first(program, "language", "q_proj")) == Fold(
        "norm", f"{layer}.input_layernorm.weight"
    )
    assert find_fold(parts, first(program, "language", "gate_proj")) == Fold(
        "norm", f"{layer}.post_attention_layernorm.weight"
    )
    assert find_fold(parts, first(program, "language", "down_proj")) == Fold(
        "product", f"{layer}.mlp.up_proj.weight"
    )
    assert find_fold(parts, first(program, "language", "o_proj")) is None  # GQA
    tower = "model.vision_tower.encoder.layers.0"
    assert find_fold(parts, first(program, "vision", "q_proj")) == Fold(
        "norm", f"{tower}.layer_norm1.weight", f"{tower}.layer_norm1.bias"
    )
    assert find_fold(parts, first(program, "vision", "out_proj")) == Fold(
        "value", f"{tower}.self_attn.v_proj.weight", f"{tower}.self_attn.v_proj.bias"
    )
    assert find_fold(parts, first(program, "vision", "fc2")) is None  # behind an activation


def test_part_of_a_group_does_not_fold() -> None:
    """A norm that q_proj reads too cannot take the scale of k_proj and v_proj alone."""
    program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    names = first(program, "language", "q_proj")
    assert len(names) == 3
    assert find_fold(list(program.components.values()), names[1:]) is None


def test_another_reader_of_the_norm() -> None:
    program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    language = program.component("language")
    names = first(program, "language", "gate_proj")
    parts = list(program.components.values())
    fold = find_fold(parts, names)
    assert fold is not None
    edit = Editor(language)
    again = edit.weight(fold.weight, program.weights[fold.weight], before=language.output_node())
    twice = edit.call(aten.add.Tensor, again, again, before=language.output_node())
    edit.output("extra", twice)
    assert find_fold(parts, names) is None


def test_components_must_agree() -> None:
    program = tiny.at_stage("llava", "canonicalize", "insert_kv_cache")
    tiny.step(program, ("sparsify_decode_attention", {"keep_ratio": 1.0}))
    names = first(program, "language", "gate_proj")
    parts = list(program.components.values())
    assert find_fold(parts, names) is not None
    decode = program.component("decode")
    x = linear(decode, names[0]).args[0]
    assert isinstance(x, fx.Node)
    edit = Editor(decode)
    copy = edit.call(aten.mul.Tensor, x, 1.0, before=x.next)
    for name in names:
        linear(decode, name).replace_input_with(x, copy)
    assert find_fold(parts, names) is None


@pytest.mark.parametrize("where", ["values", "joined"])
def test_heads_in_another_order(where: str) -> None:
    """Channels that attention's views mix up do not line up with rows of v_proj."""
    program = tiny.at_stage("llava_multi_head", "canonicalize", "insert_kv_cache")
    language = program.component("language")
    names = first(program, "language", "o_proj")
    parts = list(program.components.values())
    assert find_fold(parts, names) == Fold(
        "value",
        "model.language_model.layers.0.self_attn.v_proj.weight",
        "model.language_model.layers.0.self_attn.v_proj.bias",
    )
    attention = next(n for n in language.graph.nodes if n.target is CACHED_ATTENTION)
    edit = Editor(language)
    if where == "values":  # channel d * heads + h is dim d of head h
        v = attention.args[2]
        split = v.args[0]
        batch, length, heads, dim = split.args[1][:2] + list(split.meta["val"].shape[2:])
        other = edit.call(aten.view.default, split.args[0], [batch, length, dim, heads], before=v)
        turned = edit.call(aten.permute.default, other, [0, 3, 1, 2], before=v)
        attention.replace_input_with(v, turned)
    else:
        turned = edit.call(aten.transpose.int, attention, 2, 3, before=attention.next)
        attention.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
        joined = next(iter(turned.users))
        edit.propagate(joined)
    edit.sweep()
    assert find_fold(parts, names) is None


def small(build: Callable[..., fx.Node]) -> Component:
    """``x [2, 64]`` → what ``build`` makes of it, into a linear of the weight ``w [8, 64]``."""
    graph = fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(2, 64)
    out = graph.output((x,))
    component = Component("small", graph, ("out",))
    edit = Editor(component)

    def stored(name: str, *shape: int) -> fx.Node:
        return edit.weight(name, torch.empty(shape), before=out)

    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call(target, *args, before=out)

    out.args = ((call(aten.linear.default, build(x, stored, call), stored("w", 8, 64)),),)
    return component


LINEAR, MUL, NORM = aten.linear.default, aten.mul.Tensor, aten.layer_norm.default
PRODUCERS: dict[str, tuple[Callable[..., fx.Node], Fold | None]] = {
    "stored factor": (lambda x, w, f: f(MUL, x, w("n", 64)), Fold("norm", "n")),
    "factor for rows": (lambda x, w, f: f(MUL, x, w("n", 2, 1)), None),
    "one factor for all": (lambda x, w, f: f(MUL, x, w("n", 1)), None),
    "layer norm": (
        lambda x, w, f: f(NORM, x, [64], w("n", 64), w("b", 64)),
        Fold("norm", "n", "b"),
    ),
    "layer norm without bias": (lambda x, w, f: f(NORM, x, [64], w("n", 64)), Fold("norm", "n")),
    "plain layer norm": (lambda x, w, f: f(NORM, x, [64]), None),
    "product": (
        lambda x, w, f: f(MUL, f(aten.silu.default, x), f(LINEAR, x, w("u", 64, 64), w("b", 64))),
        Fold("product", "u", "b"),
    ),
    "gate of one channel": (lambda x, w, f: f(MUL, x, f(LINEAR, x, w("u", 1, 64))), None),
    "computed weight": (
        lambda x, w, f: f(MUL, f(aten.silu.default, x), f(LINEAR, x, f(MUL, w("u", 64, 64), 2))),
        None,
    ),
    "computed bias": (
        lambda x, w, f: f(
            MUL, f(aten.silu.default, x), f(LINEAR, x, w("u", 64, 64), f(MUL, w("b", 64), 2))
        ),
        None,
    ),
    "linear alone": (lambda x, w, f: f(LINEAR, x, w("u", 64, 64)), None),
    "sum": (lambda x, w, f: f(aten.add.Tensor, x, w("n", 64)), None),
    "the input": (lambda x, w, f: x, None),
}


@pytest.mark.parametrize("producer", PRODUCERS)
def test_producers(producer: str) -> None:
    build, fold = PRODUCERS[producer]
    assert find_fold([small(build)], ["w"]) == fold


def test_attention_without_a_cache_folds_too() -> None:
    program = tiny.traced("llava_multi_head")
    assert any(n.target is ATTENTION for n in program.component("language").graph.nodes)
    fold = find_fold([program.component("language")], first(program, "language", "o_proj"))
    assert fold is not None
    assert fold.kind == "value"


# ---- what is stored, and what the search sees of it

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_search_sees_the_rounding_of_a_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = {"n": (1 + torch.randn(64)).to(dtype), "b": torch.randn(64).to(dtype)}
    weights["n"][5] = 0
    fold = Fold("norm", "n", "b")
    scale = torch.exp(torch.randn(64))
    applied = applied_scale(weights, fold, scale)
    new = folded(weights, fold, applied)
    assert set(new) == {"n", "b"}
    assert all(t.dtype == dtype for t in new.values())
    rest = torch.arange(64) != 5
    assert torch.equal(new["n"][rest], folded(weights, fold, scale)["n"][rest])
    kept = weights["n"].float() / new["n"].float()
    assert torch.allclose(applied[rest], kept[rest], rtol=1e-6, atol=0)
    assert (applied != scale)[rest].any(), "some rounding must show"
    assert torch.allclose(applied, scale, rtol=torch.finfo(dtype).eps, atol=0)
    assert applied[5] == scale[5]
    assert torch.equal(applied_scale(weights, fold, torch.ones(64)), torch.ones(64))


def test_a_scale_that_breaks_a_channel_is_left_out() -> None:
    """float16 cannot hold these: the channel is left as it is, in what is searched and stored."""
    scale = torch.tensor([1e-6, 1e6, 2.0, 4.0])
    norm = {"n": torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float16)}
    applied = applied_scale(norm, Fold("norm", "n"), scale)
    assert applied[[0, 2, 3]].tolist() == [1, 2, 4]
    assert 0.9e6 < applied[1] < 1.1e6, "few digits are left of 1e-6, but some"
    assert folded(norm, Fold("norm", "n"), applied)["n"].isfinite().all()
    rows = {
        "u.scales": torch.tensor([[1.0, 2.0]] * 4, dtype=torch.float16),
        "u.bias": torch.tensor([1.0, 1.0, 60000.0, 1.0], dtype=torch.float16),
    }
    fold = Fold("product", "u.weight", "u.bias")
    applied = applied_scale(rows, fold, torch.tensor([1e-6, 1e9, 0.5, 4.0]))
    assert applied.tolist() == [1, 1, 1, 4]
    assert all(t.isfinite().all() for t in folded(rows, fold, applied).values())


def test_rows_of_a_quantized_linear() -> None:
    """Its group scales are divided, row by row; a float linear's weight is."""
    scale = torch.tensor([2.0, 4.0])
    fold = Fold("product", "u.weight", "u.bias")
    bias = torch.tensor([1.0, 1.0])
    packed = {"u.scales": torch.tensor([[8.0, 16.0], [8.0, 16.0]]), "u.bias": bias}
    new = folded(packed, fold, scale)
    assert {k: v.tolist() for k, v in new.items()} == {
        "u.scales": [[4, 8], [2, 4]],
        "u.bias": [0.5, 0.25],
    }
    plain = {"u.weight": torch.ones(2, 3), "u.bias": bias}
    assert folded(plain, fold, scale)["u.weight"].tolist() == [[0.5] * 3, [0.25] * 3]
    assert packed["u.scales"][0, 0] == 8, "what is held is not changed in place"


def test_row_folds_cost_little() -> None:
    """Rounding group scales once more, which the search does not see, is nothing beside 4 bits."""
    torch.manual_seed(1)
    weight = torch.randn(64, 128)
    quantized = quantize_groupwise(weight, 32, scale_dtype=torch.bfloat16)
    scale = torch.exp(torch.randn(64))
    new = folded({"u.scales": quantized.scales}, Fold("product", "u.weight"), scale)["u.scales"]
    exact = quantized.dequantize() / scale[:, None]
    off = Quantized(quantized.codes, new, quantized.zero_points).dequantize() - exact
    rounding = exact - weight / scale[:, None]
    assert 0 < off.norm() < 0.03 * rounding.norm()
