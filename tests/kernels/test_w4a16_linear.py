"""``w4a16_linear``: layout, reference and choice of implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.packing import (
    GROUP_SIZES,
    dequantize,
    pack_int4,
    unpack_int4,
)
from tests.kernels.compare import assert_catches_broken, assert_close_to, bound_from
from tests.kernels.w4a16_cases import DTYPES, make_case

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
