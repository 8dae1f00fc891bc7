"""``lower_ops``: every canonical op is bound, once, and what was passed over is said."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.pass_base import PassError
from sparsevila_compile.passes.lower_ops import canonical_op
from sparsevila_compile.program import Program
from tests import tiny
from tests.passes.rules import check
from tests.tiny import Image, words

PASSES: tuple[tiny.Spec, ...] = (
    "canonicalize",
    ("prune_visual_tokens", {"keep_ratio": 0.5}),
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.5}),
)
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without GPU does")


def bound(program: Program) -> dict[str, str]:
    return {
        f"{c.name}/{n.name}": str(n.kwargs["impl"])
        for c in program.components.values()
        for n in c.graph.nodes
        if canonical_op(n) is not None
    }


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_op_is_bound(name: str) -> None:
    program = tiny.at_stage(name, *PASSES)
    ops = [n for c in program.components.values() for n in c.graph.nodes if canonical_op(n)]
    # vision: attention of the layers that are left, one reduction, one selection; language: two
    # cached; turn: two cached, two reductions; decode: two retrieving; retrieve: one selection
    left = 4 if name == "qwen" else 2
    assert len(ops) == left + 2 + 2 + 4 + 2 + 1
    assert not any("impl" in n.kwargs for n in ops)
    report = check(program, "lower_ops")
    assert len(report.matches) == len(ops)
    assert report.implementations == bound(program)
    assert len(report.implementations) == len(ops)
    assert sum(report.notes["bound"].values()) == len(ops)


@CPU_ONLY
def test_fallbacks_are_said() -> None:
    program = tiny.at_stage("llava", *PASSES)
    [report] = tiny.step(program, "lower_ops")
    assert set(report.implementations.values()) <= {"library", "reference"}
    passed_over = set()
    for component in program.components.values():
        for node in component.graph.nodes:
            if (op := canonical_op(node)) is None:
                continue
            for better in op.implementations:
                if better == node.kwargs["impl"]:
                    break
                passed_over.add(f"{op.name}: {better}")
    assert set(report.fallbacks) == passed_over
    assert all(report.fallbacks.values()), "each with its reason"
    assert {"column_reduce: triton", "select_tokens: triton"} <= passed_over


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_forced_reference_gives_the_same_answers(name: str) -> None:
    ops = ("attention", "cached_attention", "retrieval_attention", "column_reduce", "select_tokens")
    forced: tiny.Spec = ("lower_ops", {"implementations": dict.fromkeys(ops, "reference")})
    model = tiny.compiled(name, *PASSES, forced)
    assert set(bound(model.program).values()) == {"reference"}
    prompt = tiny.inputs(name, [[Image(1), *words(5)], words(3), [Image(2, (8, 4)), 44]])
    chosen = tiny.compiled(name, *PASSES)
    assert torch.equal(
        model.generate(**prompt, **tiny.greedy(24)), chosen.generate(**prompt, **tiny.greedy(24))
    )


@pytest.mark.parametrize(
    "implementations,message",
    [
        ({"atention": "reference"}, "there is no op atention; there are add_rms_norm, attention,"),
        ({"attention": "cuda"}, "attention has no implementation 'cuda'; it has"),
        ({"w4a16_linear": "reference"}, "no w4a16_linear in the graph; remove the entry"),
    ],
)
def test_refused(implementations: dict[str, str], message: str) -> None:
    program = tiny.at_stage("llava", *PASSES)
    with pytest.raises(PassError, match=message):
        tiny.step(program, ("lower_ops", {"implementations": implementations}))
    assert not any("impl" in n.kwargs for c in program.components.values() for n in c.graph.nodes)


@CPU_ONLY
def test_an_implementation_that_cannot_run_here_is_refused() -> None:
    program = tiny.at_stage("llava", *PASSES)
    with pytest.raises(PassError, match="attention cannot be triton: "):
        tiny.step(program, ("lower_ops", {"implementations": {"attention": "triton"}}))
