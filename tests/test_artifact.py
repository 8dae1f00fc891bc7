"""Artifacts: written whole or not at all, read back the same, and every damage is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import sparsevila_compile
from sparsevila_compile import artifact, manifest, staging
from sparsevila_compile.errors import UserError
from sparsevila_compile.model import CompiledModel, load
from sparsevila_compile.program import Program
from tests import tiny
from tests.tiny import Image, words

SPARSE: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.5, "positions": "compact"}),
    ("insert_kv_cache", {"max_length": 300}),
    ("sparsify_decode_attention", {"keep_ratio": 0.3, "share": "kv_head"}),
)
RECIPE = {"version": 1, "passes": [{"insert_kv_cache": {"max_length": 300}}]}


def save(program: Program, path: Path, **more: Any) -> Path:
    """With a processor and generation defaults; what they are does not matter to the program."""
    settings = tiny.model("llava").generation_config
    options = {"recipe": RECIPE, "generation_config": settings, **more}
    return artifact.save(program, tiny.processor(), [], path=path, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact for all tests that only read, or damage a copy."""
    model = tiny.compiled("llava", *SPARSE)
    return save(model.program, tmp_path_factory.mktemp("artifacts") / "llava")


def answer(model: CompiledModel, name: str = "llava", new_tokens: int = 24) -> torch.Tensor:
    prompt = tiny.inputs(name, [[Image(1, (4, 8)), *words(5)], words(3), [Image(2), 44]])
    return model.generate(**prompt, **tiny.greedy(new_tokens))


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "llava_tied", "qwen_windowed"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    program = tiny.traced(name)
    reports = tiny.run(program, *SPARSE)
    before = CompiledModel(program, tiny.processor(), tiny.model(name).generation_config)
    path = artifact.save(program, tiny.processor(), reports, RECIPE, tmp_path / "a" / "b" / "c")
    assert path == tmp_path / "a" / "b" / "c"
    after = load(path)
    assert torch.equal(answer(before, name), answer(after, name))
    assert after.program.config == json.loads(json.dumps(program.config))
    for field in ("family", "layout", "dtype", "caches", "prune", "retrieval", "stage"):
        assert getattr(after.program, field) == getattr(program, field), field
    assert after.program.passes == program.passes
    assert after.program.max_length == 300
    assert set(after.program.weights) == set(program.weights)
    assert after.program.weight_bytes() == program.weight_bytes()
    assert json.loads((path / "recipe.json").read_text()) == RECIPE
    report = json.loads((path / "report.json").read_text())
    assert [r["name"] for r in report] == program.passes
    assert artifact.read_manifest(path)["versions"]["torch"] == torch.__version__
    assert not list(path.parent.glob(".*")), "nothing is left beside it"


def test_public_name(made: Path) -> None:
    assert sparsevila_compile.load is load
    model = sparsevila_compile.load(str(made))
    assert torch.equal(answer(model), answer(tiny.compiled("llava", *SPARSE)))


def test_the_processor_and_the_defaults_come_along(made: Path) -> None:
    model = load(made)
    ids = model.processor(text=["w11 <image> w12"], images=[_picture()], return_tensors="pt")
    assert (ids["input_ids"] == tiny.IMAGE).sum() == 16
    assert model.generation_config.pad_token_id == tiny.PAD
    chat, other = model.chat(), tiny.compiled("llava", *SPARSE).chat()
    for one in (chat, other):
        one.add_image(_picture())
    assert chat.ask("w20 w21", **tiny.greedy(8)) == other.ask("w20 w21", **tiny.greedy(8))


def _picture() -> Any:
    from PIL import Image as Pictures

    return Pictures.new("RGB", (80, 60), (200, 30, 90))


def test_saved_again_it_is_the_same(made: Path, tmp_path: Path) -> None:
    again = save(load(made).program, tmp_path / "again")
    one, two = artifact.read_manifest(made), artifact.read_manifest(again)
    [weights] = one["weights"]
    assert one["files"][weights] == two["files"][weights]
    assert torch.equal(answer(load(made)), answer(load(again)))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache")
    [node] = [n for n in program.component("embed").graph.nodes if n.op == "get_attr"]
    tied = program.weights["lm_head.weight"]
    node.target = "tied.weight"
    program.weights["tied.weight"] = tied
    program.drop_unused_weights()
    path = save(program, tmp_path / "a")
    manifest = artifact.read_manifest(path)
    assert manifest["aliases"] in (
        {"tied.weight": "lm_head.weight"},
        {"lm_head.weight": "tied.weight"},
    )
    stored = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert stored < program.weight_bytes() + 20_000
    back = artifact.load_program(path)
    assert back.weights["tied.weight"].data_ptr() == back.weights["lm_head.weight"].data_ptr()
    assert torch.equal(back.weights["tied.weight"], tied)


