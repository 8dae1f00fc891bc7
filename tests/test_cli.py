"""The command: what it prints, what it writes, and one clear line for everything that goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsevila_compile
from sparsevila_compile import asking, cli, commands, compiler, display, hf
from sparsevila_compile.errors import UserError
from sparsevila_compile.pass_base import PASSES, Match, Miss, Pass, PassConfig
from sparsevila_compile.program import Program
from sparsevila_compile.report import Site
from tests import tiny, tiny_checkpoint

QUESTIONS = [["w20 w21 w22", "w30"], ["w20 w21 w22", "w40 w41"]]
NEW_TOKENS = 6

RECIPE = """\
version: 1
model: {path: checkpoint, dtype: float32, device: cpu}
passes:
  - prune_visual_tokens: {keep_ratio: 0.5}
  - insert_kv_cache
  - sparsify_decode_attention: {keep_ratio: 0.25}
emit: {path: out/made}
ask:
  max_new_tokens: 6
  pictures:
    - image: 0.png
      turns: [{question: w20 w21 w22, answer: w11}, {question: w30}]
    - image: 1.png
      turns: [{question: w20 w21 w22}, {question: w40 w41}]
"""


_TRACED: dict[str, Program] = {}


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace the checkpoint once; by configuration, so that a changed one is traced anew."""
    real = compiler.trace

    def trace(model: Any) -> Program:
        key = f"{next(model.parameters()).device.type} {model.config.to_json_string()}"
        if key not in _TRACED:
            _TRACED[key] = real(model)
        return _TRACED[key].snapshot()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "trace", trace)
        yield


class Work:
    """A directory with a checkpoint and pictures, and the command run in it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capture = capture

    def recipe(self, text: str = RECIPE, name: str = "r.yaml") -> str:
        (self.folder / name).write_text(text)
        return name

    def swapped(self, old: str, new: str) -> str:
        assert RECIPE.count(old) == 1, old
        return self.recipe(RECIPE.replace(old, new))

    def run(self, *arguments: str) -> tuple[int, str, str]:
        self.capture.readouterr()
        code = cli.run(arguments)
        out, err = self.capture.readouterr()
        return code, out, err

    def refused(self, *arguments: str) -> str:
        """Run what must fail: exit code 2, one line, nothing written; returns the line."""
        before = sorted(str(p) for p in self.folder.rglob("*"))
        code, out, err = self.run(*arguments)
        assert code == 2, (code, out, err)
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if not line.startswith("[")]  # stages
        assert len(lines) == 1, err
        assert sorted(str(p) for p in self.folder.rglob("*")) == before
        return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint and the pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_checkpoint.write(folder / "checkpoint")
    for seed in range(2):
        tiny_checkpoint.picture(folder / f"{seed}.png", seed)
    return folder


@pytest.fixture
def work(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Work:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return Work(tmp_path, capsys)


@pytest.fixture(scope="module")
def compiled(made: Path) -> Path:
    """An artifact of RECIPE."""
    (made / "shared.yaml").write_text(RECIPE.replace("out/made", "shared"))
    assert cli.run(["compile", str(made / "shared.yaml"), "--quiet", "--no-ask"]) == 0
    return made / "shared"


@pytest.fixture
def loaded(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The artifact, loaded once for all questions of a test."""
    model = sparsevila_compile.load(compiled)
    monkeypatch.setattr(sparsevila_compile, "load", lambda path, **where: model)
    return model


# ------------------------------------------------------------------ compile


