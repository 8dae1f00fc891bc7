"""quantize_linear's 8-bit schemes: what is stored, where SmoothQuant's scales go, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sparsevila_compile import artifact
from sparsevila_compile.errors import UserError
from sparsevila_compile.kernels.w8a8_linear.rounding import dequantize_rows, padded
from sparsevila_compile.manager import fingerprint, run_passes
from sparsevila_compile.ops import W4A16_LINEAR, W8A8_LINEAR
from sparsevila_compile.pass_base import Context, Match, PassError
from sparsevila_compile.passes.quantize_linear import QuantizeLinear, QuantizeLinearConfig
from sparsevila_compile.passes.scale_folding import find_fold, weight_of
from sparsevila_compile.program import Program
from sparsevila_compile.smoothquant import quantize_weight
from sparsevila_compile.trace import trace
from tests import tiny
from tests.kernels.compare import relative_error
from tests.passes import rules
from tests.passes.quantizing import (
    SAMPLES,
    Prompts,
    data,
    fp8,
    outputs,
    prompt,
    quantize,
    rtn,
    smooth,
)
from tests.passes.test_quantize_linear import COUNTS, cached, weights_in

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
CODE = {"w8a8": INT8, "fp8": FLOAT8}
BOTH = [("llava", "language"), ("llava", "vision"), ("qwen", "language"), ("qwen", "vision")]


def rounded(program: Program, scheme: str, **options: Any) -> Any:
    if scheme == "w8a8":
        options["method"] = "rtn"
    return quantize(program, Context(), **{"scheme": scheme, **options})


# ---- what it stores


@pytest.mark.parametrize("scheme", CODE)
@pytest.mark.parametrize("name, component", BOTH)
def test_matches_and_stores(name: str, component: str, scheme: str) -> None:
    program = cached(name)
    floats = dict(program.weights)
    report, _ = rounded(program, scheme, component=component)
    assert len(report.matches) == COUNTS[name, component]
    assert rules.count(program, component, W8A8_LINEAR) == COUNTS[name, component]
    gone = new = 0
    for weight in weights_in(program, component, W8A8_LINEAR):
        stem, exact = weight.removesuffix(".weight"), floats[weight]
        codes, scales = program.weights[f"{stem}.qweight"], program.weights[f"{stem}.scales"]
        rows, width = exact.shape
        assert (codes.dtype, codes.shape) == (CODE[scheme], (rows, padded(width)))
        assert (scales.dtype, scales.shape) == (torch.float32, (rows,))
        off = relative_error(dequantize_rows(codes, scales, width), exact)
        assert 1e-3 < off < (0.015 if scheme == "w8a8" else 0.035)
        assert weight not in program.weights
        gone, new = gone + 4 * exact.numel(), new + codes.numel() + 4 * rows
    assert report.bytes_before - report.bytes_after == gone - new
    before = outputs(cached(name), component, prompt(name))
    error = relative_error(outputs(program, component, prompt(name)), before)
    assert 0.002 < error < (0.15 if scheme == "w8a8" else 0.5)


@pytest.mark.parametrize("scheme", CODE)
@pytest.mark.parametrize("name, component", [("llava", "language"), ("qwen", "vision")])
def test_keeps_the_rules_of_passes(name: str, component: str, scheme: str) -> None:
    options = {"scheme": scheme, "method": "rtn", "component": component}
    rules.check(cached(name), ("quantize_linear", options))


def test_eight_bits_are_nearer_than_four() -> None:
    before = outputs(cached("llava"), "language", prompt("llava"))
    errors = []
    for scheme in ("w4a16", "fp8", "w8a8"):
        program = cached("llava")
        if scheme == "w4a16":
            rtn(program)
        else:
            rounded(program, scheme)
        errors.append(relative_error(outputs(program, "language", prompt("llava")), before))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 4


@pytest.mark.parametrize("scheme", CODE)
def test_widths_off_every_block(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vision tower whose MLP is 108 wide: stored rows are padded to 112, and nothing else."""

    def odd() -> Any:
        config = tiny._qwen()
        config.vision_config.intermediate_size = 108
        return config

    monkeypatch.setitem(tiny.CONFIGS, "qwen_odd", odd)
    program = cached("qwen_odd")
    before = outputs(program, "vision", prompt("qwen_odd"))
    report, _ = rounded(program, scheme, component="vision")
    assert len(report.matches) == COUNTS["qwen", "vision"]
    down = [w for n, w in program.weights.items() if n.endswith("down_proj.qweight")]
    assert {tuple(w.shape) for w in down} == {(64, 112)}
    assert not any(w[:, 108:].float().any() for w in down)
    up = [w for n, w in program.weights.items() if n.endswith("up_proj.qweight")]
    assert {tuple(w.shape) for w in up} == {(108, 64)}
    error = relative_error(outputs(program, "vision", prompt("qwen_odd")), before)
    assert 0.002 < error < (0.15 if scheme == "w8a8" else 0.5)


