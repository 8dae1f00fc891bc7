"""Options, and what the backend says where it cannot do what a recipe asks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevila_compile import dynamo
from sparsevila_compile.dynamo.backend import sparsevila
from sparsevila_compile.dynamo.backend_report import BackendWarning
from sparsevila_compile.dynamo.settings import DEFAULT_PASSES, read_settings
from sparsevila_compile.errors import UserError
from sparsevila_compile.recipe import load_recipe
from tests import tiny
from tests.dynamo import models
from tests.tiny import Image, words

ROWS: list[tiny.Row] = [[*words(3), Image(1), *words(8, 1)]]
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"

WRONG: dict[str, tuple[Any, str]] = {
    "unknown": ({"recipes": {}}, r"no option 'recipes', did you mean recipe\?"),
    "no dict": (["recipe"], "must be a dict"),
    "strict": ({"strict": "yes"}, "strict must be True or False"),
    "inner": ({"inner": "onnx"}, "inner must be inductor or eager"),
    "kind": ({"recipe": 3}, "a path, a dict or a Recipe"),
    "file": ({"recipe": "no/such.yaml"}, r"no/such\.yaml"),
    "pass": ({"recipe": {"passes": ["prune"]}}, "there is no pass"),
    "key": ({"recipe": {"passes": [{"insert_kv_cache": {"length": 3}}]}}, "length"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options(kind: str) -> None:
    options, said = WRONG[kind]
    with pytest.raises(UserError, match=said) as error:
        read_settings(options)
    assert "\n" not in str(error.value)


def test_recipes_come_as_path_dict_object_or_not_at_all() -> None:
    assert [p.name for p in read_settings(None).recipe.passes] == [
        p if isinstance(p, str) else next(iter(p)) for p in DEFAULT_PASSES
    ]
    by_path = read_settings({"recipe": str(RECIPE)})
    assert by_path.same(read_settings({"recipe": load_recipe(RECIPE)}))
    assert by_path.unused == ("emit", "ask")
    assert not by_path.same(read_settings({"recipe": RECIPE, "strict": True}))


def test_mistakes_come_out_of_the_call_as_they_are() -> None:
    """Dynamo would wrap what a backend raises while it compiles."""
    model = tiny.build("llava")
    model.compile(backend="sparsevila", options={"recipes": {}})
    with pytest.raises(UserError, match="did you mean recipe"):
        models.ask(model, tiny.inputs("llava", ROWS))
    with pytest.raises(UserError, match="no mode"):
        sparsevila(torch.fx.symbolic_trace(torch.nn.ReLU()), [], mode="max-autotune")()


def test_what_is_no_model_runs_as_it_is() -> None:
    x = torch.arange(4.0)
    options = {"inner": "eager"}
    with pytest.warns(BackendWarning, match="no pass of the recipe applied: .*whole model"):
        doubled = torch.compile(lambda x: 2 * x, backend="sparsevila", options=options)(x)
    assert torch.equal(doubled, 2 * x)
    strict = torch.compile(
        lambda x: 3 * x, backend="sparsevila", options={**options, "strict": True}
    )
    with pytest.raises(UserError, match="not the forward of a module"):
        strict(x)
    with pytest.raises(UserError, match="call generate first"):
        dynamo.report(tiny.model("llava"))


IMPOSSIBLE: tuple[tiny.Spec, ...] = (
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.5, "layers": [7]}),
)


def test_a_pass_that_cannot_be_done_is_left_out_and_named() -> None:
    model = models.compiled("llava", IMPOSSIBLE)
    with pytest.warns(BackendWarning, match=r"sparsify_decode_attention: not applied: .*layers"):
        answers = models.ask(model, tiny.inputs("llava", ROWS))
    assert answers == tiny.dense_rows("llava", ROWS, models.NEW)
    report = dynamo.report(model)
    assert [n.name for n in report.not_done] == ["sparsify_decode_attention"]


def test_another_recipe_for_a_compiled_model_is_refused() -> None:
    model = models.shared("llava", "sparse")
    prompt = tiny.inputs("llava", ROWS)
    models.ask(model, prompt)
    before = model._compiled_call_impl
    model.compile(backend="sparsevila", options={"inner": "eager"})
    try:
        with pytest.raises(UserError, match="another recipe"):
            models.ask(model, prompt)
    finally:
        model._compiled_call_impl = before


# ---------------------------------------------------------------------- last: they reset Dynamo


def ask_broken(model: Any) -> list[list[int]]:
    """Ask a model whose forward breaks into several graphs, as an old setting of Dynamo makes it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        return models.ask(model, tiny.inputs("llava", ROWS), 4)


def test_a_graph_break_is_reported_and_the_model_stays_as_it_was() -> None:
    model = models.compiled("llava", models.SPARSE)
    with pytest.warns(BackendWarning) as warned:
        assert ask_broken(model) == tiny.dense_rows("llava", ROWS, 4)
    said = "\n".join(str(w.message) for w in warned)
    for name in ("prune_visual_tokens", "insert_kv_cache", "sparsify_decode_attention"):
        assert re.search(
            f"{name}: not applied: .*(graph break|whole forward).*capture_scalar", said
        )
    report = dynamo.report(model)
    assert {n.name for n in report.not_done} >= {"prune_visual_tokens"}
    assert report.passes == []


def test_a_graph_break_is_an_error_where_strict() -> None:
    model = models.compiled("llava", models.SPARSE, strict=True)
    with pytest.raises(UserError, match=r"strict\): prune_visual_tokens: not applied"):
        ask_broken(model)
