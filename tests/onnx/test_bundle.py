"""Bundles on disk: whole or not at all, one copy of the weights, every damage named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sparsevila_compile import artifact, cli, manifest
from sparsevila_compile.errors import UserError
from sparsevila_compile.manager import run_passes
from sparsevila_compile.model import load
from sparsevila_compile.onnx import bundle, runner
from sparsevila_compile.onnx.lowering import LowerToOnnx
from sparsevila_compile.pass_base import Context
from sparsevila_compile.trace import trace
from tests import tiny
from tests.onnx.made import RECIPE, SPARSE, in_torch, lowered, save
from tests.tiny import Image, words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for all tests that only read, or damage a copy."""
    return save(lowered("llava", *SPARSE), tmp_path_factory.mktemp("bundles") / "llava")


def facts(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((path / "bundle.json").read_text())
    return data


# ---------------------------------------------------------------------- what is written


def test_what_is_in_it(made: Path) -> None:
    names = {str(f.relative_to(made)) for f in made.rglob("*") if f.is_file()}
    graphs = {f"{n}.onnx" for n in ("embed", "vision", "language", "turn", "retrieve", "decode")}
    expected = {"bundle.json", "config.json", "recipe.json", "report.json", "weights-00001.bin"}
    assert graphs | expected | {"generation_config.json"} <= names
    data = facts(made)
    assert set(data["files"]) == names - {"bundle.json"}
    assert json.loads((made / "recipe.json").read_text()) == RECIPE
    assert data["versions"]["torch"] == torch.__version__
    assert data["prune"]["keep_ratio"] == 0.5
    assert data["opsets"]["sparsevila"] == 1
    decode = data["graphs"]["decode"]
    assert decode["inputs"]["cache_lens"] == {"dtype": "int32", "shape": ["batch"]}
    cache = decode["inputs"]["k_cache_0"]
    assert cache["dtype"] == "float"
    assert [s for s in cache["shape"] if isinstance(s, int)] == [2, 16]
    assert decode["outputs"]["k_cache_0_out"] == cache


def test_every_graph_passes_the_full_check(made: Path) -> None:
    for file in made.glob("*.onnx"):
        onnx.checker.check_model(str(file), full_check=True)


def test_graphs_share_one_copy_of_the_weights(made: Path) -> None:
    places: dict[str, set[tuple[str, str]]] = {}
    size = 0
    for file in made.glob("*.onnx"):
        for tensor in bundle.external_tensors(file):
            place = {e.key: e.value for e in tensor.external_data}
            assert int(place["offset"]) % 4096 == 0
            assert int(place["length"]) == bundle.byte_count(tensor)
            if tensor.name not in places:
                size += int(place["length"])
            places.setdefault(tensor.name, set()).add((place["location"], place["offset"]))
    assert len(places) > 20
    assert all(len(where) == 1 for where in places.values())
    written = sum(f.stat().st_size for f in made.glob("weights-*.bin"))
    assert size <= written < size + 4096 * len(places)
    assert sum(f.stat().st_size for f in made.glob("*.onnx")) < 1_000_000, "no weights inside"


def test_several_weight_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FILE_BYTES", 100_000)
    program = lowered("llava", *SPARSE)
    path = save(program, tmp_path / "a")
    assert len(facts(path)["weights"]) > 2
    prompt = tiny.inputs("llava", [[Image(1), *words(5)]])
    expected = in_torch(program).generate(**prompt, **tiny.greedy(8))
    assert torch.equal(load(path).generate(**prompt, **tiny.greedy(8)), expected)


def test_tied_weights_are_stored_once_where_their_layout_is_one(tmp_path: Path) -> None:
    """The table is read by rows, the head multiplies by its transpose: two layouts, no third."""
    tied, free = (
        save(lowered(name, *tiny.DENSE), tmp_path / name) for name in ("llava_tied", "llava")
    )
    sizes = [sum(f.stat().st_size for f in p.glob("weights-*.bin")) for p in (tied, free)]
    assert sizes[0] <= sizes[1]


def test_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, and wherever: no bundle, and the old one as it was."""
    program = lowered("llava", *SPARSE)
    old = save(program, tmp_path / "old")
    before = facts(old)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in (
        (bundle._Weights, "_write"),
        (bundle, "export_component"),
        (onnx.checker, "check_model"),
        (manifest, "file_sha256"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            for target in ("new", "old"):
                with pytest.raises(UserError, match="cannot write the bundle: No space left"):
                    save(program, tmp_path / target, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["old"]
    assert facts(old) == before
    load(old)


def test_one_kind_replaces_the_other_only_when_asked(made: Path, tmp_path: Path) -> None:
    program = lowered("llava", *SPARSE)
    path = save(program, tmp_path / "a")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        artifact.save(program, tiny.processor(), [], RECIPE, path)
    artifact.save(program, tiny.processor(), [], RECIPE, path, overwrite=True)
    assert not (path / "bundle.json").exists()
    save(program, path, overwrite=True)
    assert not (path / "artifact.json").exists()


# ---------------------------------------------------------------------- damage


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _flip], ids=["missing", "cut", "bit"])
def test_every_damage_is_named(damage: Callable[[Path], None], made: Path, tmp_path: Path) -> None:
    for file in sorted(f for f in made.rglob("*") if f.is_file()):
        name = file.relative_to(made)
        path = shutil.copytree(made, tmp_path / "copy")
        damage(path / name)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert name.name in str(caught.value) or name.name == "bundle.json"
        assert "\n" not in str(caught.value)
        shutil.rmtree(path)


def _resigned(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as an attacker would, who can compute hashes too."""
    data = facts(path)
    change(data)
    for name, of in data["files"].items():
        if (path / name).is_file() and isinstance(of, dict):
            of["bytes"] = (path / name).stat().st_size
            of["sha256"] = manifest.file_sha256(path / name)
    data["sha256"] = manifest.own_sha256(data)
    (path / "bundle.json").write_text(json.dumps(data))


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "file upwards": (lambda m: m["files"].update({"../x": {}}), "outside the bundle"),
    "absolute file": (lambda m: m["files"].update({"/etc/hostname": {}}), "outside the bundle"),
    "graph upwards": (lambda m: m["graphs"]["embed"].update(file="../x.onnx"), "does not list"),
    "unlisted weights": (lambda m: m["files"].pop("weights-00001.bin"), "does not list"),
    "no graph": (lambda m: m["graphs"].pop("decode"), "no graph decode"),
    "other op version": (lambda m: m["opsets"].update(sparsevila=9), "version 9 of the domain"),
    "other format": (lambda m: m.update(format=99), "bundle format 99; this version reads 1"),
    "caches": (lambda m: m.update(caches=7), "damaged"),
    "no opsets": (lambda m: m.pop("opsets"), "damaged"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_forged_manifests(forged: str, made: Path, tmp_path: Path) -> None:
    change, message = FORGED[forged]
    path = shutil.copytree(made, tmp_path / "a")
    _resigned(path, change)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert "bundle.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def _relocated(path: Path, **place: str) -> None:
    model = onnx.load(str(path / "embed.onnx"), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = place.get(entry.key, entry.value)
    (path / "embed.onnx").write_bytes(model.SerializeToString())
    _resigned(path, lambda m: None)


@pytest.mark.parametrize(
    "place, message",
    [
        ({"location": "../secret"}, "'../secret', which is not one of the bundle's weight files"),
        ({"location": "/etc/passwd"}, "'/etc/passwd', which is not one of the bundle's"),
        ({"location": "config.json"}, "'config.json', which is not one of the bundle's"),
        ({"offset": "99999999"}, "does not lie within weights-00001.bin"),
        ({"offset": "-4096"}, "does not lie within"),
        ({"length": "16"}, "does not lie within"),
        ({"offset": "x"}, "damaged"),
    ],
)
def test_external_data_outside_the_bundle(
    place: dict[str, str], message: str, made: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    (tmp_path / "secret").write_bytes(b"\0" * 100_000)
    _relocated(path, **place)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_external_data_hidden_in_an_attribute(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    model = onnx.load(str(path / "embed.onnx"), load_external_data=False)
    hidden = onnx.TensorProto(dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="/etc/hostname")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["planted"], value=hidden))
    (path / "embed.onnx").write_bytes(model.SerializeToString())
    _resigned(path, lambda m: None)
    with pytest.raises(UserError, match="external data outside its initializers"):
        load(path)


def test_an_opset_that_the_runtime_does_not_know(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    model = onnx.load(str(path / "embed.onnx"), load_external_data=False)
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = 999
    (path / "embed.onnx").write_bytes(model.SerializeToString())
    _resigned(path, lambda m: None)
    with pytest.raises(UserError, match=r"embed\.onnx: ONNX Runtime .* cannot run it: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_no_graph_at_all(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "a")
    (path / "embed.onnx").write_bytes(b"\xff" * 100)
    _resigned(path, lambda m: None)
    with pytest.raises(UserError, match=r"embed\.onnx: damaged: no ONNX graph"):
        load(path)


# ---------------------------------------------------------------------- providers


class _NoCuda:
    """An ONNX Runtime build for the CPU alone."""

    __version__ = "9.9"

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CPUExecutionProvider"]


def test_a_provider_that_is_missing_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner, "runtime", _NoCuda)
        with pytest.raises(UserError, match=r"provider cuda: .* lacks CUDAExecutionProvider"):
            load(made, provider="cuda")
    with pytest.raises(UserError, match="provider 'tpu' is unknown; take cpu, cuda or cuda:N"):
        load(made, provider="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="provider cuda: torch sees no CUDA device here"):
            load(made, provider="cuda")
        with pytest.raises(UserError, match="provider cuda: torch sees no CUDA device here"):
            load(made, device="cuda")


def test_a_provider_that_does_not_start_is_named(made: Path) -> None:
    """ONNX Runtime itself falls back to the CPU without a word; the runner does not."""
    if torch.cuda.is_available():
        pytest.skip("it starts here")
    with pytest.raises(UserError, match=r"provider cuda: CUDAExecutionProvider does not start"):
        runner.OnnxRunner(made, facts(made), torch.device("cuda", 0))


def test_provider_and_device(made: Path, tmp_path: Path) -> None:
    assert load(made, device="cpu").device == torch.device("cpu")
    assert load(made, provider="cpu", device="cpu").device == torch.device("cpu")
    with pytest.raises(UserError, match="provider cpu does not run on device cuda"):
        load(made, provider="cpu", device="cuda")
    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache")
    module = artifact.save(program, tiny.processor(), [], RECIPE, tmp_path / "module")
    with pytest.raises(UserError, match="is no ONNX bundle"):
        load(module, provider="cpu")


def test_a_type_that_the_provider_lacks(tmp_path: Path) -> None:
    program = trace(tiny.build("llava").to(torch.bfloat16))
    run_passes(program, tiny.make_passes("insert_kv_cache"), Context(), lowering=LowerToOnnx.of())
    path = save(program, tmp_path / "a")
    assert facts(path)["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="CPUExecutionProvider has no kernel for that type: take"):
        load(path, provider="cpu")


# ---------------------------------------------------------------------- the command


def run(*arguments: str | Path) -> int:
    return cli.run([str(a) for a in arguments])


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import tiny_checkpoint

    monkeypatch.setenv("COLUMNS", "200")
    tiny_checkpoint.write(tmp_path / "checkpoint")
    picture = tiny_checkpoint.picture(tmp_path / "a.png", 1)
    recipe = tmp_path / "r.yaml"
    text = """\
version: 1
model: {path: checkpoint, dtype: float32, device: cpu}
passes:
  - prune_visual_tokens: {keep_ratio: 0.5}
  - insert_kv_cache
  - sparsify_decode_attention: {keep_ratio: 0.5}
emit: {format: FORMAT, path: out/FORMAT}
"""
    said = {}
    for form in ("module", "onnx"):
        recipe.write_text(text.replace("FORMAT", form))
        assert run("compile", recipe, "--quiet") == 0
        capsys.readouterr()
        prompts = ("--prompt", "w20 w21", "--prompt", "w30")
        folder = tmp_path / "out" / form
        assert run("run", folder, "--image", picture, *prompts, "--max-new-tokens", "6") == 0
        said[form] = capsys.readouterr().out
    assert said["module"] == said["onnx"]
    report = json.loads((tmp_path / "out" / "onnx" / "report.json").read_text())
    assert report[-1]["name"] == "lower_to_onnx"
    assert set(report[-1]["implementations"].values()) >= {
        "sparsevila::ColumnReduce",
        "sparsevila::SelectTokens",
        "sparsevila::RetrievalAttention",
    }
    assert run("plan", recipe) == 0
    assert "lower_to_onnx (stage lower, added by the compiler)" in capsys.readouterr().out
    assert run("explain", recipe, "lower_to_onnx") == 0
    assert "sparsevila::RetrievalAttention" in capsys.readouterr().out.replace("\n", "")
    bundle_path = tmp_path / "out" / "onnx"
    for arguments in (
        ("--provider", "tpu"),
        ("--device", "cuda") if not torch.cuda.is_available() else ("--provider", "rocm"),
    ):
        assert run("run", bundle_path, "--image", picture, *arguments, "--prompt", "w20") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "provider" in err
    (bundle_path / "weights-00001.bin").unlink()
    assert run("run", bundle_path, "--image", picture, "--prompt", "w20") == 2
    err = capsys.readouterr().err
    assert err.endswith("weights-00001.bin: missing from the bundle; compile again\n")
    assert err.count("\n") == 1


def test_float8_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nmodel: {path: nowhere}\npasses:\n  - insert_kv_cache\n"
        "  - quantize_linear: {scheme: fp8}\nemit: {format: onnx, path: out}\n"
    )
    assert run("compile", recipe) == 2
    err = capsys.readouterr().err
    assert "r.yaml:5:23 passes[1].quantize_linear.scheme: ONNX Runtime has no float8 linear" in err
    assert err.count("\n") == 1
    with contextlib.suppress(FileNotFoundError):
        pytest.fail(f"written: {os.listdir(tmp_path / 'out')}")
