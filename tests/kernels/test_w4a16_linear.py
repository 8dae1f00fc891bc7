"""``w4a16_linear``: layout, reference and Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_compile.kernels.triton_support import cuda_or_interpreter
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.packing import (
    GROUP_SIZES,
    dequantize,
    pack_int4,
    unpack_int4,
)
from sparsevila_compile.kernels.w4a16_linear.triton import FEW_ROWS
from tests.kernels.compare import assert_catches_broken, assert_close_to, bound_from

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
        return torch.nn.functional.linear(self.x, self.weight.to(self.x.dtype), self.bias)


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


def assert_sums_right(out: torch.Tensor, case: Case) -> None:
    """Each output is its float32 sum, rounded once to x's dtype.

    A sum errs with the size of its terms: where they cancel, its own size says nothing. Allowed are
    four roundings of the terms in float32, and one of the result (half a unit, doubled).
    """
    exact = case.exact()
    assert out.shape == exact.shape
    allowed = 4 * torch.finfo(torch.float32).eps * case.terms()
    if out.dtype != torch.float32:
        allowed += torch.finfo(out.dtype).eps * exact.abs()
    off = (out.double() - exact).abs()
    wrong = ~(off <= allowed)  # NaN is wrong
    worst = float((off / allowed.clamp_min(1e-300)).max())
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} off by up to {worst:.3g} x allowed"
    )


# ---- layout


def test_layout_is_what_the_schema_says() -> None:
    codes = torch.arange(16).repeat(2, 2)
    codes[1] = codes[1].flip(0)
    qweight = pack_int4(codes)
    assert qweight.dtype == torch.int32
    assert qweight.shape == (2, 4)
    for row in range(2):
        for channel in range(32):
            word = int(qweight[row, channel // 8])
            assert (word >> (4 * (channel % 8))) & 15 == int(codes[row, channel])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_packing_round_trip(rows: int, words: int, seed: int) -> None:
    codes = torch.randint(
        0, 16, (rows, words * 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    qweight = pack_int4(codes)
    assert qweight.shape == (rows, words)
    assert torch.equal(unpack_int4(qweight), codes)
    assert torch.equal(pack_int4(unpack_int4(qweight)), qweight)


def test_packing_round_trip_of_strided_words() -> None:
    codes = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(codes)[::2]), codes[::2])
    assert torch.equal(pack_int4(codes.T.contiguous().T), pack_int4(codes))


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(2, 12, dtype=torch.uint8),
        torch.full((2, 8), 16),
        torch.full((2, 8), -1),
        torch.zeros(2, 8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(2, 0, dtype=torch.uint8),
    ],
    ids=["not whole words", "16", "-1", "float", "vector", "no channels"],
)
def test_packing_refuses(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"codes|multiple"):
        pack_int4(codes)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_dequantize_against_bits_read_one_by_one(group_size: int) -> None:
    case = make_case((1, 256), 5, group_size, torch.bfloat16)
    weight = dequantize(case.qweight, case.scales, case.zero_points, group_size)
    assert weight.dtype == torch.float32
    expected = torch.zeros(5, 256, dtype=torch.float64)
    for row in range(5):
        for channel in range(256):
            code = (int(case.qweight[row, channel // 8]) >> (4 * (channel % 8))) & 15
            group = channel // group_size
            zero_point = int(case.zero_points[row, group])
            expected[row, channel] = (code - zero_point) * float(case.scales[row, group])
    # A 4-bit integer times an 8-bit fraction is exact in float32.
    assert torch.equal(weight.double(), expected)
    assert expected.abs().max() > 0.1


# ---- reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_reference_against_float64(group_size: int, dtype: torch.dtype) -> None:
    case = make_case((2, 3, 256), 37, group_size, dtype)
    out = OP.overload(*case.args)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_catches_broken(out, case.exact(), bound_from(case.eager(), case.exact(), factor=1.0))


def test_reference_without_bias_and_without_rows() -> None:
    case = make_case((3, 128), 9, 32, torch.float32, bias=False)
    assert_close_to(OP.overload(*case.args), case.exact(), 1e-6, "no bias")
    empty = replace(case, x=case.x[:0])
    assert OP.overload(*empty.args).shape == (0, 9)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"group_size": 16}, "group_size 16"),
        ({"group_size": 128}, r"scales must be a float \[8, 1\]"),
        ({"x": torch.zeros(2, 96)}, r"x must be \[\.\.\., 128\]"),
        ({"x": torch.zeros(2, 128, dtype=torch.float64)}, "x must be bfloat16"),
        ({"qweight": torch.zeros(8, 16, dtype=torch.int64)}, "qweight must be an int32"),
        ({"qweight": torch.zeros(8, 5, dtype=torch.int32)}, "K = 40 is not a positive multiple"),
        ({"scales": torch.zeros(8, 4, dtype=torch.int32)}, "scales must be a float"),
        ({"zero_points": torch.zeros(8, 4)}, "zero_points must be a uint8"),
        ({"bias": torch.zeros(7)}, r"bias must be a float \[8\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(impl: str, change: dict[str, Any], match: str) -> None:
    case = replace(make_case((2, 128), 8, 32, torch.float32), **change)
    with pytest.raises(ValueError, match=match):
        OP.overload(*case.args, impl=impl)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_opcheck(impl: str, bias: bool, device: torch.device) -> None:
    case = make_case((2, 3, 128), 16, 64, torch.float32, bias=bias, device=device)
    torch.library.opcheck(OP.overload, case.args, {"impl": impl})


def test_exports_with_dynamic_rows() -> None:
    case = make_case((2, 5, 128), 24, 64, torch.bfloat16)

    class Linear(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = OP.overload(x, *case.args[1:])
            return out

    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(Linear(), (case.x,), dynamic_shapes=({0: dim, 1: dim},))
    for shape in ((1, 1, 128), (3, 17, 128)):
        x = torch.randn(shape).to(torch.bfloat16)
        assert torch.equal(program.module()(x), Linear()(x))


def test_choice_of_implementation() -> None:
    case = make_case((2, 128), 8, 32, torch.float32)
    choice = OP.choose(torch.device("cpu"), *case.args)
    assert choice.name == "reference"
    assert "CUDA" in choice.rejected["triton"]
    triton = OP.implementations["triton"]
    assert triton.supports_args(*case.args) is None
    for change, reason in (
        ({"x": case.x.double()}, "float64"),
        ({"group_size": 16}, "16"),
        ({"scales": case.scales.double()}, "float64"),
    ):
        said = triton.supports_args(*replace(case, **change).args)
        assert said is not None
        assert reason in said


# ---- Triton


@pytest.fixture(autouse=True)
def _kernels_run(request: pytest.FixtureRequest) -> None:
    if "triton" in request.node.name:
        reason = cuda_or_interpreter(request.getfixturevalue("device"))
        assert reason is None, reason


ENOUGH = 32
"""Outputs from which on their overall size cannot be one that cancelled."""


def check_triton(case: Case) -> None:
    """Every sum right; all together at most twice as far off as eager code; repeatable."""
    out = OP.overload(*case.args, impl="triton")
    exact = case.exact()
    assert out.dtype == case.x.dtype
    assert out.is_contiguous()
    assert_sums_right(out, case)
    if out.numel() >= ENOUGH:
        bound = bound_from(case.eager(), exact)
        assert_close_to(out, exact, bound, "triton against float64", rows=False)
        reference = OP.overload(*case.args)
        assert_close_to(out, reference, bound, "triton against the reference", rows=False)
    assert torch.equal(out, OP.overload(*case.args, impl="triton")), "differs from run to run"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, FEW_ROWS, FEW_ROWS + 1, 16, 33, 70])
def test_triton(rows: int, group_size: int, dtype: torch.dtype, device: torch.device) -> None:
    case = make_case((rows, 384), 37, group_size, dtype, device=device, seed=rows)
    check_triton(case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("channels", [128, 1152])
@pytest.mark.parametrize("outputs", [1, 130])
def test_triton_sizes_off_every_block(
    rows: int, channels: int, outputs: int, device: torch.device
) -> None:
    check_triton(make_case((rows, channels), outputs, 128, torch.float16, device=device))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_triton_any_shape(
    device: torch.device,
    rows: int,
    outputs: int,
    groups: int,
    group_size: int,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    shape = (rows, groups * group_size)
    check_triton(make_case(shape, outputs, group_size, dtype, bias=bias, device=device))


@pytest.mark.parametrize("rows", [2, 6])
def test_triton_float32_scales(rows: int, device: torch.device) -> None:
    case = make_case((rows, 256), 20, 64, torch.bfloat16, scale_dtype=torch.float32, device=device)
    assert case.scales.dtype == torch.float32
    check_triton(case)


@pytest.mark.parametrize("tokens", [1, 3])
def test_triton_strides(tokens: int, device: torch.device) -> None:
    """Batches of tokens, a slice of a longer sequence, a transposed x, strided stored tensors."""
    case = make_case((2, tokens, 256), 20, 64, torch.float32, device=device)
    check_triton(case)
    longer = torch.randn(2, tokens + 3, 256, device=device)
    check_triton(replace(case, x=longer[:, 3:]))
    turned = torch.randn(256, tokens, 2, device=device).permute(2, 1, 0)
    assert turned.stride(-1) != 1
    check_triton(replace(case, x=turned))
    check_triton(
        replace(
            case,
            qweight=case.qweight[::2],
            scales=case.scales[::2],
            zero_points=case.zero_points[::2],
            bias=None if case.bias is None else case.bias[::2],
            weight=case.weight[::2],
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "outputs", "channels"), [(5, 1, 64), (1, 1, 128), (20, 40, 256)])
def test_triton_broken_sums_are_caught(
    rows: int, outputs: int, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    """However few the outputs; the same check passes a result that is right."""
    case = make_case((rows, channels), outputs, 32, dtype, device=device)
    out = OP.overload(*case.args, impl="triton")
    assert_sums_right(out, case)
    loudest = int(case.x.abs().sum(0).argmax())
    one_code = case.x[:, loudest, None].double() * case.scales[:, loudest // 32].double()
    without_end = case.x.clone()
    without_end[:, -32:] = 0
    hole = out.clone()
    hole.view(-1)[-1] = float("nan")
    broken = {
        "zeros": torch.zeros_like(out),
        "last row zero": torch.cat([out[:-1], torch.zeros_like(out[-1:])]),
        "no last group": replace(case, x=without_end).exact().to(dtype),
        "no bias": replace(case, bias=None).exact().to(dtype),
        "one code off": (case.exact() + one_code).to(dtype),
        "one NaN": hole,
    }
    for name, wrong in broken.items():
        print(name)  # shown where it passes
        with pytest.raises(AssertionError):
            assert_sums_right(wrong, case)


@pytest.mark.parametrize("rows", [2, 20])
def test_triton_broken_output_is_caught(rows: int, device: torch.device) -> None:
    case = make_case((rows, 256), 40, 32, torch.bfloat16, device=device)
    exact = case.exact()
    out = OP.overload(*case.args, impl="triton")
    assert 1 < float(exact.square().mean().sqrt()) < 10
    assert_catches_broken(out, exact, bound_from(case.eager(), exact))


def test_triton_no_rows(device: torch.device) -> None:
    case = make_case((3, 0, 128), 9, 32, torch.bfloat16, device=device)
    out = OP.overload(*case.args, impl="triton")
    assert out.shape == (3, 0, 9)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [2, 20])
def test_triton_large_activations(rows: int, device: torch.device) -> None:
    """A few channels a thousand times the others, as language models have: no overflow."""
    case = make_case((rows, 256), 24, 128, torch.float16, device=device)
    x = case.x.clone()
    x[:, ::77] *= 1000
    check_triton(replace(case, x=x))


# ---- full size, on a GPU

LAYERS = {"qkv": (3584, 4608), "o": (3584, 3584), "gate_up": (3584, 37888), "down": (18944, 3584)}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 4, 8, 64, 200, 1024])
@pytest.mark.parametrize("layer", LAYERS)
def test_triton_full_size(layer: str, rows: int, device: torch.device) -> None:
    channels, outputs = LAYERS[layer]
    case = make_case((rows, channels), outputs, 128, torch.bfloat16, device=device)
    out = OP.overload(*case.args, impl="triton")
    assert torch.equal(out, OP.overload(*case.args, impl="triton"))
    exact, eager = case.exact(), case.eager()
    assert_catches_broken(out, exact, bound_from(eager, exact))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 3, 33, 1024])
def test_triton_full_size_groups(
    rows: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_triton(make_case((rows, 3584), 4608, group_size, dtype, device=device))


@pytest.mark.gpu
def test_triton_output_past_int32(device: torch.device) -> None:
    """More than 2^31 output values: the last rows must be where they belong."""
    case = make_case((60_000, 128), 37_888, 128, torch.bfloat16, device=device)
    out = OP.overload(*case.args, impl="triton")
    assert out.numel() > 2**31
    tail = replace(case, x=case.x[-64:])
    assert_close_to(out[-64:], tail.exact(), bound_from(tail.eager(), tail.exact()), "last rows")
