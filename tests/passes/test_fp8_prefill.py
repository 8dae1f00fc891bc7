"""``fp8_prefill``: prompts in float8, decode as it was."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.ops import W4A8_LINEAR, W4A16_LINEAR
from sparsevila_compile.pass_base import calls
from tests import tiny
from tests.passes.rules import check
from tests.tiny import Image, words

PASSES: tuple[tiny.Spec, ...] = (
    "canonicalize",
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.5}),
    ("quantize_linear", {"method": "rtn", "group_size": 32}),
)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_prefill_is_rewritten_and_decode_is_not(name: str) -> None:
    program = tiny.at_stage(name, *PASSES)
    before = {c: len(list(calls(program, c, W4A16_LINEAR))) for c in ("language", "turn", "decode")}
    assert min(before.values()) > 0
    report = check(program, ("fp8_prefill", {"min_rows": 9}))
    assert len(report.matches) == before["language"] + before["turn"]
    assert {m.reason for m in report.misses} == {"not a prefill component"}
    for component in ("language", "turn"):
        new = list(calls(program, component, W4A8_LINEAR))
        assert len(new) == before[component]
        assert {n.args[6] for n in new} == {9}
        assert not list(calls(program, component, W4A16_LINEAR))
    assert len(list(calls(program, "decode", W4A16_LINEAR))) == before["decode"]


def test_few_rows_answer_as_before_and_many_nearly() -> None:
    """Below min_rows nothing changes, to the bit; above, logits move by float8's rounding."""
    quantized = PASSES[1:]
    prompt = tiny.inputs("llava", [[Image(1), *words(6)]])
    logits = []
    for specs in (
        quantized,
        (*quantized, ("fp8_prefill", {"min_rows": 4096})),
        (*quantized, ("fp8_prefill", {"min_rows": 1})),
    ):
        model = tiny.compiled("llava", *specs)
        out: list[torch.Tensor] = []

        def note(
            ids: torch.Tensor, scores: torch.Tensor, into: list[torch.Tensor] = out
        ) -> torch.Tensor:
            into.append(scores.clone())
            return scores

        model.generate(**prompt, **tiny.greedy(1), logits_processor=[note])
        logits.append(out[0])
    plain, few, many = logits
    assert torch.equal(few, plain)
    error = float((many - plain).norm() / plain.norm())
    assert 0.003 < error < 0.3
