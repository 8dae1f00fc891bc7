"""``fuse_rms_norm``: what it matches, that results stay, and each miss with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsevila_compile.ops import ADD_RMS_NORM
from sparsevila_compile.passes import fuse_rms_norm as module
from sparsevila_compile.program import Program
from tests import tiny
from tests.kernels.compare import assert_close_to
from tests.passes.fusing import misses, program_of, result
from tests.passes.quantizing import outputs, prompt, rtn
from tests.passes.rules import check, count

PASS = "fuse_rms_norm"
RSQRT = torch.ops.aten.rsqrt.default
EPS = 1e-5
WIDTH = 8

# Layers of language (two norms each, and a last one) and of vision. Nothing is added before the
# first norm of a component; the merger's norm of Qwen2.5-VL follows the last addition.
NORMS = {"llava": (5, 0), "llava_siglip": (5, 0), "qwen": (5, 9)}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_models(name: str, quantized: bool) -> None:
    program = tiny.at_stage(name, "canonicalize", *tiny.FULL)
    if quantized:
        rtn(program)
    before = {c: outputs(program, c, prompt(name)) for c in ("language", "vision")}
    report = check(program, PASS)
    language, vision = NORMS[name]
    assert report.misses == ()
    for component in ("language", "turn", "decode"):
        assert count(program, component, ADD_RMS_NORM) == language
        assert count(program, component, RSQRT) == 0
    assert count(program, "vision", ADD_RMS_NORM) == vision
    assert report.notes["without_addition"] == 3 + (vision > 0)
    assert report.notes["with_addition"] == 3 * (language - 1) + max(vision - 1, 0)
    for component, wanted in before.items():
        assert_close_to(outputs(program, component, prompt(name)), wanted, 1e-6, component)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def fused(
    function: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16, more: int = 0
) -> tuple[Program, Tensor, Tensor]:
    """The program after the pass, and its result after and before."""
    inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = dict.fromkeys(
        ("x", "y")[: 1 + more], (dtype, ("rows", WIDTH))
    )
    weights = {"w": (1 + 0.2 * torch.randn(WIDTH)).to(dtype)}
    program = program_of(function, inputs, weights)
    given = [torch.randn(5, WIDTH).to(dtype) for _ in inputs]
    before = result(program, *given)
    check(program, PASS)
    return program, result(program, *given), before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm(dtype: torch.dtype) -> None:
    program, after, before = fused(norm, dtype)
    assert torch.equal(after, before)
    assert {n.target for n in program.component("language").graph.nodes} >= {ADD_RMS_NORM}
    assert count(program, "language", torch.ops.aten.mul.Tensor) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addition_with_other_uses(dtype: torch.dtype) -> None:
    """The sum goes on as the residual; uses before the norm and after it see the op's result."""

    def layer(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        h = x + y
        early = h * 2
        return norm(h, w) + h + early

    program, after, before = fused(layer, dtype, more=1)
    assert torch.equal(after, before)
    assert count(program, "language", ADD_RMS_NORM) == 1
    assert count(program, "language", torch.ops.aten.add.Tensor) == 2


def test_a_sum_with_two_norms_is_added_once() -> None:
    def one_sum(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = x + y
        return norm(h, w) * norm(h, v) + h

    program = program_of(
        one_sum,
        dict.fromkeys(("x", "y"), (torch.float32, ("rows", WIDTH))),
        {n: torch.randn(WIDTH) for n in ("w", "v")},
    )
    given = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    before = result(program, *given)
    report = check(program, PASS)
    assert report.notes == {"with_addition": 1, "without_addition": 1}
    assert torch.equal(result(program, *given), before)


@pytest.mark.parametrize("scale", [1, 2])
def test_only_plain_sums_of_one_shape(scale: int) -> None:
    """A broadcast or scaled addition stays in front of the norm."""

    def layer(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return norm(torch.add(x, y[:1] if scale == 1 else y, alpha=scale), w)

    program, after, before = fused(layer, more=1)
    assert torch.equal(after, before)
    assert count(program, "language", torch.ops.aten.add.Tensor) == 1


def test_the_product_with_itself_is_a_square() -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return w * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    _, after, before = fused(layer)
    assert torch.equal(after, before)


def cubes(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def first_dim(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + EPS)).to(x.dtype)


def no_eps(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def root_used(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * (wide * root).to(x.dtype) + root.to(x.dtype)


def scales_another(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * ((wide + 1) * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def low_precision(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def weight_before_rounding(x: Tensor, w: Tensor) -> Tensor:
    """Gemma's: the weight is applied in float32, and one is added to it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * w.float()).to(x.dtype)


def one_plus(x: Tensor, w: Tensor) -> Tensor:
    return norm(x, w + 1)


def no_weight(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) + w


@pytest.mark.parametrize(
    "function, reason",
    [
        (cubes, module.NO_MEAN_SQUARE),
        (first_dim, module.NO_MEAN_SQUARE),
        (no_eps, module.NO_MEAN_SQUARE),
        (root_used, module.NOT_SCALED),
        (scales_another, module.NOT_SCALED),
        (low_precision, "the mean square is not computed in float32"),
        (weight_before_rounding, module.ROUNDED_OTHERWISE),
        (one_plus, module.NO_WEIGHT),
        (no_weight, module.NO_WEIGHT),
    ],
)
def test_misses(function: Callable[..., Tensor], reason: str) -> None:
    inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
        "x": (torch.bfloat16, ("rows", WIDTH))
    }
    program = program_of(function, inputs, {"w": torch.randn(WIDTH).bfloat16()})
    before = str(program.component("language").graph)
    [report] = tiny.step(program, (PASS, {"optional": True}))
    assert report.matches == ()
    assert misses(report) == {reason: 1}
    assert str(program.component("language").graph) == before