def test_compile_reports_asks_and_says_where(work: Work) -> None:
    code, out, err = work.run(work.recipe())
    assert code == 0, err
    assert (work.folder / "out/made/artifact.json").is_file()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert rows["insert_kv_cache"][1:3] == ["2", "0"]
    row = next(line for line in out.splitlines() if "16 → 8" in line).split()
    assert row[:3] == ["prune_visual_tokens", "1", "2"]
    assert "prune_visual_tokens left alone vision: model.vision_tower" in out
    assert "lower_ops passed over" in out
    for name in ("0.png", "1.png", "w40 w41", "w11"):
        assert name in out
    assert "visual tokens of 2 pictures: 32 before pruning, 16 in the KV cache, 4 attended" in out
    assert "answers agree:" in out
    assert "right answers: " in out
    assert "artifact: out/made\n" in out
    assert "sparsevila-compile run out/made --image 0.png" in out
    stages = [line for line in err.splitlines() if line.startswith("[")]
    assert [s.split("]")[0] for s in stages[:9]] == [f"[{i}/9" for i in range(1, 10)]
    assert all(s.endswith(" s)") for s in stages)


def test_a_dense_compilation_answers_as_transformers_does(work: Work) -> None:
    text = RECIPE.replace("0.5", "1.0").replace("0.25", "1.0").replace("max_new_tokens: 6", "max_new_tokens: 12")  # fmt: skip
    code, out, err = work.run(work.recipe(text), "--json", "--quiet")
    assert code == 0
    assert err == ""
    data = json.loads(out)
    assert [p["name"] for p in data["passes"]][1:4] == [
        "prune_visual_tokens",
        "insert_kv_cache",
        "sparsify_decode_attention",
    ]
    answers = data["answers"]
    turns = [t for a in answers for t in a["turns"]]
    assert [t["compiled"] for t in turns] == [t["dense"] for t in turns]
    assert len({t["compiled"] for t in turns}) == 4  # or equality would say little
    assert all(len(t["compiled"].split()) > 3 for t in turns)
    assert turns[0]["reference"] == "w11"
    # The dense column is what transformers itself says, asked without any of our code.
    prompt = "w100 <image> w20 w21 w22 w101"
    from PIL import Image

    inputs = tiny_checkpoint.processor()(
        text=[prompt], images=[Image.open("0.png")], return_tensors="pt"
    )
    model = hf.load_model("checkpoint", dtype=None, device=tiny.model("llava").device)
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tiny.tokenizer().decode(
        said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert turns[0]["dense"] == text.strip()
    # 2 layers × 2 (k and v) × 2 heads × 16 × 4 bytes = 512 bytes a token; 16 tokens a picture.
    assert [a["dense_kv_bytes"] for a in answers] == [16 * 512] * 2
    assert [a["kv_bytes"] for a in answers] == [16 * 512] * 2


def test_figures_of_a_sparse_compilation(work: Work) -> None:
    code, out, _ = work.run(
        work.swapped("max_new_tokens: 6", "max_new_tokens: 3\n  dense: false"), "--json"
    )
    assert code == 0
    for asked in json.loads(out)["answers"]:
        assert (asked["visual_tokens"], asked["kept_tokens"], asked["attended_tokens"]) == (
            16,
            8,
            2,
        )
        assert (asked["dense_kv_bytes"], asked["kv_bytes"]) == (16 * 512, 2 * 512)
        assert all(t["dense"] is None for t in asked["turns"])


def test_output_overwrite_and_no_ask(work: Work) -> None:
    name = work.recipe()
    code, out, _ = work.run(name, "--output", "else/where", "--no-ask", "--quiet")
    assert code == 0
    assert (work.folder / "else/where/artifact.json").is_file()
    assert not (work.folder / "out").exists()
    assert "agree" not in out
    line = work.refused(name, "--output", "else/where", "--no-ask")
    assert "--output" in line
    assert "exists already" in line
    assert work.run(name, "--output", "else/where", "--no-ask", "--overwrite", "--quiet")[0] == 0


def test_dialogues_from_a_file(work: Work) -> None:
    lines = [
        {"image": "../0.png", "turns": [{"question": "w20", "answer": "w9", "kind": "count"}]},
        {"image": "../1.png", "turns": [{"question": "w20"}], "scene": {}},
    ]
    (work.folder / "data").mkdir()
    file = work.folder / "data" / "d.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    head = RECIPE[: RECIPE.index("ask:")]
    name = work.recipe(head + "ask: {max_new_tokens: 2, dense: false, file: data/d.jsonl}\n")
    code, out, _ = work.run(name, "--json")
    assert code == 0
    assert [Path(a["path"]).name for a in json.loads(out)["answers"]] == ["0.png", "1.png"]
    file.write_text('{"image": "../0.png", "turns": []}\n{"image": "x.png", "turns": [{"question": "a"}]}\nno\n')  # fmt: skip
    code, _, err = work.run(name, "--output", "other")
    assert code == 2
    assert not (work.folder / "other").exists()
    first, second, third = err.splitlines()
    assert first.startswith(f"{file}:1:1 turns: ")
    assert second.startswith(f"{file}:2:1 image: ")
    assert third.startswith(f"{file}:3:1 is not JSON")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "old, new, place, words",
    [
        ("path: checkpoint", "path: ./nothing", "2:9 model.path", "no such checkpoint directory"),
        ("path: checkpoint", "path: ./out", "2:9 model.path", "no such checkpoint directory"),
        ("device: cpu", "device: cuda:7", "2:43 model.device", "cuda:7 is wanted"),
        ("path: out/made", "path: checkpoint", "7:8 emit.path", "holds the checkpoint"),
        ("path: out/made", "path: .", "7:8 emit.path", "holds the recipe"),
        ("path: out/made", "path: 0.png", "7:8 emit.path", "is a file"),
        ("image: 0.png", "image: 9.png", "11:7 ask.pictures[0].image", "no such picture"),
        ("image: 0.png", "image: r.yaml", "11:7 ask.pictures[0].image", "not a picture"),
        ("max_new_tokens: 6", "max_new_tokens: 5000", "8:1 ask", "cache positions"),
        ("keep_ratio: 0.5}", "keep_ratio: 0.5, layer: 8}", "4:44 passes[0].prune_visual_tokens.layer", "outside the encoder's 3 layers"),
        ("  - insert_kv_cache\n", "", "5:5 passes[1].sparsify_decode_attention", "no KV cache"),
        ("  - insert_kv_cache\n", "  - insert_kv_cache\n  - insert_kv_cache\n", "6:5 passes[2].insert_kv_cache", "listed twice"),
        ("sparsify_decode_attention: {keep_ratio: 0.25}", "quantize_linear", "6:5 passes[2].quantize_linear", "needs calibration"),
        ("sparsify_decode_attention: {keep_ratio: 0.25}", "quantize_linear: {group_size: 32, calibration: {path: no.jsonl}}", "6:", "no.jsonl"),
    ],
)  # fmt: skip
def test_one_line_with_its_place_and_nothing_written(
    work: Work, old: str, new: str, place: str, words: str
) -> None:
    line = work.refused(work.swapped(old, new), "--no-progress")
    assert line.startswith(f"r.yaml:{place}"), line
    assert words in line


