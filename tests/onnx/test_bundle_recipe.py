"""What a recipe may say of an ONNX bundle, and what it is refused, at its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevila_compile.manager import steps_for
from sparsevila_compile.recipe import Recipe, RecipeError, load_recipe

RECIPE = """\
version: 1
model: {path: checkpoint, dtype: float32}
passes:
  - insert_kv_cache
  - EXTRA
emit: {format: onnx, path: out/x}
"""


def load(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load_recipe(file)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'r.yaml'}:")


def test_onnx_ends_with_its_own_lowering(tmp_path: Path) -> None:
    text = RECIPE.replace("  - EXTRA\n", "")
    recipe = load(tmp_path, text)
    steps = steps_for(recipe.build(), recipe.lowering())
    assert [p.name for p, _ in steps] == ["canonicalize", "insert_kv_cache", "lower_to_onnx"]
    module = load(tmp_path, text.replace("format: onnx", "format: module"))
    assert [p.name for p, _ in steps_for(module.build(), module.lowering())][-1] == "lower_ops"


def test_options_reach_the_lowering(tmp_path: Path) -> None:
    text = RECIPE.replace("  - EXTRA\n", "").replace("out/x", "out/x, dtype: float16, pure: true")
    config = load(tmp_path, text).lowering().config
    assert (config.dtype, config.pure) == ("float16", True)
    assert load(tmp_path, text).resolved()["emit"]["pure"] is True


@pytest.mark.parametrize(
    "listed, place, message",
    [
        ("fp8_prefill", "5:5 passes[1].fp8_prefill: ", "no float8 linear; remove the pass"),
        ("lower_ops", "5:5 passes[1].lower_ops: ", "binds kernels of this package"),
        (
            "quantize_linear: {scheme: fp8}",
            "5:23 passes[1].quantize_linear.scheme: ",
            "no float8 linear; take w8a8 or w4a16",
        ),
    ],
)
def test_what_onnx_cannot_hold(tmp_path: Path, listed: str, place: str, message: str) -> None:
    said = refusal(tmp_path, RECIPE.replace("EXTRA", listed))
    assert said.startswith(place)
    assert message in said
    assert "emit.format: module" in said
    module = RECIPE.replace("EXTRA", listed).replace("format: onnx", "format: module")
    load(tmp_path, module)  # the same passes are fine there


@pytest.mark.parametrize("option", ["pure: true", "dtype: float16", "int8_activations: true"])
def test_options_of_onnx_without_it(tmp_path: Path, option: str) -> None:
    text = RECIPE.replace("  - EXTRA\n", "").replace("format: onnx", f"format: module, {option}")
    key = option.partition(":")[0]
    assert f"emit.{key}: is an option of format: onnx" in refusal(tmp_path, text)


def test_unknown_format_and_dtype(tmp_path: Path) -> None:
    text = RECIPE.replace("  - EXTRA\n", "")
    assert "emit.format: must be" in refusal(tmp_path, text.replace("onnx", "onxx"))
    assert "emit.dtype: must be" in refusal(tmp_path, text.replace("out/x", "out/x, dtype: int8"))


def test_pure_has_no_int8_activations(tmp_path: Path) -> None:
    text = RECIPE.replace("  - EXTRA\n", "")
    asked = text.replace("out/x", "out/x, int8_activations: true")
    assert load(tmp_path, asked).lowering().config.int8_activations
    said = refusal(tmp_path, asked.replace("out/x", "out/x, pure: true"))
    assert "emit.int8_activations: has no op in ai.onnx" in said