def test_odd_tensors(tmp_path: Path) -> None:
    """Views of a large storage, transposed, empty, scalar and integer tensors keep their values."""
    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache")
    large = torch.randn(100, 1000)
    odd = {
        "row": large[7],
        "column": large[:, 7],
        "transposed": large[:5, :9].T,
        "same storage, other shape": large[7].reshape(10, 100),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "packed": torch.randint(-(2**31), 2**31 - 1, (8, 4), dtype=torch.int32),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    graph = program.component("embed").graph
    for name, tensor in odd.items():
        with graph.inserting_before(next(iter(graph.nodes))):
            graph.create_node("get_attr", name).meta["val"] = tensor
    program.weights |= odd
    path = save(program, tmp_path / "a")
    assert (
        sum(f.stat().st_size for f in path.glob("*.safetensors")) < program.weight_bytes() + 30_000
    )
    back = artifact.load_program(path).weights
    for name, tensor in odd.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_several_weight_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "SHARD_BYTES", 160_000)
    model = tiny.compiled("llava", *SPARSE)
    path = save(model.program, tmp_path / "a")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == artifact.read_manifest(path)["weights"]
    assert max(f.stat().st_size for f in files) < 180_000
    assert torch.equal(answer(load(path)), answer(model))
    files[2].unlink()
    with pytest.raises(UserError, match=rf"{files[2].name}: missing"):
        load(path)


# ---------------------------------------------------------------------- nothing is run or unpickled


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.compiled("llava", *SPARSE)
    expected = answer(model)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickling")

    for module in (pickle, torch.serialization.pickle):
        for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.export, "load", refuse)
    path = save(model.program, tmp_path / "a")
    assert torch.equal(answer(load(path)), expected)