def test_a_pass_that_matches_nothing(work: Work, fake_passes: None) -> None:
    name = work.swapped("  - insert_kv_cache\n", "  - fake_nothing\n  - insert_kv_cache\n")
    line = work.refused(name, "--quiet")
    assert line.startswith("r.yaml:5:5 passes[1].fake_nothing: matches nothing"), line
    assert "too plain" in line


def test_damaged_checkpoints(work: Work) -> None:
    name = work.recipe()
    weights = work.folder / "checkpoint/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot load the weights" in work.refused(name, "--quiet")
    weights.unlink()
    assert "cannot load the weights" in work.refused(name, "--quiet")
    (work.folder / "checkpoint/config.json").write_text("{")
    assert "cannot read the model configuration" in work.refused(name, "--quiet")


def test_an_unsupported_model_is_refused(work: Work) -> None:
    config = work.folder / "checkpoint/config.json"
    data = json.loads(config.read_text())
    data["vision_feature_select_strategy"] = "full"
    config.write_text(json.dumps(data))
    line = work.refused(work.recipe(), "--quiet")
    assert line.startswith("r.yaml:2:9 model.path: ")
    assert "vision_feature_select_strategy" in line


def test_a_disk_that_is_full(work: Work) -> None:
    name = work.recipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights are larger
    try:
        code, _, err = work.run(name, "--quiet", "--no-ask")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "cannot write" in err
    assert len(err.splitlines()) == 1
    assert not (work.folder / "out/made").exists()
    assert not list(work.folder.rglob("*.partial"))


