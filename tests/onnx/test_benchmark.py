"""The ONNX benchmarks: profiles that are read, reports that outlive what fails."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from benchmarks.onnx_placement import read_profile
from benchmarks.onnx_run import Run
from sparsevila_compile.onnx import bundle
from sparsevila_compile.onnx import runner as runner_module
from sparsevila_compile.onnx.runner import OnnxRunner
from tests import tiny
from tests.onnx.made import lowered, save


def opened(folder: Path, profile: Path | None = None) -> OnnxRunner:
    _, manifest = bundle.load_bundle(folder)
    graphs = {"embed": manifest["graphs"]["embed"]}
    return OnnxRunner(folder, {**manifest, "graphs": graphs}, torch.device("cpu"), profile)


def test_a_profile_of_a_run(tmp_path: Path) -> None:
    runner = opened(save(lowered("llava", *tiny.DENSE), tmp_path / "bundle"), tmp_path)
    for _ in range(3):
        runner.run("embed", {"input_ids": torch.tensor([[1, 2]])})
    found = read_profile(runner.end_profiling()["embed"], 3)
    assert found["nodes"] == {"CPUExecutionProvider": 1.0}
    assert list(found["microseconds"]) == ["Gather"]
    assert found["copies"] == {}
    assert found["largest copy"] == 0


def test_copies_over_the_bus_are_found(tmp_path: Path) -> None:
    def node(op: str, shape: list[int], provider: str = "CUDAExecutionProvider") -> dict[str, Any]:
        shapes = [{"float": shape}]
        facts = {"op_name": op, "provider": provider, "output_type_shape": shapes}
        return {"cat": "Node", "name": f"{op}_kernel_time", "dur": 6, "args": facts}

    events = [node("MatMul", [1, 8]), node("If", [1]), node("Shape", [4], "CPUExecutionProvider")]
    events += [node("MemcpyToHost", [1]), node("MemcpyFromHost", [2, 3, 4])]
    (tmp_path / "profile.json").write_text(json.dumps([{"cat": "Session"}, *events * 2]))
    found = read_profile(tmp_path / "profile.json", 2)
    assert found["nodes"] == {"CPUExecutionProvider": 1, "CUDAExecutionProvider": 4}
    assert found["copies"] == {"MemcpyFromHost float [2, 3, 4]": 1, "MemcpyToHost float [1]": 1}
    assert found["largest copy"] == 24
    assert "If" not in found["microseconds"]


def test_ops_left_to_the_cpu_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU's sessions; here the sessions are a CPU's, so everything is left to it."""
    folder = save(lowered("llava", *tiny.DENSE), tmp_path / "bundle")
    runner = opened(folder)
    assert runner.on_host == {}
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    file = str(folder / "embed.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    monkeypatch.setattr(runner, "device", torch.device("cuda"))
    monkeypatch.setattr(runner_module, "HOST_OPS", frozenset())
    with pytest.warns(UserWarning, match="CUDAExecutionProvider has no kernels for Gather × 1;"):
        runner._placed("embed", folder / "embed.onnx", session)
    assert runner.on_host == {"embed": Counter({"Gather": 1})}


def test_a_report_outlives_what_fails(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run = Run({"environment": 1}, out, seconds=60)

    def broken() -> int:
        raise RuntimeError("no kernel\nimage")

    assert run.step("one", lambda: 3) == 3
    run.put("table", {"ms": 1}, "model")
    assert run.step("two", broken) is None
    late = Run(run.report, out, seconds=-1)
    assert late.step("three", lambda: 3) is None
    report = json.loads(out.read_text())
    assert report["model"] == {"table": {"ms": 1}}
    assert report["left out"]["two"] == "RuntimeError: no kernel image"
    assert report["left out"]["three"].startswith("no time: 0 s of -1 s")
