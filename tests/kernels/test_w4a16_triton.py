"""``w4a16_linear``: the Triton kernels, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_compile.kernels.triton_support import cuda_or_interpreter
from sparsevila_compile.kernels.w4a16_linear import triton as implementation
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.packing import GROUP_SIZES
from sparsevila_compile.kernels.w4a16_linear.triton import (
    FEW_ROWS,
    MID_ROWS,
    few_tiles,
    mid_tiles,
)
from tests.kernels.compare import assert_catches_broken, assert_close_to, bound_from
from tests.kernels.w4a16_cases import DTYPES, Case, assert_sums_right, make_case


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


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 12, 40])
def test_triton_long_rows_of_the_weight(
    rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """More groups than a step takes, and channels split among programs."""
    case = make_case((rows, 41 * 128), 20, 128, dtype, device=device)
    if rows > FEW_ROWS:
        assert mid_tiles(rows, 20, 41, 4).splits > 1
    check_triton(case)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_triton_many_rows_in_parts(
    bias_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A weight larger than the scratch memory; a bias of x's dtype and of another."""
    monkeypatch.setattr(implementation, "SCRATCH_BYTES", 11 * 256 * 4)
    case = make_case((MID_ROWS + 1, 256), 37, 64, torch.bfloat16, device=device)
    bias = None if bias_dtype is None else torch.randn(37, device=device).to(bias_dtype)
    check_triton(replace(case, bias=bias))


@pytest.mark.parametrize("rows", [1, 20])
def test_triton_codes_at_an_odd_address(rows: int, device: torch.device) -> None:
    case = make_case((rows, 256), 16, 128, torch.bfloat16, device=device)
    longer = torch.empty(case.qweight.numel() + 1, dtype=torch.int32, device=device)
    odd = longer[1:].view(case.qweight.shape).copy_(case.qweight)
    assert odd.data_ptr() % 16
    check_triton(replace(case, qweight=odd))


@pytest.mark.parametrize("outputs", [1, 3584, 152064])
@pytest.mark.parametrize("groups", [1, 28, 86, 432])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, FEW_ROWS])
def test_tiles_of_few_rows(rows: int, groups: int, outputs: int) -> None:
    tiles = few_tiles(rows, outputs, groups, 132)
    assert tiles.tokens >= rows
    assert tiles.tokens * tiles.side % 8 == 0
    assert tiles.rows % 2 == 0
    assert tiles.outputs * tiles.side == 8 * tiles.rows


@pytest.mark.parametrize("outputs", [1, 3584, 152064])
@pytest.mark.parametrize("groups", [1, 28, 86, 432])
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 64, 100, MID_ROWS])
def test_tiles_of_mid_rows(rows: int, groups: int, outputs: int) -> None:
    tiles = mid_tiles(rows, outputs, groups, 132)
    assert tiles.block_m >= 16
    assert (tiles.splits - 1) * -(-groups // tiles.splits) < groups, "a split without channels"


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