def test_a_place_that_cannot_be_written(work: Work) -> None:
    line = work.refused(work.recipe(), "--output", "/proc/made", "--quiet", "--no-ask")
    assert "--output: /proc/made: cannot" in line  # even for root


def test_mistakes_in_a_recipe_come_all_at_once(work: Work) -> None:
    name = work.recipe(RECIPE.replace("keep_ratio", "keep_ration").replace("dtype", "dtyp"))
    code, out, err = work.run(name)
    assert (code, out) == (2, "")
    assert [line.split(":")[1] for line in err.splitlines()] == ["2", "4", "6"]
    assert not (work.folder / "out").exists()


# ------------------------------------------------------------------ plan, explain, schema


class _FakeConfig(PassConfig):
    pass


class _FakeNothing(Pass[_FakeConfig]):
    name = "fake_nothing"
    stage = "prune"
    summary = "matches nothing"
    config_type = _FakeConfig

    def match(self, program: Any) -> Iterator[Match | Miss]:
        yield Miss("vision", "too plain", "model.vision_tower")

    def rewrite(self, program: Any, match: Match, context: Any) -> None:
        raise AssertionError


@pytest.fixture
def fake_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "fake_nothing", _FakeNothing)


def test_plan_needs_no_weights_and_writes_nothing(work: Work, fake_passes: None) -> None:
    for file in (work.folder / "checkpoint").iterdir():
        if file.name != "config.json":
            file.unlink()
    name = work.recipe()
    before = sorted(work.folder.rglob("*"))
    code, out, _ = work.run("plan", name)
    assert code == 0
    assert sorted(work.folder.rglob("*")) == before
    assert "2. prune_visual_tokens (stage prune): 1 match, 2 misses" in out
    assert "match  vision: model.vision_tower.encoder.layers.2.self_attn" in out
    assert "model.vision_tower.encoder.layers.{0,1}.self_attn × 2: not the layer" in out
    assert "match  decode: model.language_model.layers.{0,1}.self_attn" in out
    assert "lower_ops (stage lower, added by the compiler)" in out

    name = work.swapped("  - insert_kv_cache\n", "  - fake_nothing\n  - insert_kv_cache\n")
    code, out, _ = work.run("plan", name)
    assert code == 2
    assert "error  r.yaml:5:5 passes[1].fake_nothing: matches nothing" in out
    assert "5. sparsify_decode_attention (stage sparsify): 2 matches" in out  # planning went on
    code, out, _ = work.run("plan", name, "--json")
    assert code == 2
    assert [s["error"] is not None for s in json.loads(out)] == [False, False, True] + [False] * 3

    code, out, _ = work.run("plan", work.swapped("  - insert_kv_cache\n", ""))
    assert code == 2
    assert "sparsify_decode_attention (stage sparsify): refused" in out
    assert "lower_ops (stage lower, added by the compiler): not reached" in out


def test_plan_for_a_device_that_is_not_here(work: Work) -> None:
    code, out, _ = work.run("plan", work.swapped("device: cpu", "device: cuda"))
    assert code == 0
    assert "triton" in out  # the kernels that CUDA would get