@pytest.mark.parametrize("scheme", CODE)
def test_artifact_keeps_every_bit(scheme: str, tmp_path: Path) -> None:
    program = cached("llava")
    rounded(program, scheme, component="vision")
    rounded(program, scheme)
    tiny.step(program, "lower_ops")
    exact = outputs(program, "language", prompt("llava"))
    settings = tiny.model("llava").generation_config
    recipe = {"version": 1, "passes": ["insert_kv_cache"]}
    artifact.save(
        program, tiny.processor(), [], path=tmp_path / "made", recipe=recipe,
        generation_config=settings,
    )  # fmt: skip
    again = artifact.load_program(tmp_path / "made")
    assert {n: w.dtype for n, w in again.weights.items()} == {
        n: w.dtype for n, w in program.weights.items()
    }
    assert torch.equal(outputs(again, "language", prompt("llava")), exact)
    bound = {n.kwargs["impl"] for c in again.components.values() for n in c.graph.nodes
             if n.target is W8A8_LINEAR}  # fmt: skip
    assert bound == {"library" if scheme == "w8a8" else "reference"}


# ---- SmoothQuant


def with_outliers(program: Program, component: str, by: float) -> None:
    """Two channels of every norm ``by`` times larger, and its linears' columns as much smaller:
    the outputs stay what they are."""
    pass_ = QuantizeLinear(QuantizeLinearConfig(scheme="fp8", component=component))
    matches = [m.node for m in pass_.match(program) if isinstance(m, Match)]
    groups: dict[str, list[str]] = {}
    for node in matches:
        groups.setdefault(str(node.args[0]), []).append(str(weight_of(node)))
    assert groups
    for names in groups.values():
        fold = find_fold(list(program.components.values()), names)
        if fold is None or fold.kind != "norm":
            continue
        for name in (fold.weight, fold.bias):
            if name is not None:
                program.weights[name] = program.weights[name].clone()
                program.weights[name][3:5] *= by
        for name in names:
            program.weights[name] = program.weights[name].clone()
            program.weights[name][:, 3:5] /= by


@pytest.mark.parametrize("name, component", BOTH)
def test_smoothing_saves_what_outliers_cost(name: str, component: str, tmp_path: Path) -> None:
    program = cached(name)
    exact = outputs(program, component, prompt(name))
    with_outliers(program, component, 30.0)
    assert relative_error(outputs(program, component, prompt(name)), exact) < 1e-4
    plain = program.snapshot()
    rounded(plain, "w8a8", component=component)
    report, pass_ = smooth(program, name, tmp_path, component=component)
    errors = [relative_error(outputs(p, component, prompt(name)), exact) for p in (plain, program)]
    print(name, component, errors, {k: v for k, v in report.notes.items() if k != "output_error"})
    assert errors[1] < errors[0] / 1.5
    assert 0.002 < errors[1] < 0.2
    notes = report.notes
    assert notes["calibration_samples"] == SAMPLES
    assert notes["groups"] == len(pass_._groups) == len(notes["output_error"])
    assert notes["folded_scales"] == sum(notes["folded_into"].values()) > 0
    assert notes["folded_into"]["norm"] > 0
    assert notes["explicit_scales"] == 0
    assert notes["unscaled_groups"] == sum(notes["unscaled_because"].values())
    assert notes["folded_scales"] + notes["unscaled_groups"] == notes["groups"]
    assert not any(n.endswith(".inverse_scale") for n in program.weights)
    for found in notes["output_error"].values():
        assert 0 < found["smoothquant"] <= found["rtn"] < 0.1
    assert 0 < notes["output_error_smoothquant_over_rtn"] < 0.8


def test_what_folds_nowhere_stays_as_it_is(tmp_path: Path) -> None:
    """With GQA, o_proj has no op before it that could take its scale: the report says so."""
    program = cached("llava")
    report, pass_ = smooth(program, "llava", tmp_path)
    nowhere = [g for g in pass_._groups if g.found and g.found.reason == "nowhere to fold"]
    assert [g.names[0].rpartition(".self_attn.")[2] for g in nowhere] == ["o_proj.weight"] * 2
    assert report.notes["unscaled_because"]["nowhere to fold"] == 2
    for group in nowhere:
        assert group.fold is None
        assert group.scale is None
        stem = group.names[0].removesuffix(".weight")
        codes, scales = quantize_weight(cached("llava").weights[group.names[0]], INT8)
        assert torch.equal(program.weights[f"{stem}.qweight"], codes)
        assert torch.equal(program.weights[f"{stem}.scales"], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.build("llava").to(dtype)
    exact = outputs(cached("llava"), "language", prompt("llava"))
    program = trace(model)
    tiny.step(program, "canonicalize", "insert_kv_cache")
    report, _ = smooth(program, "llava", tmp_path)
    assert report.notes["folded_scales"] > 0
    assert {w.dtype for n, w in program.weights.items() if n.endswith(".scales")} == {torch.float32}
    error = relative_error(outputs(program, "language", prompt("llava")), exact)
    assert 0.005 < error < 0.2


def test_same_every_time(tmp_path: Path) -> None:
    first, second = cached("llava"), cached("llava")
    for program in (first, second):
        smooth(program, "llava", tmp_path)
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[n], w) for n, w in second.weights.items())


