"""``w4a8_linear``: exactly ``w4a16_linear`` for few rows, float8 on both sides for many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevila_compile.kernels.triton_support import cuda_or_interpreter
from sparsevila_compile.kernels.w4a8_linear import reference
from sparsevila_compile.kernels.w4a8_linear.op import OP
from sparsevila_compile.kernels.w4a8_linear.triton import to_float8
from sparsevila_compile.kernels.w4a16_linear.op import OP as W4A16
from sparsevila_compile.kernels.w4a16_linear.packing import dequantize, pack_int4
from tests.kernels.compare import assert_catches_broken, assert_close_to

Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

FLOAT8_STEP = 2.0**-4
"""The largest relative error of rounding a normal number to float8_e4m3fn."""


def stored(rows: int, channels: int, group: int, device: torch.device, seed: int = 0) -> Stored:
    """A random weight whose groups differ in size by a factor of ten."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, channels), generator=g)
    shape = (rows, channels // group)
    scales = torch.rand(shape, generator=g) * 0.09 + 0.01
    zeros = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
    return pack_int4(codes).to(device), scales.to(device), zeros.to(device)


def case(
    rows: int, n: int, k: int, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Stored, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, k, generator=g) * torch.logspace(-1, 1, rows)[:, None]
    bias = torch.randn(n, generator=g)
    return x.to(device, dtype), stored(n, k, group, device), bias.to(device, dtype)


def test_weight_in_float8_stands_for_the_stored_one(device: torch.device) -> None:
    weight = stored(40, 256, 64, device)
    exact = dequantize(*weight, 64).double()
    codes, channel = reference.to_float8(*weight, 64)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().isfinite().all()
    back = codes.double() * channel.double()[:, None]
    smallest = channel.double()[:, None] * 2.0**-6  # below it float8 is subnormal
    assert bool(((back - exact).abs() <= FLOAT8_STEP * exact.abs().maximum(smallest)).all())
    # The scale is no larger than the format needs: the top of the range is used.
    assert float(codes.float().abs().max()) > 200


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(5, 128), (33, 384), (64, 1152)])
def test_triton_unpacks_as_the_reference(
    shape: tuple[int, int], group: int, device: torch.device, poisoned_memory: None
) -> None:
    reason = cuda_or_interpreter(device)
    if reason is not None:
        pytest.skip(reason)
    weight = stored(*shape, group, device)
    expected, expected_scales = reference.to_float8(*weight, group)
    codes, scales = to_float8(*weight, group)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert float(expected.float().norm()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_few_rows_are_w4a16(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = case(3, 48, 256, 64, dtype, device)
    out = OP.overload(x, *weight, bias, 64, 4, impl=impl)
    assert torch.equal(out, W4A16.overload(x, *weight, bias, 64, impl=impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_many_rows_are_float8(
    with_bias: bool, impl: str, dtype: torch.dtype, device: torch.device, poisoned_memory: None
) -> None:
    """Against float64 on the float8 values, and against the weight as stored."""
    x, weight, bias = case(19, 40, 384, 128, dtype, device)
    given = bias if with_bias else None
    codes, channel = reference.to_float8(*weight, 128)
    amax = x.double().abs().amax(1, keepdim=True)
    tokens = (x.float() * (448 / amax).float()).to(torch.float8_e4m3fn).double() * amax / 448
    added = bias.double() if with_bias else 0.0
    exact = tokens @ (codes.double() * channel.double()[:, None]).T + added
    out = OP.overload(x, *weight, given, 128, 19, impl=impl)
    assert out.dtype == dtype
    bound = 4e-3 if dtype == torch.bfloat16 else 2e-3  # on a GPU, the matrix units' float8 sums
    assert_close_to(out, exact, bound, f"float8 products, {impl}")
    assert_catches_broken(out, exact, bound)
    # Rounding twice costs about 2^-5.2 of the size a side; the product without it is near, not equal.
    plain = x.double() @ dequantize(*weight, 128).double().T + added
    error = float((out.double() - plain).norm() / plain.norm())
    assert 0.005 < error < 0.06


def test_opcheck(device: torch.device) -> None:
    x, weight, bias = case(6, 16, 128, 64, torch.float32, device)
    for min_rows in (1, 100):
        torch.library.opcheck(OP.overload, (x, *weight, bias, 64, min_rows))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(3584, 4608), (3584, 37888), (18944, 3584)])
@pytest.mark.parametrize("rows", [1024, 4099])
def test_full_size(rows: int, k: int, n: int) -> None:
    device: Any = torch.device("cuda")
    x, weight, bias = case(rows, n, k, 128, torch.bfloat16, device)
    expected = OP.overload(x, *weight, bias, 128, 256, impl="reference")
    out = OP.overload(x, *weight, bias, 128, 256, impl="triton")
    assert_close_to(out, expected, 6e-3, f"{rows} x {k} x {n}")
    assert_catches_broken(out, expected, 6e-3)
