"""A transformers script that knows nothing of this package but one line."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sparsevila_compile import dynamo, hf
from sparsevila_compile.manager import run_passes
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.pass_base import Context
from sparsevila_compile.trace import trace
from tests import tiny, tiny_checkpoint
from tests.dynamo import models

SCRIPT = """
    import json, sys
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder, pictures = sys.argv[1], sys.argv[2:]
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    assert not any(m.startswith("sparsevila_compile") for m in sys.modules)
    model.compile(backend="sparsevila", options={"recipe": f"{folder}/recipe.json", "inner": "eager"})

    answers = []
    for picture in pictures:
        inputs = processor(
            text=["w100 <image> w40 w41 w42 w101"],
            images=[Image.open(picture)],
            return_tensors="pt",
        )
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    print(json.dumps(answers))
"""


def test_a_stock_script_with_one_line_added(tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path / "checkpoint")
    recipe = {
        "version": 1,
        "model": {"path": ".", "device": "cpu"},
        "passes": models.passes(models.SPARSE),
        "emit": {"path": "out"},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    pictures = [tiny_checkpoint.picture(tmp_path / f"{i}.png", i) for i in range(2)]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, pictures)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    artifact = tiny.compiled("llava", *models.SPARSE)
    for picture, answer in zip(pictures, answers, strict=True):
        inputs = _inputs(tiny_checkpoint.processor(), "w100 <image> w40 w41 w42 w101", picture)
        out = artifact.generate(**inputs, **tiny.greedy(8))
        assert tiny.answers_of(inputs, out) == [answer]


CARDS = Path(__file__).parents[2] / "examples" / "cards"


def _inputs(processor: Any, text: str, picture: Path) -> dict[str, torch.Tensor]:
    from PIL import Image

    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    return dict(processor(text=[text], images=[image], return_tensors="pt"))


@pytest.mark.slow
def test_trained_model_with_awq_answers_as_its_artifact() -> None:
    awq = {
        "group_size": 64,
        "clip": False,
        "calibration": {"path": str(CARDS / "calibration" / "conversations.jsonl"), "samples": 1},
    }
    specs: tuple[tiny.Spec, ...] = (*models.SPARSE, ("quantize_linear", awq))

    def load() -> Any:
        path = CARDS / "checkpoint"
        model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    model, processor = load(), hf.load_processor(str(CARDS / "checkpoint"))
    recipe = {"passes": models.passes(specs)}
    model.compile(backend="sparsevila", options={"recipe": recipe, "inner": "eager"})
    dense = load()
    program = trace(load())
    run_passes(program, tiny.make_passes(*specs), Context(processor=processor))
    artifact = CompiledModel(program, processor, dense.generation_config)
    same_as_dense = []
    for line in (CARDS / "quickstart" / "dialogues.jsonl").read_text().splitlines():
        dialogue = json.loads(line)
        picture = CARDS / "quickstart" / dialogue["image"]
        for turn in dialogue["turns"][:1]:
            inputs = _inputs(processor, f"<s><image> {turn['question']}", picture)
            asked = {**inputs, "max_new_tokens": 8, "do_sample": False}
            out = model.generate(**asked)
            assert out.tolist() == artifact.generate(**asked).tolist()
            same_as_dense.append(out.tolist() == dense.generate(**asked).tolist())
    assert any(same_as_dense), "nothing like the model that it was"
    assert "quantize_linear" in [p.name for p in dynamo.report(model).passes if p.matches]
