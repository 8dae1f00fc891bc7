"""Checkpoints that AWQ tools have quantized, from the file to tokens, against transformers' model of
the weights that the codes stand for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsevila_compile
from sparsevila_compile import cli, hf
from sparsevila_compile.compiler import Compiled, compile_recipe, trace_empty
from sparsevila_compile.errors import UserError
from sparsevila_compile.kernels.awq_linear.layout import repack
from sparsevila_compile.kernels.w4a16_linear.packing import unpack_int4
from sparsevila_compile.manager import run_passes
from sparsevila_compile.ops import AWQ_LINEAR, W4A16_LINEAR
from sparsevila_compile.pass_base import Context, calls
from sparsevila_compile.planning import explain, plan
from sparsevila_compile.program import Program
from sparsevila_compile.recipe import Recipe, recipe_from_dict
from sparsevila_compile.trace import trace
from tests import awq_checkpoint, tiny
from tests.passes.quantizing import outputs
from tests.tiny import Image, Video, words

NEW = 24
BOUND = 1e-5
"""Of logits, relative to the largest. Both sides sum in float32, in another order: compiled from
dense weights the tiny Qwen is off by 2.2e-6, and with scales in bfloat16 these models by 2.5e-2."""

ROWS: dict[str, list[tiny.Row]] = {
    "llava": [[*words(3), Image(1), *words(8, 1)], [Image(2), Image(3), *words(5, 4)]],
    "qwen": [
        [*words(3), Image(1), *words(8, 1)],
        [Image(1), *words(2), Video(2, (2, 6, 4), 0.5), *words(4, 2)],
    ],
}
MERGED: tuple[tiny.Spec, ...] = (
    *tiny.FULL,
    "fuse_rms_norm",
    "fuse_rotary",
    "fuse_silu_mul",
    "merge_linears",
    "trim_last_layer",
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each kind, written once."""

    @cache
    def write(name: str) -> Path:
        return awq_checkpoint.write(tmp_path_factory.mktemp(name), name)

    return write


def recipe(checkpoint: Path, *specs: tiny.Spec, folder: Path | None = None, **emit: Any) -> Recipe:
    passes = [s if isinstance(s, str) else {s[0]: s[1]} for s in specs]
    return recipe_from_dict(
        {
            "version": 1,
            "model": {"path": str(checkpoint), "device": "cpu"},
            "passes": passes,
            "emit": {"path": "out", **emit},
        },
        directory=folder or checkpoint,
        file="r.yaml",
    )


def compiled(checkpoint: Path, folder: Path, *specs: tiny.Spec, **emit: Any) -> Compiled:
    return compile_recipe(recipe(checkpoint, *specs, folder=folder, **emit))


def answers(model: Any, name: str) -> list[list[int]]:
    """Greedy answers, every row asked alone."""
    found = []
    for row in ROWS[name]:
        prompt = tiny.inputs(name, [row])
        found += tiny.answers_of(prompt, model.generate(**prompt, **tiny.greedy(NEW)))
    return found


@cache
def expected(name: str) -> list[list[int]]:
    found = answers(awq_checkpoint.reference(name), name)
    assert all(len(set(answer)) > 4 for answer in found), "answers that a broken model gives too"
    return found


def logit_error(program: Program, name: str) -> float:
    """The largest difference over all positions, relative to the largest logit."""
    prompt = tiny.inputs(name, ROWS[name][:1])
    theirs = awq_checkpoint.reference(name)(**prompt).logits
    return float((outputs(program, "language", prompt) - theirs).abs().max() / theirs.abs().max())


# ---------------------------------------------------------------------- codes