# ---- two schemes in one recipe


@pytest.mark.parametrize("scheme", CODE)
def test_vision_in_eight_bits_and_language_in_four(scheme: str, tmp_path: Path) -> None:
    program = tiny.traced("qwen")
    calibration = data(tmp_path)
    vision: dict[str, Any] = {"component": "vision", "scheme": scheme}
    if scheme == "w8a8":
        vision["calibration"] = calibration
    passes = tiny.make_passes(
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 0.5}),
        ("quantize_linear", vision),
        ("quantize_linear", {"group_size": 32, "calibration": calibration}),
    )
    context = Context(processor=Prompts("qwen"), base=str(tmp_path))
    reports = [r for r in run_passes(program, passes, context) if r.name == "quantize_linear"]
    assert [r.options["scheme"] for r in reports] == [scheme, "w4a16"]
    assert [len(r.matches) for r in reports] == [COUNTS["qwen", c] for c in ("vision", "language")]
    assert rules.count(program, "vision", W8A8_LINEAR) == COUNTS["qwen", "vision"]
    assert rules.count(program, "vision", W4A16_LINEAR) == 0
    for part in ("language", "turn", "decode"):
        assert rules.count(program, part, W4A16_LINEAR) == COUNTS["qwen", "language"]
        assert rules.count(program, part, W8A8_LINEAR) == 0
    exact = outputs(cached("qwen"), "language", prompt("qwen"))
    assert 0.01 < relative_error(outputs(program, "language", prompt("qwen")), exact) < 0.6


# ---- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w8a8"}, "method smoothquant needs calibration.*or set method: rtn"),
        ({"scheme": "w8a8", "method": "awq"}, "awq is not one of scheme w8a8; set method: smoothq"),
        (
            {"scheme": "w4a16", "method": "smoothquant"},
            "is not one of scheme w4a16; set method: awq",
        ),
        ({"scheme": "fp8", "method": "smoothquant"}, "is not one of scheme fp8; set method: rtn"),
        (
            {"scheme": "fp8", "calibration": {"path": "x"}},
            "is not used by method rtn; remove it .type",
        ),
        (
            {"scheme": "w8a8", "method": "rtn", "alpha": 0.5},
            "alpha is not used by .* smoothquant .type",
        ),
        ({"scheme": "w8a8", "calibration": {"path": "x"}, "clip": True}, "clip is not used by"),
        ({"calibration": {"path": "x"}, "alpha": 0.5}, "alpha is not used by method awq"),
        ({"scheme": "fp8", "group_size": 64}, "group_size is not used by scheme fp8; remove it"),
        ({"scheme": "fp8", "indivisible": "skip"}, "indivisible is not used by scheme fp8"),
        ({"scheme": "w8a8", "calibration": {"path": "x"}, "alpha": 1.5}, "alpha"),
        ({"scheme": "int8"}, "scheme"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeLinearConfig(**options)


def test_float8_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = cached("llava")
    program.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    pass_ = QuantizeLinear(QuantizeLinearConfig(scheme="fp8"))
    with pytest.raises(UserError) as caught:
        pass_.requires(program)
    assert str(caught.value) == (
        "scheme: fp8 needs a GPU of compute capability 8.9 or later, this one has 8.0; "
        "use scheme: w8a8"
    )
    QuantizeLinear(QuantizeLinearConfig(scheme="w8a8", method="rtn")).requires(program)


def test_refusals(tmp_path: Path) -> None:
    plain = Context(processor=Prompts("llava"), base=str(tmp_path))
    program = cached("llava")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    program.weights[name] = program.weights[name].clone()
    program.weights[name][3, 4] = float("nan")
    for options in (
        {"scheme": "fp8"},
        {"scheme": "w8a8", "method": "rtn"},
        {"scheme": "w8a8", "calibration": data(tmp_path)},
    ):
        with pytest.raises(PassError) as caught:
            quantize(program, plain, **options)
        assert "model.language_model.layers.1.mlp" in str(caught.value)
        assert "inf or NaN" in str(caught.value)
        assert "\n" not in str(caught.value)
    again = cached("llava")
    fp8(again)
    before = fingerprint(again)
    with pytest.raises(PassError, match="matches nothing"):
        fp8(again)
    assert fingerprint(again) == before


# ---- planning


@pytest.mark.parametrize("scheme", CODE)
def test_dry_run_without_weights(scheme: str) -> None:
    """The same matches and bytes as with weights; calibration is not looked at."""
    program = trace(tiny.build("qwen", device="meta"))
    tiny.step(program, "canonicalize", "insert_kv_cache")
    options: dict[str, Any] = {"component": "vision", "scheme": scheme}
    extra = {"calibration": {"path": "gone"}} if scheme == "w8a8" else {}
    planned, _ = quantize(program, Context(dry=True), **options, **extra)
    assert all(w.is_meta for w in program.weights.values())
    real, _ = rounded(cached("qwen"), scheme, component="vision")
    assert planned.matches == real.matches
    assert planned.bytes_before == real.bytes_before
    assert planned.bytes_after == real.bytes_after
