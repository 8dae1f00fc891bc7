"""Every recipe in recipes/ compiles, and its artifact answers as it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sparsevila_compile import cli
from sparsevila_compile.asking import same

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [r.name for r in RECIPES]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=[r.stem for r in RECIPES])
def test_a_shipped_recipe_compiles_and_answers(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made"
    capsys.readouterr()
    code = cli.run(["compile", str(recipe), "--output", str(target), "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, err
    data = json.loads(out)
    assert Path(data["artifact"]) == target
    turns = [t for a in data["answers"] for t in a["turns"]]
    assert len(turns) == 16
    dense = sum(same(t["dense"], t["reference"]) for t in turns)
    compiled = sum(same(t["compiled"], t["reference"]) for t in turns)
    assert dense >= 14  # the model alone is right in 95 % of turns
    assert compiled >= dense - 2, [t for t in turns if not same(t["compiled"], t["reference"])]
    named = [p for p in data["passes"] if p["index"] is not None]
    listed = yaml.safe_load(recipe.read_text())["passes"]
    optional = {n for p in listed if isinstance(p, dict) for n, o in p.items() if o.get("optional")}
    assert all(p["matches"] and p["modified"] for p in named if p["name"] not in optional)
    sizes = data["weight_bytes"]
    if any(p["name"] == "quantize_linear" for p in named):
        assert sizes[1] < 0.7 * sizes[0]
    for asked in data["answers"]:
        if any(p["name"] == "sparsify_decode_attention" for p in named):
            assert asked["kv_bytes"] < 0.15 * asked["dense_kv_bytes"]
        if any(p["name"] == "prune_visual_tokens" for p in named):
            assert asked["kept_tokens"] == asked["visual_tokens"] // 4