def test_codes_are_taken_over_bit_by_bit() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (96, 40), generator=g)
    codes[:8] = 15  # the sign bit of every word
    zeros = torch.randint(0, 16, (3, 40), generator=g)
    scales = torch.randn(3, 40, generator=g).half()
    linear = awq_checkpoint.Packed(codes, zeros, scales)
    stored = linear.tensors()
    qweight, kept, zero_points = repack(stored["qweight"], stored["qzeros"], stored["scales"], 32)
    assert torch.equal(unpack_int4(qweight).long(), codes.t())
    assert torch.equal(zero_points.long(), zeros.t())
    assert kept.dtype == torch.float16
    assert torch.equal(kept, scales.t())
    x = torch.randn(2, 3, 96, generator=g)
    out = AWQ_LINEAR(x, *stored.values(), None, 32)
    assert torch.equal(out, torch.nn.functional.linear(x, linear.weight()))


BROKEN: dict[str, dict[str, Any]] = {
    "group_size": {"group_size": 48},
    "K = 48": {"qweight": torch.zeros(48, 2, dtype=torch.int32)},
    "int32 [K, N // 8]": {"qweight": torch.zeros(64, 2, dtype=torch.int64)},
    "qzeros": {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
    "scales": {"scales": torch.zeros(2, 16, dtype=torch.int32)},
}


@pytest.mark.parametrize("said", BROKEN)
def test_the_layout_is_checked(said: str) -> None:
    whole = {
        "qweight": torch.zeros(64, 2, dtype=torch.int32),
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.zeros(2, 16),
        "group_size": 32,
    }
    repack(**whole)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as caught:
        repack(**(whole | BROKEN[said]))
    assert said in str(caught.value)


# ---------------------------------------------------------------------- artifacts


@pytest.mark.slow
@pytest.mark.parametrize("specs", [tiny.FULL, MERGED], ids=["plain", "merged"])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_an_artifact_answers_as_the_dequantized_model(
    name: str, specs: tuple[tiny.Spec, ...], made: Callable[[str], Path], tmp_path: Path
) -> None:
    result = compiled(made(name), tmp_path, *specs)
    report = next(r for r in result.reports if r.name == "repack_awq")
    assert (report.index, len(report.matches), report.notes) == (
        None,
        14,
        {"group_sizes": {32: 14}},
    )
    model = sparsevila_compile.load(result.path)
    assert answers(model, name) == expected(name)
    assert logit_error(result.program, name) < BOUND
    kept = result.program.weights["model.language_model.layers.0.mlp.down_proj.scales"]
    assert kept.dtype == torch.float16
    assert torch.equal(
        kept.t(), awq_checkpoint.packed(name)["model.language_model.layers.0.mlp.down_proj"].scales
    )
    dense = {n for n in result.program.weights if "language_model.layers" in n}
    assert not [n for n in dense if n.endswith("proj.weight")], "a floating-point copy was kept"
    assert "quantization_config" not in json.loads((result.path / "config.json").read_text())


@pytest.mark.slow
def test_sparse_answers_are_those_of_the_dequantized_model(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    sparse: tuple[tiny.Spec, ...] = (
        ("prune_visual_tokens", {"keep_ratio": 0.5}),
        "insert_kv_cache",
        ("sparsify_decode_attention", {"keep_ratio": 0.25, "when": "always"}),
    )
    mine = sparsevila_compile.load(compiled(made("qwen"), tmp_path, *sparse).path)
    plain = trace(awq_checkpoint.reference("qwen"))
    tiny.run(plain, *sparse)
    settings = awq_checkpoint.reference("qwen").generation_config
    theirs = sparsevila_compile.model.CompiledModel(plain, tiny.processor(), settings)
    found = answers(theirs, "qwen")
    assert found != expected("qwen"), "nothing was sparse"
    assert answers(mine, "qwen") == found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen"])
@pytest.mark.parametrize("kind", ["new names", "two files"])
def test_names_and_files(name: str, kind: str, tmp_path: Path) -> None:
    folder = awq_checkpoint.write(tmp_path, name, published=kind != "new names")
    if kind == "two files":
        awq_checkpoint.split(folder)
    model = hf.load_model(str(folder), dtype=None, device=torch.device("cpu"))
    prompt = tiny.inputs(name, ROWS[name][:1])
    theirs = awq_checkpoint.reference(name)(**prompt).logits
    assert float((model(**prompt).logits - theirs).abs().max() / theirs.abs().max()) < BOUND
    assert len(_repacked(trace_empty(recipe(folder, *tiny.FULL)))) == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_their_dtype(dtype: torch.dtype, made: Callable[[str], Path]) -> None:
    model = hf.load_model(str(made("llava")), dtype=dtype, device=torch.device("cpu"))
    program = trace(model)
    tiny.run(program, *MERGED)
    assert program.dtype == dtype
    scales = {w.dtype for n, w in program.weights.items() if n.endswith("scales")}
    assert scales == {torch.float16}
    rounded = copy.deepcopy(awq_checkpoint.reference("llava")).to(dtype)
    prompt = tiny.inputs("llava", ROWS["llava"][:1])
    exact = awq_checkpoint.reference("llava")(**prompt).logits
    prompt["pixel_values"] = prompt["pixel_values"].to(dtype)
    theirs, mine = rounded(**prompt).logits, outputs(program, "language", prompt)
    assert 0 < (mine - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.mark.slow
def test_what_is_left_in_floating_point_stays_so(tmp_path: Path) -> None:
    """The tensors say what is quantized, and quantize_linear may do the rest."""
    folder = awq_checkpoint.write(
        tmp_path / "c", skip=lambda path: "down_proj" in path or "layers.1" in path
    )
    result = compiled(folder, tmp_path, *tiny.FULL)
    assert [len(r.matches) for r in result.reports if r.name == "repack_awq"] == [6]
    assert answers(sparsevila_compile.load(result.path), "llava") == expected("llava")
    rest = ("quantize_linear", {"method": "rtn", "group_size": 64})
    more = compiled(folder, tmp_path, *tiny.FULL, rest, overwrite=True)
    report = next(r for r in more.reports if r.name == "quantize_linear")
    assert len(report.matches) == 8
    assert ("in 4 bits already", 6) in [(m.reason, len(m.sites)) for m in report.misses]


@pytest.mark.slow
def test_graphs_are_those_of_quantize_linear(made: Callable[[str], Path]) -> None:
    """All later passes see what ``quantize_linear`` leaves, so what holds of it holds here."""
    theirs = tiny.traced("qwen")
    rtn = ("quantize_linear", {"method": "rtn", "group_size": 32})
    tiny.run(theirs, *tiny.FULL, rtn, *MERGED[3:], ("fp8_prefill", {"min_rows": 9}))
    mine = trace(hf.load_model(str(made("qwen")), dtype=None, device=torch.device("cpu")))
    tiny.run(mine, *MERGED, ("fp8_prefill", {"min_rows": 9}))
    assert _calls(mine) == _calls(theirs)
    assert {n: tuple(w.shape) for n, w in mine.weights.items()} == {
        n: tuple(w.shape) for n, w in theirs.weights.items()
    }


def _calls(program: Program) -> list[tuple[str, ...]]:
    """What is called with which weights, in order; node names may differ."""
    return [
        (
            name,
            str(node.target),
            *(str(a.target) for a in node.all_input_nodes if a.op == "get_attr"),
        )
        for name, component in sorted(program.components.items())
        for node in component.graph.nodes
        if node.op == "call_function"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_bundle_answers_as_the_dequantized_model(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    specs = [s if s != "insert_kv_cache" else (s, {"max_length": 200}) for s in MERGED]
    result = compiled(made(name), tmp_path, *specs, format="onnx")
    emitted = result.reports[-1].notes["emitted"]
    assert "MatMulNBits" in emitted
    assert answers(sparsevila_compile.load(result.path), name) == expected(name)


# ---------------------------------------------------------------------- with other passes


def test_the_vision_tower_can_be_quantized_too(made: Callable[[str], Path], tmp_path: Path) -> None:
    vision = (
        "quantize_linear",
        {"component": "vision", "method": "rtn", "group_size": 32, "ignore": []},
    )
    result = compiled(made("llava"), tmp_path, *tiny.FULL, vision)
    assert {r.name: len(r.matches) for r in result.reports}["quantize_linear"] > 10
    for name in ("vision", "language"):
        assert any(calls(result.program, name, W4A16_LINEAR))


@pytest.mark.slow
def test_language_linears_are_not_quantized_twice(made: Callable[[str], Path]) -> None:
    twice = ("quantize_linear", {"method": "rtn"})
    mine = recipe(made("llava"), *tiny.FULL, twice)
    with pytest.raises(UserError) as caught:
        compile_recipe(mine)
    said = str(caught.value)
    assert said.startswith("r.yaml:")
    assert "passes[3].quantize_linear" in said
    assert "the 14 language linears are in 4 bits already" in said
    assert "remove this one" in said
    assert "\n" not in said
    steps = {s.pass_.name: s for s in plan(mine)}
    assert steps["quantize_linear"].error is not None
    assert steps["repack_awq"].error is None
    optional = ("quantize_linear", {"method": "rtn", "optional": True})
    assert not [s.error for s in plan(recipe(made("llava"), *tiny.FULL, optional)) if s.error]


def _repacked(program: Program) -> list[str]:
    reports = run_passes(program, tiny.make_passes(*tiny.FULL), Context(dry=True))
    return [site.where for r in reports if r.name == "repack_awq" for site in r.matches]


@pytest.mark.slow
def test_plan_and_explain_show_it_without_weights(made: Callable[[str], Path]) -> None:
    mine = recipe(made("llava"), *MERGED)
    steps = {s.pass_.name: s for s in plan(mine)}
    report = steps["repack_awq"].report
    assert report is not None
    assert sorted(s.where for s in report.matches) == sorted(awq_checkpoint.packed("llava"))
    assert steps["merge_linears"].report.matches  # type: ignore[union-attr]
    assert not [s.error for s in steps.values() if s.error]
    (nodes,) = explain(mine, "repack_awq")
    assert len(nodes) == 14
    assert {n.becomes for n in nodes} == {"w4a16_linear, group_size 32"}


@pytest.mark.parametrize("skipped, count", [(None, 14), (["down_proj"], 12)])
def test_plan_without_files_goes_by_the_tools_rule(
    skipped: list[str] | None, count: int, tmp_path: Path
) -> None:
    """As for a hub id: config.json is all there is."""
    awq_checkpoint.write(tmp_path, config={"modules_to_not_convert": skipped})
    (tmp_path / "model.safetensors").unlink()
    assert len(_repacked(trace_empty(recipe(tmp_path, *tiny.FULL)))) == count


# ---------------------------------------------------------------------- refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    "bitsandbytes": ({"quant_method": ..., "load_in_4bit": True}, "'bitsandbytes'"),
    "fp8": ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
    "gemv": ({"version": "gemv"}, "version is 'gemv'"),
    "gemv_fast": ({"version": "GEMV_FAST"}, "version is 'gemv_fast'"),
    "exllama": ({"version": "exllama"}, "version is 'exllama'"),
    "format": ({"version": ..., "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "llm-awq": ({"backend": "llm-awq"}, "backend is 'llm-awq'"),
    "bits": ({"bits": 8}, "bits is 8"),
    "one group": ({"group_size": -1}, "group_size is -1; kernels take 32, 64, 128"),
    "symmetric": ({"zero_point": False}, "zero_point is False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_quantizations_are_refused(
    case: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    config, said = REFUSED[case]
    file = made("llava") / "config.json"
    settings = json.loads(file.read_text())
    given = awq_checkpoint.CONFIG | config
    settings["quantization_config"] = {k: v for k, v in given.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for refuses in (compile_recipe, plan):
        with pytest.raises(UserError) as caught:
            refuses(recipe(tmp_path, *tiny.FULL))
        text = str(caught.value)
        assert text.startswith("r.yaml:")
        assert "model.path" in text
        assert said in text
        assert "config.json" in text
        assert "\n" not in text


Tensors = dict[str, torch.Tensor]
AT = "language_model.model.layers.1.mlp.up_proj"


def _without(part: str) -> Callable[[Tensors], None]:
    def change(held: Tensors) -> None:
        del held[f"{AT}.{part}"]

    return change


def _with(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(held: Tensors) -> None:
        held[f"{AT}.{part}"] = make(held[f"{AT}.{part}"])

    return change


def _moved(held: Tensors) -> None:
    held["language_model.model.layers.9.mlp.up_proj.qweight"] = held[f"{AT}.qweight"].clone()


def _doubled(held: Tensors) -> None:
    held[f"{AT}.weight"] = torch.zeros(128, 64)


def _none(held: Tensors) -> None:
    for name in [n for n in held if n.endswith(("qweight", "qzeros", "scales"))]:
        del held[name]


DAMAGED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no zero points": (_without("qzeros"), f"has {AT}.qweight, but no {AT}.qzeros"),
    "no codes": (_without("qweight"), f"but no {AT}.qweight"),
    "half the codes": (_with("qweight", lambda t: t[:32]), "is I32 [32, 16], not int32 [64, 16]"),
    "groups of 64": (_with("scales", lambda t: t[:1]), "is F16 [1, 128], not float16 [2, 128]"),
    "integer scales": (_with("scales", lambda t: t.int()), "scales is I32 [2, 128], not float16"),
    "bytes": (_with("qweight", lambda t: t.view(torch.uint8)), "is U8 [64, 64], not int32"),
    "another layer": (_moved, "layers.9.mlp.up_proj.qweight belongs to no linear"),
    "stored twice": (_doubled, f"has both {AT}.qweight and {AT}.weight"),
    "infinite scales": (_with("scales", lambda t: t / 0), "holds inf or NaN"),
    "not quantized": (_none, "holds no qweight"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoints_are_refused(case: str, tmp_path: Path) -> None:
    change, said = DAMAGED[case]
    folder = awq_checkpoint.write(tmp_path / "c", change=change)
    with pytest.raises(UserError) as caught:
        compiled(folder, tmp_path, *tiny.FULL)
    text = str(caught.value)
    assert text.startswith("r.yaml:")
    assert said in text
    assert "\n" not in text
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = awq_checkpoint.write(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for refuses in (compile_recipe, plan):
        with pytest.raises(UserError, match=r"model\.safetensors: damaged") as caught:
            refuses(recipe(folder, *tiny.FULL))
        assert "\n" not in str(caught.value)


def test_pickled_codes_are_not_read(tmp_path: Path) -> None:
    folder = awq_checkpoint.write(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        compile_recipe(recipe(folder, *tiny.FULL))


def test_nibbles_in_another_order_are_seen(tmp_path: Path) -> None:
    """The tests above can fail: another order of codes gives another model."""
    folder = awq_checkpoint.write(tmp_path / "c", places=[0, 4, 1, 5, 2, 6, 3, 7])
    result = compiled(folder, tmp_path, *tiny.FULL)
    assert logit_error(result.program, "llava") > 0.1


# ---------------------------------------------------------------------- the command


@pytest.fixture
def work(made: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> Path:
    lines = [
        "version: 1",
        f"model: {{path: {made('llava')}, device: cpu}}",
        "passes:",
        "  - insert_kv_cache",
        "  - merge_linears",
        "emit: {path: out}",
    ]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_command_says_what_it_took_over(work: Path, capsys: Any) -> None:
    assert cli.main(["compile", "r.yaml", "--no-ask", "--no-progress"]) == 0
    said = capsys.readouterr()
    assert "[3/9] trace" in said.err
    assert "repack_awq: 14 matches, 0 misses" in said.err
    assert "[9/9] write" in said.err
    assert "repack_awq" in said.out
    assert cli.main(["plan", "r.yaml"]) == 0
    said = capsys.readouterr()
    assert "1. repack_awq (stage canonicalize, added by the compiler): 14 matches" in said.out
    text = (work / "r.yaml").read_text()
    (work / "r.yaml").write_text(text.replace("merge_linears", "quantize_linear: {method: rtn}"))
    assert cli.run(["compile", "r.yaml", "--no-ask", "--output", "other"]) == 2
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("r.yaml:")]
    assert line.startswith("r.yaml:5:5 passes[1].quantize_linear: ")
    assert "in 4 bits already" in line
