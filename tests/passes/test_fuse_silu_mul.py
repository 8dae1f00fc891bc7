"""``fuse_silu_mul``: what it matches, that results stay, and each miss with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from sparsevila_compile.ops import SILU_MUL
from sparsevila_compile.passes.fuse_silu_mul import NOT_MULTIPLIED
from tests import tiny
from tests.kernels.compare import assert_close_to
from tests.passes.fusing import misses, program_of, result
from tests.passes.quantizing import outputs, prompt
from tests.passes.rules import check, count

PASS = "fuse_silu_mul"
VISION = {"llava": 0, "llava_siglip": 0, "qwen": 4}  # CLIP and SigLIP have other activations


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str, merged: bool) -> None:
    program = tiny.at_stage(name, "canonicalize", *tiny.FULL)
    before = {c: outputs(program, c, prompt(name)) for c in ("language", "vision")}
    if merged:
        tiny.step(program, "merge_linears")
    report = check(program, PASS)
    assert report.misses == ()
    for component in ("language", "turn", "decode"):
        assert count(program, component, SILU_MUL) == 2
        assert count(program, component, torch.ops.aten.silu.default) == 0
    assert count(program, "vision", SILU_MUL) == VISION[name]
    for component, wanted in before.items():
        assert_close_to(outputs(program, component, prompt(name)), wanted, 1e-5, component)


def program(function: Callable[..., Tensor], width: int | str = 8) -> tuple[tiny.Program, Tensor]:
    dtype = torch.bfloat16
    made = program_of(function, {"x": (dtype, ("rows", 8)), "y": (dtype, ("rows", width))}, {})
    return made, torch.randn(5, 8).to(dtype)


@pytest.mark.parametrize(
    "function", [lambda x, y: silu(x) * y, lambda x, y: y * silu(x), lambda x, y: silu(x) * x]
)
def test_order_of_factors(function: Callable[..., Tensor]) -> None:
    made, x = program(function)
    y = torch.randn(5, 8).bfloat16()
    before = result(made, x, y)
    check(made, PASS)
    assert torch.equal(result(made, x, y), before)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x, y: silu(x) + y, NOT_MULTIPLIED),
        (lambda x, y: silu(x) * 2 + y, NOT_MULTIPLIED),
        (lambda x, y: (s := silu(x)) * y + s, NOT_MULTIPLIED),
        (lambda x, y: torch.square(silu(x)) * y, NOT_MULTIPLIED),
        (lambda x, y: silu(x) * y[:1], "silu is multiplied by a value of another shape or dtype"),
        (
            lambda x, y: silu(x) * y.float(),
            "silu is multiplied by a value of another shape or dtype",
        ),
    ],
)
def test_misses(function: Callable[..., Tensor], reason: str) -> None:
    made, _ = program(function)
    before = str(made.component("language").graph)
    [report] = tiny.step(made, (PASS, {"optional": True}))
    assert report.matches == ()
    assert misses(report) == {reason: 1}
    assert str(made.component("language").graph) == before
