"""``fuse_rotary``: what it matches, that results stay, and each miss with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsevila_compile.ops import ATTENTION, ROTARY
from sparsevila_compile.passes import fuse_rotary as module
from sparsevila_compile.program import Program
from tests import tiny
from tests.kernels.compare import assert_close_to
from tests.passes.fusing import misses, program_of, result
from tests.passes.quantizing import outputs, prompt
from tests.passes.rules import check, count

PASS = "fuse_rotary"
NEG = torch.ops.aten.neg.default
VISION = {"llava": 0, "llava_siglip": 0, "qwen": 4}  # CLIP and SigLIP learn their positions


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str, merged: bool) -> None:
    program = tiny.at_stage(name, "canonicalize", *tiny.FULL)
    before = {c: outputs(program, c, prompt(name)) for c in ("language", "vision")}
    if merged:
        tiny.step(program, "merge_linears")
    report = check(program, PASS)
    assert report.misses == ()
    assert len(report.matches) == 3 * 2 + VISION[name]
    for component in ("language", "turn", "decode"):
        assert count(program, component, ROTARY) == 2
        assert count(program, component, NEG) == 0
    assert count(program, "vision", ROTARY) == VISION[name]
    for component, wanted in before.items():
        assert_close_to(outputs(program, component, prompt(name)), wanted, 1e-5, component)


@pytest.mark.parametrize("name", ["llava_windowed", "llava_yarn", "qwen_windowed"])
def test_other_configurations(name: str) -> None:
    program = tiny.at_stage(name, "canonicalize", *tiny.DENSE)
    before = outputs(program, "language", prompt(name))
    assert check(program, PASS).misses == ()
    assert_close_to(outputs(program, "language", prompt(name)), before, 1e-6, name)


def half(x: Tensor) -> Tensor:
    """As transformers writes it."""
    n = x.shape[-1] // 2
    return torch.cat((-x[..., n:], x[..., :n]), dim=-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + half(x) * sin.unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ATTENTION(q, k, v, None, 0.5, False, 0)  # type: ignore[no-any-return]


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attend(turned(q, cos, sin), turned(k, cos, sin), k)


def program(
    function: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16, tables: Any = None
) -> tuple[Program, list[Tensor]]:
    """A program of q and k ``[1, H, S, 8]`` and tables ``[1, S, 8]``, and values for them."""
    inputs = {
        "q": (dtype, (1, 4, "length", 8)),
        "k": (dtype, (1, 2, "length", 8)),
        "cos": (tables or dtype, (1, "length", 8)),
        "sin": (tables or dtype, (1, "length", 8)),
    }
    shapes = [[5 if s == "length" else s for s in shape] for _, shape in inputs.values()]
    values = [torch.randn(s).to(d) for s, (d, _) in zip(shapes, inputs.values(), strict=True)]
    return program_of(function, inputs, {}), values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain(dtype: torch.dtype) -> None:
    made, values = program(plain, dtype)
    before = result(made, *values)
    report = check(made, PASS)
    assert len(report.matches) == 1
    assert torch.equal(result(made, *values), before)


def test_wider_tables_with_casts() -> None:
    """As vision encoders do it: in float32, and back."""

    def cast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def one(x: Tensor) -> Tensor:
            return turned(x.float(), cos, sin).to(x.dtype)

        return attend(one(q), one(k), k)

    made, values = program(cast, tables=torch.float32)
    before = result(made, *values)
    check(made, PASS)
    assert torch.equal(result(made, *values), before)


def lower_negated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        rotated = torch.cat((x[..., 4:], -x[..., :4]), dim=-1)
        return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)

    return attend(one(q), one(k), k)


def subtracted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return x * cos.unsqueeze(1) - half(x) * sin.unsqueeze(1)

    return attend(one(q), one(k), k)


def table_for_each_head(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        heads = cos.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
        return x * heads + half(x) * sin.unsqueeze(1)

    return attend(one(q), one(k), k)


def not_cast_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return turned(x.float(), cos, sin)

    return attend(one(q), one(k), k.float()).bfloat16()


def only_q(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attend(turned(q, cos, sin), k, k)


def other_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attend(turned(q, cos, sin), turned(k, sin, cos), k)


def used_before(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first = turned(q, cos, sin)
    scaled = first * 2
    return attend(first, turned(k, cos, sin), k) + scaled.transpose(1, 2)


@pytest.mark.parametrize(
    "function, reason, sites",
    [
        (lower_negated, module.NOT_TURNED, 2),
        (subtracted, module.NO_SUM, 2),
        (table_for_each_head, module.NO_TABLE, 2),
        (not_cast_back, module.NOT_CAST_BACK, 2),
        (only_q, module.ALONE, 1),
        (other_tables, module.ALONE, 2),
        (used_before, module.TOO_EARLY, 2),
    ],
)
def test_misses(function: Callable[..., Tensor], reason: str, sites: int) -> None:
    made, _ = program(function, tables=torch.float32 if function is not_cast_back else None)
    before = str(made.component("language").graph)
    [report] = tiny.step(made, (PASS, {"optional": True}))
    assert report.matches == ()
    assert misses(report) == {reason: sites}
    assert str(made.component("language").graph) == before
