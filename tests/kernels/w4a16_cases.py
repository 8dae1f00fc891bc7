"""Inputs of the ``w4a16_linear`` tests, made from codes in float64, and when a result is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from sparsevila_compile.kernels.w4a16_linear import triton as implementation
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.packing import pack_int4
from sparsevila_compile.kernels.w4a16_linear.triton import MID_ROWS
from tests.kernels.compare import assert_catches_broken, bound_from

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Arguments of one call, and the float64 weight they were made from."""

    x: torch.Tensor
    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bias: torch.Tensor | None
    group_size: int
    weight: torch.Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        return self.x, self.qweight, self.scales, self.zero_points, self.bias, self.group_size

    def exact(self) -> torch.Tensor:
        out = self.x.double() @ self.weight.T
        return out if self.bias is None else out + self.bias.double()

    def terms(self) -> torch.Tensor:
        """Sum of the sizes of the terms of each output, float64: the scale of its rounding error."""
        sizes = self.x.double().abs() @ self.weight.abs().T
        return sizes if self.bias is None else sizes + self.bias.double().abs()

    def eager(self) -> torch.Tensor:
        """What the same linear gives in x's dtype, its weight rounded to that dtype."""
        bias = None if self.bias is None else self.bias.to(self.x.dtype)
        return torch.nn.functional.linear(self.x, self.weight.to(self.x.dtype), bias)


def make_case(
    shape: tuple[int, ...],
    outputs: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    scale_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Codes and zero points over their whole range, scales that differ by a factor of ten."""
    generator = torch.Generator(device).manual_seed(seed)
    on = {"generator": generator, "device": device}
    channels = shape[-1]
    groups = (outputs, channels // group_size)
    codes = torch.randint(0, 16, (outputs, channels), **on)
    zero_points = torch.randint(0, 16, groups, **on).to(torch.uint8)
    scales = (0.005 + 0.045 * torch.rand(groups, **on)).to(scale_dtype or dtype)
    centered = codes.double() - zero_points.double().repeat_interleave(group_size, 1)
    return Case(
        x=torch.randn(shape, **on).to(dtype),
        qweight=pack_int4(codes),
        scales=scales,
        zero_points=zero_points,
        bias=torch.randn(outputs, **on).to(dtype) if bias else None,
        group_size=group_size,
        weight=centered * scales.double().repeat_interleave(group_size, 1),
    )


def watched(monkeypatch: pytest.MonkeyPatch, launch: str) -> list[int]:
    """The rows of each call of the implementation's ``launch``, which goes on as before."""
    calls: list[int] = []
    real = getattr(implementation, launch)

    def spy(x: torch.Tensor, *args: object) -> None:
        calls.append(x.shape[0])
        real(x, *args)

    monkeypatch.setattr(implementation, launch, spy)
    return calls


def at_odd_addresses(case: Case) -> Case:
    """The case with stored tensors that begin anywhere, and rows of another x that lie further apart
    than they are long."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        longer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return longer[1:].view(tensor.shape).copy_(tensor)

    rows, channels = case.x.shape
    wide = torch.randn(rows, channels + 3, device=case.x.device).to(case.x.dtype)
    return replace(
        case,
        x=wide[:, 3:],
        qweight=moved(case.qweight),
        scales=moved(case.scales),
        zero_points=moved(case.zero_points),
    )


def assert_sums_right(out: torch.Tensor, case: Case) -> None:
    """Each output is its float32 sum, rounded once to x's dtype.

    A sum errs with the size of its terms: where they cancel, its own size says nothing. Allowed are
    four roundings of the terms in float32, and one of the result (half a unit, doubled). With more
    rows than MID_ROWS 16-bit weights are rounded, half a unit each, and the library may add a few
    partial sums in 16 bits.
    """
    exact = case.exact()
    assert out.shape == exact.shape
    allowed = 4 * torch.finfo(torch.float32).eps * case.terms()
    if out.dtype != torch.float32:
        allowed += torch.finfo(out.dtype).eps * exact.abs()
        if case.x.shape[:-1].numel() > MID_ROWS:
            allowed += torch.finfo(out.dtype).eps * case.terms()
    off = (out.double() - exact).abs()
    wrong = ~(off <= allowed)  # NaN is wrong
    worst = float((off / allowed.clamp_min(1e-300)).max())
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} off by up to {worst:.3g} x allowed"
    )


def assert_right_and_repeatable(case: Case) -> None:
    """The Triton implementation's sums are right, with bias and without, and the same every time;
    and the comparison would notice a broken result."""
    out = OP.overload(*case.args, impl="triton")
    assert_sums_right(out, case)
    exact = case.exact()
    assert_catches_broken(out, exact, bound_from(case.eager(), exact))
    for _ in range(3):
        assert torch.equal(out, OP.overload(*case.args, impl="triton")), "differs from run to run"
    bare = replace(case, bias=None)
    assert_sums_right(OP.overload(*bare.args, impl="triton"), bare)
