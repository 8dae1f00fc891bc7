"""quantize_linear: what it matches, what it stores, what it refuses, and what it costs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.kernels.w4a16_linear.packing import dequantize
from sparsevila_compile.manager import fingerprint, run_passes
from sparsevila_compile.ops import W4A16_LINEAR
from sparsevila_compile.pass_base import Context, PassError
from sparsevila_compile.passes import quantize_linear
from sparsevila_compile.passes.quantize_linear import QuantizeLinearConfig
from sparsevila_compile.passes.scale_folding import weight_of
from sparsevila_compile.program import Program
from sparsevila_compile.trace import trace
from tests import tiny
from tests.kernels.compare import relative_error
from tests.passes import rules
from tests.passes.quantizing import SAMPLES, Prompts, awq, data, outputs, prompt, quantize, rtn

aten = torch.ops.aten
LINEAR = aten.linear.default
PARTS = ("language", "vision")
FAMILIES = ("llava", "qwen")


def cached(name: str) -> Program:
    return tiny.at_stage(name, "canonicalize", "insert_kv_cache")


def weights_in(program: Program, component: str, target: Any = LINEAR) -> list[str]:
    nodes = program.component(component).graph.nodes
    return [str(weight_of(n)) for n in nodes if n.target is target]


# ---- what it matches

# As the models are built: layers times linears a layer, and the projector or merger.
COUNTS = {
    ("llava", "language"): 2 * 7,
    ("llava", "vision"): 2 * 6 + 2,  # the last layer feeds nothing: dead code by now
    ("llava_siglip", "vision"): 2 * 6 + 2,
    ("qwen", "language"): 2 * 7,
    ("qwen", "vision"): 4 * 5 + 2,
}


@pytest.mark.parametrize("name, component", COUNTS)
def test_matches_exactly_the_linears_of_its_component(name: str, component: str) -> None:
    program = cached(name)
    modules = dict(tiny.model(name).named_modules())
    other = "vision" if component == "language" else "language"
    untouched = {n: program.weights[n] for n in weights_in(program, other)}
    options = {"method": "rtn", "group_size": 32, "component": component}
    report, _ = quantize(program, Context(), **options)
    where = [site.where for site in report.matches]
    assert len(where) == len(set(where)) == COUNTS[name, component]
    assert all(isinstance(modules[path], torch.nn.Linear) for path in where)
    assert all(("language_model" in path) == (component == "language") for path in where)
    assert [(m.reason, len(m.sites)) for m in report.misses] == (
        [("in ignore", 1)] if component == "language" else []
    )
    assert rules.count(program, component, W4A16_LINEAR) == COUNTS[name, component]
    assert rules.count(program, other, W4A16_LINEAR) == 0
    assert weights_in(program, other) == list(untouched)
    assert all(program.weights[n] is w for n, w in untouched.items())


@pytest.mark.parametrize("name, component", [("llava", "language"), ("qwen", "vision")])
def test_keeps_the_rules_of_passes(name: str, component: str) -> None:
    options = {"method": "rtn", "group_size": 32, "component": component}
    rules.check(cached(name), ("quantize_linear", options))


def test_a_vision_gate_proj_is_not_a_language_gate_proj() -> None:
    for component, count in (("language", 2), ("vision", 4)):
        program = cached("qwen")
        options = {"component": component, "ignore": ("gate_proj", "lm_head")}
        if component == "vision":
            options["ignore"] = ("gate_proj",)
        report, _ = rtn(program, **options)
        left = [s.where for m in report.misses for s in m.sites if s.where.endswith("gate_proj")]
        assert len(left) == count
        assert all(("visual" in path) == (component == "vision") for path in left)
        assert len(report.matches) == COUNTS["qwen", component] - count


def test_shared_and_computed_weights_are_misses() -> None:
    program = cached("llava")
    language = program.component("language")
    nodes = [n for n in language.graph.nodes if n.target is LINEAR]
    twice, again, computed = nodes[0], nodes[7], nodes[3]
    assert tiny.model("llava").config.text_config.num_hidden_layers == 2
    edit = Editor(language)
    shared = edit.weight(
        str(weight_of(twice)), program.weights[str(weight_of(twice))], before=again
    )
    again.replace_input_with(again.args[1], shared)
    doubled = edit.call(aten.mul.Tensor, computed.args[1], 2.0, before=computed)
    computed.replace_input_with(computed.args[1], doubled)
    report, _ = rtn(program)
    assert {m.reason: len(m.sites) for m in report.misses} == {
        "its weight serves several inputs": 2,
        "its weight is computed, not stored": 1,
        "in ignore": 1,
    }
    assert len(report.matches) == COUNTS["llava", "language"] - 3


@pytest.mark.parametrize("name", ["llava", "llava_tied"])
def test_the_head_on_demand(name: str, tmp_path: Path) -> None:
    """A tied embedding keeps its float table."""
    program = cached(name)
    report, pass_ = awq(program, name, tmp_path, ignore=())
    assert len(report.matches) == COUNTS["llava", "language"] + 1
    assert weights_in(program, "language") == []
    [head] = pass_._groups[-1].names
    assert "layers" not in head
    tied = head in program.component("embed").weight_names()
    assert tied == (name == "llava_tied") == (head in program.weights)
    exact = outputs(cached(name), "language", prompt(name))
    assert 0.01 < relative_error(outputs(program, "language", prompt(name)), exact) < 0.4


# ---- what it stores


def stored_bytes(rows: int, width: int, group_size: int) -> int:
    groups = rows * width // group_size
    return rows * width // 2 + groups * 4 + groups  # float32 scales, uint8 zero points


@pytest.mark.parametrize(("method", "group_size"), [("awq", 32), ("rtn", 64)])
def test_rewritten_everywhere_and_freed(method: str, group_size: int, tmp_path: Path) -> None:
    model = tiny.build("llava")
    program = trace(model)
    tiny.step(program, "canonicalize", "insert_kv_cache",
              ("sparsify_decode_attention", {"keep_ratio": 0.5}))  # fmt: skip
    names = [n for n in weights_in(program, "language") if not n.startswith("lm_head")]
    shapes = {n: tuple(program.weights[n].shape) for n in names}
    originals = [weakref.ref(program.weights[n]) for n in names]
    del model
    if method == "rtn":
        report, pass_ = rtn(program, group_size=group_size)
    else:
        report, pass_ = awq(program, "llava", tmp_path, group_size=group_size)
    for part in ("language", "turn", "decode"):
        assert weights_in(program, part, W4A16_LINEAR) == names
        assert weights_in(program, part) == ["lm_head.weight"]
        assert {n.args[5] for n in program.component(part).graph.nodes if n.target is W4A16_LINEAR} == {group_size}  # fmt: skip
    assert not set(names) & set(program.weights), "no float copy stays"
    gc.collect()
    assert [ref() for ref in originals] == [None] * len(names), "and none is held elsewhere"
    inverse = [n for n in program.weights if n.endswith(".inverse_scale")]
    assert len(inverse) == report.notes["explicit_scales"]
    gone = sum(4 * r * w for r, w in shapes.values())
    new = sum(stored_bytes(r, w, group_size) for r, w in shapes.values())
    new += sum(4 * program.weights[n].numel() for n in inverse)
    assert report.bytes_before - report.bytes_after == gone - new
    assert report.bytes_after == program.weight_bytes()
    assert pass_._packed == {}


def test_prefill_and_decode_agree(tmp_path: Path) -> None:
    """With everything retrieved, tokens of the sparse decode are those of the dense one."""
    answers = []
    for sparse in (False, True):
        program = cached("llava")
        if sparse:
            tiny.step(program, ("sparsify_decode_attention", {"keep_ratio": 1.0}))
        awq(program, "llava", tmp_path)
        tiny.step(program, "lower_ops")
        compiled = tiny.CompiledModel(
            program, tiny.processor(), tiny.model("llava").generation_config
        )
        answers.append(compiled.generate(**prompt("llava"), **tiny.greedy(24)))
    assert torch.equal(*answers)
    assert len(set(answers[0][0, -24:].tolist())) > 5


@pytest.mark.parametrize("component", PARTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_is_near(name: str, component: str) -> None:
    """Stored weights lie within half a step; smaller groups are nearer; biases stay."""
    errors = []
    before = outputs(cached(name), component, prompt(name))
    for group_size in (32, 64):
        errors.append(0.0)
        program = cached(name)
        floats = dict(program.weights)
        report, pass_ = rtn(program, component=component, group_size=group_size)
        for weight in weights_in(program, component, W4A16_LINEAR):
            stem = weight.removesuffix(".weight")
            parts = [program.weights[f"{stem}.{p}"] for p in ("qweight", "scales", "zero_points")]
            off = (dequantize(*parts, group_size) - floats[weight]).abs()
            assert (off <= 0.501 * parts[1].repeat_interleave(group_size, 1)).all()
            errors[-1] += float(off.square().mean())
        kept = [n for n in floats if n.endswith(".bias") and n in program.weights]
        assert all(program.weights[n] is floats[n] for n in kept)
        assert 0.01 < relative_error(outputs(program, component, prompt(name)), before) < 0.7
        assert report.notes == {
            "groups": len(pass_._groups),
            "folded_scales": 0,
            "folded_into": {},
            "explicit_scales": 0,
            "unscaled_groups": len(pass_._groups),
        }
    assert 0 < errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("component", PARTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_awq_is_below_rounding_in_every_group(name: str, component: str, tmp_path: Path) -> None:
    program = cached(name)
    report, pass_ = awq(program, name, tmp_path, component=component)
    notes = report.notes
    assert notes["calibration_samples"] == SAMPLES
    assert notes["groups"] == len(pass_._groups) == len(notes["output_error"])
    counted = notes["folded_scales"] + notes["explicit_scales"] + notes["unscaled_groups"]
    assert counted == notes["groups"]
    assert notes["folded_scales"] == sum(notes["folded_into"].values()) > 0
    for found in notes["output_error"].values():
        assert 0 <= found["awq"] <= found["rtn"] < 0.1
        assert 0 <= found["clipped"] <= 1
    assert 0 < notes["output_error_awq_over_rtn"] < 0.85
    error = relative_error(
        outputs(program, component, prompt(name)), outputs(cached(name), component, prompt(name))
    )
    assert 0.005 < error < 0.4


def test_both_components_in_one_recipe(tmp_path: Path) -> None:
    program = tiny.traced("qwen")
    passes = tiny.make_passes(
        "insert_kv_cache",
        *(
            ("quantize_linear", {"component": c, "group_size": 32, "calibration": data(tmp_path)})
            for c in ("vision", "language")
        ),
    )
    context = Context(processor=Prompts("qwen"), base=str(tmp_path))
    reports = [r for r in run_passes(program, passes, context) if r.name == "quantize_linear"]
    assert [len(r.matches) for r in reports] == [COUNTS["qwen", c] for c in ("vision", "language")]
    assert rules.count(program, "vision", W4A16_LINEAR) == COUNTS["qwen", "vision"]
    assert rules.count(program, "language", W4A16_LINEAR) == COUNTS["qwen", "language"]
    logits = outputs(program, "language", prompt("qwen"))
    exact = outputs(cached("qwen"), "language", prompt("qwen"))
    assert 0.01 < relative_error(logits, exact) < 0.6


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_same_every_time(method: str, tmp_path: Path) -> None:
    programs = [cached("llava"), cached("llava")]
    for program in programs:
        if method == "rtn":
            rtn(program)
        else:
            awq(program, "llava", tmp_path)
    first, second = (p.weights for p in programs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.build("llava").to(dtype)
    exact = outputs(cached("llava"), "language", prompt("llava"))
    program = trace(model)
    tiny.step(program, "canonicalize", "insert_kv_cache")
    report, _ = awq(program, "llava", tmp_path)
    scales = [w for n, w in program.weights.items() if n.endswith((".scales", ".inverse_scale"))]
    assert {w.dtype for w in scales} == {dtype}
    assert report.notes["output_error_awq_over_rtn"] < 0.85
    assert 0.01 < relative_error(outputs(program, "language", prompt("llava")), exact) < 0.5


# ---- the width


def test_indivisible_widths() -> None:
    program = cached("llava")
    with pytest.raises(PassError) as caught:
        rtn(program, group_size=128)
    said = str(caught.value)
    assert "model.language_model.layers.0.self_attn.q_proj: its width 64 is not divisible" in said
    assert "group_size 128" in said
    assert "ignore" in said
    assert "indivisible: skip" in said
    report, _ = rtn(program, group_size=128, indivisible="skip")
    assert [s.where for s in report.matches] == [
        f"model.language_model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    assert {m.reason: len(m.sites) for m in report.misses} == {
        "its width 64 is not divisible by group_size 128": 12,
        "in ignore": 1,
    }


# ---- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method awq needs calibration"),
        ({"method": "rtn", "calibration": {"path": "x"}}, "calibration is not used by method rtn"),
        ({"method": "rtn", "clip": True}, "clip is not used by method rtn"),
        ({"method": "rtn", "group_size": 16}, "group_size"),
        ({"calibration": {"path": "x", "samples": 0}}, "samples"),
        ({"calibration": {"path": "x", "seed": 1}}, "seed"),
        ({"method": "gptq"}, "method"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeLinearConfig(**options)


def refusal(program: Program, context: Context, **options: Any) -> str:
    """The one line; and the program is as it was."""
    before = fingerprint(program)
    with pytest.raises(PassError) as caught:
        quantize(program, context, **{"group_size": 32, **options})
    assert fingerprint(program) == before
    assert caught.value.index == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    plain = Context(processor=Prompts("llava"), base=str(tmp_path))
    program = cached("llava")
    rtn_options = {"method": "rtn"}
    assert "names no linear of the vision component" in refusal(
        program, plain, **rtn_options, component="vision", ignore=("lm_head",)
    )
    assert "'proj' names no linear of the language component" in refusal(
        program, plain, **rtn_options, ignore=("down_proj", "proj")
    )
    assert "list insert_kv_cache before it" in refusal(tiny.traced("llava"), plain, **rtn_options)
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    said = refusal(program, plain, **rtn_options, ignore=(*everything, "lm_head"))
    assert "quantize_linear matches nothing (15 × in ignore)" in said
    assert "gone.jsonl: no such calibration file" in refusal(
        program, plain, calibration={"path": "gone.jsonl"}
    )
    six = data(tmp_path)
    said = refusal(program, plain, calibration={**six, "samples": 7})
    assert "calibration.samples is 7" in said
    assert "holds 6 conversations" in said
    (tmp_path / "data.jsonl").write_text('{"messages": 1}\n')
    assert "data.jsonl:1: want" in refusal(program, plain, calibration=six)
    report, _ = rtn(program)
    assert len(report.matches) == 14
    assert "the 14 language linears are in 4 bits already" in refusal(program, plain, **rtn_options)


def test_fewer_conversations_than_the_default_stand_in_the_report(tmp_path: Path) -> None:
    report, _ = awq(cached("llava"), "llava", tmp_path, calibration=data(tmp_path, range(2)))
    assert report.notes["calibration_samples"] == 2
    assert report.options["calibration"]["samples"] == 32


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_broken_weights_are_named(method: str, tmp_path: Path) -> None:
    program = cached("llava")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    program.weights[name] = program.weights[name].clone()
    program.weights[name][3, 4] = float("nan")
    context = Context(processor=Prompts("llava"), base=str(tmp_path))
    options = {"method": "rtn"} if method == "rtn" else {"calibration": data(tmp_path)}
    said = refusal(program, context, **options)
    assert "model.language_model.layers.1.mlp" in said
    assert "inf or NaN" in said


@pytest.mark.parametrize("fails_at", [1, 9])
def test_roll_back(fails_at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A failure in the middle of rewriting leaves graphs, weights and outputs as they were."""
    program = cached("llava")
    exact = outputs(program, "language", prompt("llava"))
    before, held = fingerprint(program), {n: w.clone() for n, w in program.weights.items()}
    replace, calls = quantize_linear.QuantizeLinear._replace, []

    def failing(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("on purpose")
        replace(self, *arguments)

    monkeypatch.setattr(quantize_linear.QuantizeLinear, "_replace", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        awq(program, "llava", tmp_path)
    assert len(calls) == fails_at
    assert fingerprint(program) == before
    assert all(torch.equal(program.weights[n], w) for n, w in held.items())
    assert torch.equal(outputs(program, "language", prompt("llava")), exact)


# ---- planning and progress


@pytest.mark.parametrize("name, component", [("llava", "language"), ("qwen", "vision")])
def test_dry_run_without_weights(name: str, component: str) -> None:
    """The same matches, misses and bytes as with weights; calibration is not looked at."""
    program = trace(tiny.build(name, device="meta"))
    tiny.step(program, "canonicalize", "insert_kv_cache")
    options = {"component": component, "group_size": 32}
    planned, _ = quantize(program, Context(dry=True), **options, calibration={"path": "gone"})
    assert all(w.is_meta for w in program.weights.values())
    real, _ = rtn(cached(name), **options)
    assert planned.matches == real.matches
    assert planned.misses == real.misses
    assert planned.bytes_before == real.bytes_before
    assert planned.bytes_after == real.bytes_after


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_progress(method: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    context = Context(
        processor=Prompts("llava"),
        base=str(tmp_path),
        progress=lambda what, done, total: told.append((done, total)),
    )
    options = {"method": "rtn"} if method == "rtn" else {"calibration": data(tmp_path)}
    quantize(cached("llava"), context, group_size=32, **options)
    assert told == [(i, 8) for i in range(1, 9)]