def test_only_data_files(made: Path) -> None:
    kinds = {f.suffix for f in made.rglob("*") if f.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja", ".txt"}
    for file in made.rglob("*.json"):
        json.loads(file.read_text())


def test_planted_code_is_not_run(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').write('ran')\n"
    for place in ("__init__.py", "processing.py", "modeling_llava.py", "graphs/vision.py"):
        (path / place).write_text(code)
        (path / "processor" / Path(place).name).write_text(code)
    (path / "weights.pkl").write_bytes(pickle.dumps(_Bomb(str(mark))))
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(mark))))
    answer(load(path), new_tokens=2)
    assert not mark.exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def _resigned(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as an attacker would, who can compute hashes too."""
    file = path / artifact.MANIFEST
    data = json.loads(file.read_text())
    change(data)
    for name in data["files"] if isinstance(data.get("files"), dict) else ():
        facts = data["files"][name]
        if isinstance(facts, dict) and (path / name).is_file():
            facts["bytes"] = (path / name).stat().st_size
            facts["sha256"] = manifest.file_sha256(path / name)
    data["sha256"] = manifest.own_sha256(data)
    file.write_text(json.dumps(data))


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "path upwards": lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
    "absolute path": lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}}),
    "graph upwards": lambda m: m["components"].append("../../x"),
    "unlisted graph": lambda m: m["files"].pop("graphs/decode.json"),
    "unlisted weights": lambda m: m["files"].pop(m["weights"][0]),
    "weights upwards": lambda m: m["weights"].append("../x.safetensors"),
    "no files": lambda m: m.update(files=None),
    "facts that are none": lambda m: m["files"].update({"config.json": 3}),
    "unknown dtype": lambda m: m.update(dtype="load"),
    "unknown device": lambda m: m.update(device="toaster"),
    "layout": lambda m: m["layout"].update(extra=1),
    "caches": lambda m: m.update(caches=7),
    "no weights": lambda m: m.update(weights=[]),
    "alias of nothing": lambda m: m.update(aliases={"a": "b"}),
    "missing key": lambda m: m.pop("prune"),
    "list for a number": lambda m: m.update(max_length=[]),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_manifests(case: str, made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    _resigned(path, FORGED[case])
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["aten.from_file.default", "os.system.default", "python.eval"])
def test_forged_graphs(target: str, made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    file = path / "graphs" / "language.json"
    data = json.loads(file.read_text())
    next(n for n in data["nodes"] if n["op"] == "call_function")["target"] = target
    file.write_text(json.dumps(data))
    _resigned(path, lambda m: None)
    with pytest.raises(UserError, match=r"graphs/language.json: damaged"):
        load(path)


# ---------------------------------------------------------------------- damage


def _files(path: Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def _empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda file: file.unlink(),
    "cut": _cut,
    "bit": _flip,
    "empty": _empty,
    "more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "directory": lambda file: (file.unlink(), file.mkdir()),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(damage: str, made: Path, tmp_path: Path) -> None:
    names = _files(made)
    assert {"config.json", "artifact.json", "recipe.json", "report.json"} <= set(names)
    assert any(n.startswith("processor/") for n in names)
    for name in names:
        path = tmp_path / name.replace("/", "_")
        shutil.copytree(made, path)
        DAMAGES[damage](path / name)
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert str(path) in message
        assert Path(name).name in message, f"{name}: {message}"
        assert "\n" not in message
        shutil.rmtree(path)


def test_any_flipped_bit_of_the_manifest(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    file = path / artifact.MANIFEST
    data = file.read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        with contextlib.suppress(UserError):
            # A flip that JSON cannot see, as in the white space, must change nothing.
            assert artifact.read_manifest(path) == json.loads(data)


def test_nonsense_for_a_manifest(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    for text in (
        "[" * 200_000,
        "3",
        "null",
        "{}",
        '{"files": {}}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        data = text if isinstance(text, bytes) else text.encode()
        (path / artifact.MANIFEST).write_bytes(data)
        with pytest.raises(UserError, match=r"artifact.json"):
            load(path)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such artifact directory"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no such artifact directory"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match=r"no artifact.json in this directory"):
        load(tmp_path)


def test_other_formats_and_devices(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    _resigned(path, lambda m: m.update(format=99))
    with pytest.raises(UserError, match="artifact format 99; this version reads"):
        load(path)
    _resigned(path, lambda m: m.update(format=artifact.FORMAT))
    load(path)
    with pytest.raises(UserError, match="compiled for cpu, not cuda"):
        load(path, device="cuda")
    with pytest.raises(UserError, match="nonsense"):
        load(path, device="nonsense")
    if not torch.cuda.is_available():
        _resigned(path, lambda m: m.update(device="cuda"))
        with pytest.raises(UserError, match="compiled for CUDA, and no CUDA device is here"):
            load(path)


# ---------------------------------------------------------------------- where it may be written


def test_never_overwritten_unless_asked(made: Path, tmp_path: Path) -> None:
    program = load(made).program
    path = save(program, tmp_path / "a", recipe={"n": 1})
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        save(program, path, recipe={"n": 2})
    assert json.loads((path / "recipe.json").read_text()) == {"n": 1}
    save(program, path, recipe={"n": 2}, overwrite=True)
    assert json.loads((path / "recipe.json").read_text()) == {"n": 2}
    load(path)
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_in_the_way(made: Path, tmp_path: Path) -> None:
    program = load(made).program
    (tmp_path / "file").write_text("mine")
    other = tmp_path / "other"
    (other / "sub").mkdir(parents=True)
    (other / "sub" / "thesis.txt").write_text("mine")
    for target, message in (
        ("file", "is a file"),
        ("file/below", "file"),
        ("other", r"holds no artifact \(artifact.json is missing\)"),
        ("other/sub", "holds no artifact"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            save(program, tmp_path / target, overwrite=True)
        assert str(tmp_path / target) in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert (other / "sub" / "thesis.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_an_empty_directory_is_filled(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    load(save(load(made).program, tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_only_lowered_programs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only a lowered one runs"):
        save(tiny.at_stage("llava", "insert_kv_cache"), tmp_path / "a")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------- whole or not at all


def _failing(
    after: int, error: BaseException, real: Callable[..., Any], once: bool
) -> Callable[..., Any]:
    count = [after]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] -= 1
        if count[0] == -1 or (count[0] < 0 and not once):
            raise error
        return real(*args, **kwargs)

    return call


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
STEPS: dict[str, tuple[Any, str]] = {
    "text": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "weights": (safetensors.torch, "save_file"),
    "directory": (Path, "mkdir"),
    "mode": (Path, "chmod"),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_at_any_step(
    step: str,
    exchange: bool,
    old: bool,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = load(made).program
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    failures = 0
    for after in (0, 1, 2, 5):
        path = tmp_path / f"{after}" / "a"
        path.parent.mkdir()
        if old:
            save(program, path, recipe={"n": "old"})
        owner, name = STEPS[step]
        for error, once in ((FULL, True), (FULL, False), (KeyboardInterrupt(), True)):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, _failing(after, error, getattr(owner, name), once))
                refusal = _attempt(program, path)
            if refusal is None:
                old = True
            else:
                failures += 1
                if isinstance(refusal, UserError):
                    assert "No space left on device" in str(refusal)
                    assert str(path) in str(refusal)
                    assert "\n" not in str(refusal)
            if not once:
                recover(path)
            if old:
                load(path)
                assert json.loads((path / "recipe.json").read_text())["n"] in ("old", "new")
            else:
                assert not path.exists()
            assert os.listdir(path.parent) == (["a"] if path.exists() else [])
    assert failures > 0 or (exchange and old and step == "rename")


def _attempt(program: Program, path: Path) -> BaseException | None:
    try:
        save(program, path, recipe={"n": "new"}, overwrite=True)
    except (UserError, KeyboardInterrupt) as error:
        return error
    return None


def recover(path: Path) -> None:
    """When even moving the old artifact back fails it must still be there, under another name."""
    if path.exists():
        return
    for aside in path.parent.glob(".*/old"):
        os.rename(aside, path)
        aside.parent.rmdir()


def test_a_real_limit_on_file_size(made: Path, tmp_path: Path) -> None:
    """No patches: the system itself refuses to write on, wherever the writer is."""
    program = load(made).program
    largest = max(f.stat().st_size for f in made.rglob("*") if f.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (100, 2_000, 30_000, largest - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                with pytest.raises(UserError, match="cannot write") as caught:
                    save(program, tmp_path / "a")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert "\n" not in str(caught.value)
            assert os.listdir(tmp_path) == []
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    load(save(program, tmp_path / "a"))


@pytest.fixture
def child() -> Iterator[Callable[[Callable[[], Any]], int]]:
    """Runs a function in a forked process; returns its id. Whatever is left is killed."""
    started: list[int] = []

    def start(function: Callable[[], Any]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                function()
            finally:
                os._exit(1)
        started.append(pid)
        return pid

    yield start
    for pid in started:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_killed_at_any_moment(
    exchange: bool,
    child: Callable[[Callable[[], Any]], int],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed again and again while it overwrites: there is always one whole artifact, or none yet."""
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    program, path = load(made).program, tmp_path / "a"

    def keep_saving() -> None:
        n = 0
        while True:
            n += 1
            save(program, path, recipe={"n": n}, overwrite=True)

    start = time.perf_counter()
    save(program, tmp_path / "b")
    seconds = time.perf_counter() - start
    shutil.rmtree(tmp_path / "b")
    rng, found, leftovers = random.Random(3), 0, 0
    for _ in range(30):
        pid = child(keep_saving)
        time.sleep(rng.uniform(0.0, 4 * seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        leftovers += len(list(tmp_path.glob(".*")))
        if not exchange:
            recover(path)
        if path.exists():
            artifact.check_files(path, artifact.read_manifest(path))
            found += 1
        else:
            assert found == 0, "the old one is gone"
    assert found > 10
    assert leftovers > 3, "some kills came in the middle"
    load(save(program, path, overwrite=True))
    left = [p.name for p in tmp_path.iterdir() if p.name != "a"]
    assert left == [], "the next save clears away what killed ones left"


def test_another_process_at_work_is_left_alone(made: Path, tmp_path: Path) -> None:
    program = load(made).program
    with staging.staged(tmp_path / "a") as folder:
        (folder / "half").write_text("x")
        save(program, tmp_path / "a")
        assert (folder / "half").exists()
        shutil.rmtree(tmp_path / "a")
    assert os.listdir(tmp_path / "a") == ["half"]
