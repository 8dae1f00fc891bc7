"""``conv_to_linear``: patches that a kernel covers are multiplied, others stay convolved."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.pass_base import PassError, calls, tensor_of
from sparsevila_compile.passes.conv_to_linear import CONVOLUTIONS
from tests import tiny
from tests.passes.rules import check
from tests.tiny import Image, words


def test_patches_become_rows() -> None:
    program = tiny.at_stage("qwen", "canonicalize")
    [before] = [n for t in CONVOLUTIONS for n in calls(program, "vision", t)]
    weight = program.weights[str(before.args[1].target)]  # type: ignore[union-attr]
    report = check(program, "conv_to_linear")
    assert len(report.matches) == 1
    assert not [n for t in CONVOLUTIONS for n in calls(program, "vision", t)]
    name = next(k for k, w in program.weights.items() if w.data_ptr() == weight.data_ptr())
    assert torch.equal(program.weights[name], weight.flatten(1))
    first = next(calls(program, "vision", torch.ops.aten.linear.default))
    assert tensor_of(first.args[1]).shape == (weight.shape[0], weight[0].numel())  # type: ignore[arg-type]


def test_answers_do_not_change() -> None:
    prompt = tiny.inputs("qwen", [[Image(1), *words(6)], [*words(3), Image(2, (6, 8)), 40]])
    plain = tiny.compiled("qwen", "insert_kv_cache").generate(**prompt, **tiny.greedy(12))
    flat = tiny.compiled("qwen", "insert_kv_cache", "conv_to_linear")
    assert torch.equal(flat.generate(**prompt, **tiny.greedy(12)), plain)


def test_a_moving_kernel_is_left() -> None:
    program = tiny.at_stage("llava", "canonicalize")
    with pytest.raises(PassError, match="its kernel moves over its input"):
        tiny.step(program, "conv_to_linear")
