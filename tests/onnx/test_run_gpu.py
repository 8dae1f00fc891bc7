"""Bundles on the CUDA provider: the tokens of the CPU provider, caches on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsevila_compile.model import load
from tests import tiny
from tests.onnx.made import SPARSE, lowered, save
from tests.tiny import Image, words

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("passes", [SPARSE, tiny.DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_cuda_answers_as_the_cpu_does(
    name: str, passes: tuple[tiny.Spec, ...], tmp_path: Path
) -> None:
    path = save(lowered(name, *passes), tmp_path / "bundle")
    host, device = load(path, provider="cpu"), load(path, provider="cuda")
    assert device.device.type == "cuda"
    rows: list[list[tiny.Item]] = [[Image(1, (4, 8)), *words(5)], list(words(3))]
    left, right = host.conversation(2), device.conversation(2)
    was = torch.backends.cuda.matmul.allow_tf32
    assert not was, "products in full float32"
    for turn in range(3):
        prompt = tiny.inputs(name, rows)
        expected = host.generate(**prompt, conversation=left, **tiny.greedy(16))
        found = device.generate(**prompt, conversation=right, **tiny.greedy(16))
        assert device.usage == host.usage, "both retrieve, or neither does"
        assert torch.equal(found.cpu(), expected)
        assert right.cache is not None
        assert {t.device.type for t in right.cache.tensors.values()} == {"cuda"}
        answers = expected[:, prompt["input_ids"].shape[1] :].tolist()
        rows = [tiny.continued(r, a, *words(2, turn)) for r, a in zip(rows, answers, strict=True)]


def test_weights_are_on_the_device_once(tmp_path: Path) -> None:
    path = save(lowered("llava", *SPARSE), tmp_path / "bundle")
    written = sum(f.stat().st_size for f in path.glob("weights-*.bin"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(path, provider="cuda")
    held = torch.cuda.memory_allocated() - before
    assert written / 2 < held < written + (8 << 20)
    del model
