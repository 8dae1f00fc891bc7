"""The guide for deployers: its script and its program, as they stand in docs/onnx.md, without us."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparsevila_compile import cli
from sparsevila_compile.model import CompiledModel, load
from tests.onnx.made import lowered, save

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
CARDS = ROOT / "examples" / "cards"
PICTURE = CARDS / "quickstart" / "0.png"
QUESTIONS = ("name the card below O .", "how many circles are there ?", "what colour is card 6 ?")

# In a process that could not import this package if it tried to.
WITHOUT_US = """
import runpy, sys
sys.modules["sparsevila_compile"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def block(language: str, title: str) -> str:
    [found] = re.findall(rf"^```{language}\n([#/]+ {title}.*?)^```$", PAGE, re.S | re.M)
    return str(found)


def compiled(folder: Path, *passes: dict[str, Any] | str) -> Path:
    recipe = {
        "version": 1,
        "model": {"path": str(CARDS / "checkpoint"), "dtype": "float32", "device": "cpu"},
        "passes": list(passes),
        "emit": {"format": "onnx", "path": str(folder / "bundle")},
    }
    file = folder / "r.yaml"
    file.write_text(json.dumps(recipe))
    assert cli.run(["compile", str(file), "--quiet", "--json"]) == 0
    return folder / "bundle"


def token_ids(model: CompiledModel, picture: Path) -> list[tuple[list[int], str]]:
    """Tokens and text of a session's answers."""
    session, said = model.chat(), []
    session.add_image(Image.open(picture))
    generate: Any = model.generate
    tokens: list[list[int]] = []

    def watched(**arguments: Any) -> Any:
        out = generate(**arguments)
        tokens.append(out[0, arguments["input_ids"].shape[1] :].tolist())
        return out

    model.generate = watched  # type: ignore[method-assign]
    for question in QUESTIONS:
        said.append(session.ask(question, max_new_tokens=16, do_sample=False))
    return list(zip(tokens, said, strict=True))


PASSES: dict[str, tuple[dict[str, Any] | str, ...]] = {
    "dense": ("insert_kv_cache",),
    "sparse": (
        {"prune_visual_tokens": {"keep_ratio": 0.25, "positions": "compact"}},
        "insert_kv_cache",
        {"sparsify_decode_attention": {"keep_ratio": 0.25, "share": "kv_head"}},
        "merge_linears",
        "fuse_rms_norm",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_the_script_answers_as_the_session_does(
    passes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = compiled(tmp_path, *PASSES[passes])
    capsys.readouterr()
    script = tmp_path / "ask.py"
    script.write_text(block("python", "ask.py"))
    assert "sparsevila_compile" not in script.read_text()
    command = [sys.executable, "-c", WITHOUT_US, str(script), str(bundle), str(PICTURE), *QUESTIONS]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    expected = token_ids(load(bundle), PICTURE)
    assert [tuple(f) for f in found] == expected
    assert [text for _, text in expected] == ["it is U", "one", "orange"]


def test_the_program_prints_the_same_tokens(tmp_path: Path) -> None:
    headers = os.environ.get("ONNXRUNTIME_INCLUDE", "")
    if not (Path(headers) / "onnxruntime_cxx_api.h").is_file() or not shutil.which("c++"):
        pytest.skip("no compiler or no headers of ONNX Runtime: ONNXRUNTIME_INCLUDE names none")
    import onnxruntime
    import torch

    capi = Path(onnxruntime.__file__).parent / "capi"
    [library] = capi.glob("libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so").symlink_to(library)
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)  # the name within the library
    (tmp_path / "ask.cpp").write_text(block("cpp", "ask.cpp"))
    build = ["c++", "-std=c++17", "ask.cpp", "-I", headers, "-L", ".", "-lonnxruntime", "-o", "ask"]
    built = subprocess.run(build, capture_output=True, text=True, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    bundle = save(lowered("llava", "insert_kv_cache"), tmp_path / "bundle")
    prompt = [1, 20, 30, 40]
    command = ["./ask", str(bundle), "12", *map(str, prompt)]
    paths = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{capi}"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=paths)
    assert ran.returncode == 0, ran.stderr
    ids = torch.tensor([prompt])
    expected = load(bundle).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    assert [int(t) for t in ran.stdout.split()] == expected[0, len(prompt) :].tolist()


def test_page_and_names() -> None:
    """The files and inputs that the page lists are those of a bundle."""
    listed = set(re.findall(r"`([\w-]+\.(?:onnx|json|bin))`", PAGE))
    assert {"bundle.json", "embed.onnx", "turn.onnx", "retrieve.onnx", "decode.onnx"} <= listed