def test_explain_shows_every_node(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    name = work.recipe()
    code, out, _ = work.run("explain", name, "prune_visual_tokens")
    assert code == 0
    assert out.count("self_attn") == 3
    assert out.count("miss: not the layer that scores") == 2
    assert "17, 4, 16]" in out  # CLS and 16 patches, 4 heads of 16
    assert "1 match, 2 misses" in out
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = work.run("explain", name, "prune_visual_tokens")
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert "".join(c[2] for c in cells).count("layers.2.self_attn") == 1  # folded, not cut off
    assert "runs no pass 'frob'" in work.refused("explain", name, "frob")


def test_schema_is_json(work: Work) -> None:
    code, out, _ = work.run("schema")
    assert code == 0
    assert "keep_ratio" in json.dumps(json.loads(out)["$defs"])


# ------------------------------------------------------------------ run


def test_run_answers_prompts_as_a_session_does(work: Work, compiled: Path) -> None:
    session = sparsevila_compile.load(compiled).chat()
    session.add_image("0.png")
    expected = [session.ask(q, max_new_tokens=NEW_TOKENS, do_sample=False) for q in QUESTIONS[0]]
    assert expected[0] != expected[1]
    prompts = [word for q in QUESTIONS[0] for word in ("--prompt", q)]
    code, out, _ = work.run(
        "run", str(compiled), "--image", "0.png", *prompts, "--max-new-tokens", "6"
    )
    assert code == 0
    shown = [line.strip() for line in out.splitlines()]
    assert shown == ["> w20 w21 w22", expected[0], "> w30", expected[1]]


def test_sampling_is_drawn_from_the_seed(work: Work, compiled: Path, loaded: Any) -> None:
    def said(*flags: str) -> str:
        code, out, err = work.run(
            "run", str(compiled), "--image", "0.png", "--prompt", "w20", "--max-new-tokens", "12", *flags
        )  # fmt: skip
        assert code == 0, err
        return out

    warm = ("--temperature", "5", "--seed")
    assert said(*warm, "1") == said(*warm, "1")
    assert len({said(*warm, str(seed)) for seed in range(3)}) > 1
    line = work.refused("run", str(compiled), "--prompt", "w20", "--seed", "1")
    assert "--seed" in line


def test_chat_reads_lines(
    work: Work, compiled: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(*lines: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        code, out, err = work.run("run", str(compiled), "--max-new-tokens", "6")
        return code, [line.strip() for line in out.splitlines()], err

    ask = "w20 w21 w22"
    code, first, err = chat("/image 0.png", ask)
    assert (code, err) == (0, "")
    code, both, _ = chat("/image 0.png", ask, ask, "/forget", "/image 0.png", ask, "/quit", "w1")
    assert code == 0
    assert len(both) == 3
    assert both[0] == both[2] == first[0]  # /forget starts over
    assert both[1] != both[0]  # and without it the dialogue goes on
    code, out, err = chat("/image nothing.png", "/frob", "/image", "/image 0.png", ask)
    assert code == 2
    assert out == first
    assert len(err.splitlines()) == 3


def test_run_refuses_in_one_line(work: Work, compiled: Path) -> None:
    ask = ("--prompt", "w20")
    assert "no such artifact" in work.refused("run", "nothing", *ask)
    assert "it is not an artifact" in work.refused("run", ".", *ask)
    assert "no such picture" in work.refused("run", str(compiled), "--image", "9.png", *ask)
    assert "not a picture" in work.refused("run", str(compiled), "--image", str(compiled / "report.json"), *ask)  # fmt: skip
    assert "compiled for cpu" in work.refused("run", str(compiled), "--device", "cuda", *ask)
    long = ("--prompt", "w20 " * 3000)
    assert "shorten it" in work.refused("run", str(compiled), *long)


# ------------------------------------------------------------------ the command itself


def test_help_and_version_are_quick_and_import_nothing_heavy() -> None:
    code = (
        "import sys; from sparsevila_compile import cli; p = cli.parser(); p.format_help();"
        "heavy = {'torch', 'transformers', 'rich', 'pydantic', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_broken_recipe_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [")
    code = (
        "import sys; from sparsevila_compile import cli; code = cli.run(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"{tmp_path / 'r.yaml'}:")


def test_help_shows_every_command_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert all(f"\n    {name} " in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert hasattr(commands, f"{name}_command")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pln", "x.yaml"], "did you mean plan?"),
        (["nothing.yaml"], "there is no such file"),
        (["compile", "."], "is a directory"),
    ],
)
def test_wrong_words(work: Work, arguments: list[str], words: str) -> None:
    assert words in work.refused(*arguments)


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "0"],
        ["--temperature", "nan"],
        ["--top-p", "1.5"],
        ["--top-k", "0"],
        ["--max-new-tokens", "x"],
        ["--device", "gpu"],
    ],
)
def test_wrong_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["run", "x", *flags])
    assert ended.value.code == 2
    assert f"{flags[0]}: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("a\x1b[31m: b"), 2, "sparsevila-compile: error: a\\x1b[31m: b"),
        (KeyboardInterrupt(), 130, "sparsevila-compile: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "y"), 2, "y: Permission denied"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("a\nb"), 1, "internal error: RuntimeError: a b; run with --debug"),
        (OSError(errno.EIO, "I/O error"), 1, "internal error: OSError"),
    ],
)
def test_every_exception_is_one_line(
    work: Work, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr(commands, "schema_command", fail)
    got, out, err = work.run("schema")
    assert (got, out) == (code, "")
    assert words in err
    assert len(err.splitlines()) == 1
    if code == 1:
        assert "Traceback" in work.run("schema", "--debug")[2]


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "from sparsevila_compile import cli, commands;"
        "commands.schema_command = lambda options: [print('x' * 9999) for _ in range(99)] and 0;"
        "raise SystemExit(cli.run(['schema']))"
    )
    command = ["bash", "-o", "pipefail", "-c", '"$0" -c "$1" | head -c 1', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_interrupt_leaves_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevila_compile import artifact

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(artifact, "_write_weights", interrupted)
    code, _, err = work.run(work.recipe(), "--quiet", "--no-ask")
    assert code == 130
    assert err == "sparsevila-compile: interrupted\n"
    assert not list((work.folder / "out").glob("*"))
    assert not list((work.folder / "out").glob(".*"))


# ------------------------------------------------------------------ display


@pytest.mark.parametrize(
    "paths, folded",
    [
        ([f"a.layers.{i}.b" for i in range(8)], [("a.layers.{0..7}.b", 8)]),
        (["l.0.x", "l.2.x", "l.3.x", "l.4.x", "l.9.x"], [("l.{0,2..4,9}.x", 5)]),
        (["a.0", "a.1", "b.0"], [("a.{0,1}", 2), ("b.0", 1)]),
        (["a.0", "a.0", "a.1"], [("a.{0,1}", 3)]),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(3)], [("a.{0,1}.b.{0..2}", 6)]),
        (["a.0.b.1", "a.1.b.0"], [("a.0.b.1", 1), ("a.1.b.0", 1)]),  # no full grid: not folded
        (["", "plain"], [("", 1), ("plain", 1)]),
        (["m.q8.0"], [("m.q8.0", 1)]),
    ],
)
def test_layers_are_folded(paths: list[str], folded: list[tuple[str, int]]) -> None:
    assert display.fold(paths) == folded


def test_site_lines_group_by_component() -> None:
    sites = [Site(component="vision", where=f"l.{i}") for i in range(3)]
    sites.append(Site(component="language", where="", node="n"))
    assert display.site_lines(sites) == ["vision: l.{0..2} × 3", "language: n"]


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (24_500_000, "24.5 MB"), (2e12, "2.0 TB")]
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert display.bytes_text(count) == text


@pytest.mark.parametrize(
    "a, b, equal",
    [("Red", " red ", True), ("a b", "a  b", True), ("red", "blue", False), (None, None, False)],
)
def test_answers_agree_but_for_case_and_spaces(a: str | None, b: str | None, equal: bool) -> None:
    assert asking.same(a, b) is equal
