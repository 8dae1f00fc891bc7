"""Bundles of the trained card model: greedy tokens, logits and int4 beside the module artifact's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.onnx_agreement import DENSE, INT4, SPARSE, agree, compiled, error_against, held_out

DIALOGUES = 10


@pytest.mark.slow
@pytest.mark.parametrize("passes", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_tokens_and_logits(passes: list[object], tmp_path: Path) -> None:
    module = compiled(passes, "module", tmp_path / "module")
    bundle = compiled(passes, "onnx", tmp_path / "onnx")
    found = agree(module, bundle, held_out(DIALOGUES))
    assert found.turns == 4 * DIALOGUES
    assert found.tokens > 2 * found.turns, "answers of several tokens"
    assert found.equal_dialogues == DIALOGUES
    assert 0 < found.worst_logits < 1e-4  # 3e-6 was measured over 100


@pytest.mark.slow
def test_int4_is_as_far_from_float_as_the_module(tmp_path: Path) -> None:
    exact = compiled(DENSE, "module", tmp_path / "exact")
    passes = [*DENSE, INT4]
    module = compiled(passes, "module", tmp_path / "module")
    bundle = compiled(passes, "onnx", tmp_path / "onnx")
    samples = held_out(DIALOGUES)
    ours, theirs = (error_against(m, exact, samples) for m in (module, bundle))
    assert 0.005 < ours < 0.1, "int4 costs something, and not all"
    assert theirs < 1.05 * ours
    assert error_against(bundle, module, samples) < 1e-3
