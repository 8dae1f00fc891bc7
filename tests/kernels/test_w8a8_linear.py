"""``w8a8_linear``: the rounding of rows, the reference, torch's products and Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_compile.kernels.triton_support import cuda_or_interpreter
from sparsevila_compile.kernels.w8a8_linear.op import OP, float8_missing
from sparsevila_compile.kernels.w8a8_linear.rounding import (
    LARGEST,
    dequantize_rows,
    padded,
    quantize_rows,
)
from sparsevila_compile.kernels.w8a8_linear.triton import round_rows
from tests.kernels.compare import assert_catches_broken, assert_close_to
from tests.kernels.eight_bits import (
    CODES,
    DTYPES,
    FLOAT8,
    Case,
    make_case,
    rounded,
    rows_of_all_sizes,
)

CPU = torch.device("cpu")


# ---- rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_rows_are_rounded_to_nearest(code: torch.dtype, dtype: torch.dtype) -> None:
    x = rows_of_all_sizes((6, 83), dtype)
    x[2, :40] = torch.arange(40) / 80 * float(x[2].abs().max())  # halves and subnormals
    codes, scales = quantize_rows(x, code)
    wanted, sizes = rounded(x, code)
    assert codes.dtype == code
    assert codes.shape == (6, padded(83)) == (6, 96)
    assert torch.equal(codes[:, :83].double(), wanted)
    assert not codes[:, 83:].float().any()
    assert scales.dtype == torch.float32
    assert torch.equal(scales.double(), sizes)
    assert (codes.float().abs().amax(1) == LARGEST[code]).all()
    error = dequantize_rows(codes, scales, 83) - x.float()
    step = 1 if code == torch.int8 else 2.0**-3 * codes[:, :83].float().abs().clamp(min=2.0**-6)
    assert (error.abs() <= 0.501 * step * scales[:, None]).all()
    assert error.abs().max() > 0


@pytest.mark.parametrize("code", CODES, ids=str)
def test_rounding_of_special_rows(code: torch.dtype) -> None:
    x = torch.ones(5, 20)
    x[0] = 0
    x[1, 3], x[2, 4] = float("nan"), float("-inf")
    x[3] = 1e-38
    codes, scales = quantize_rows(x, code)
    assert scales.isnan().tolist() == [False, True, True, False, False]
    assert not codes[:4].float().any()
    assert scales[0] > 0, "no division by zero"
    assert dequantize_rows(codes, scales, 20)[4].tolist() == [1.0] * 20
    assert quantize_rows(torch.zeros(3, 0), code)[0].shape == (3, 0)


# ---- the op


def implementations(code: torch.dtype) -> list[str]:
    return ["reference", "library"] if code == torch.int8 else ["reference"]


ON_CPU = [(impl, code) for code in CODES for impl in implementations(code)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "code"), ON_CPU)
def test_against_float64(impl: str, code: torch.dtype, dtype: torch.dtype) -> None:
    case = make_case((2, 3, 84), 37, code, dtype)
    out = OP.overload(*case.args, impl=impl)
    assert out.dtype == dtype
    assert out.is_contiguous()
    wanted, sizes = rounded(case.x.flatten(0, 1), code)
    exact = wanted @ case.weight[:, :84].double().T * sizes[:, None] * case.scales.double()
    assert case.bias is not None
    assert_catches_broken(out, (exact + case.bias.double()).view(2, 3, 37), case.bound())


@pytest.mark.parametrize(("impl", "code"), ON_CPU)
def test_near_the_float_linear(impl: str, code: torch.dtype) -> None:
    """The error that 8 bits cost: below 1 % (int8) or 4 % (float8) for even rows."""
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(50, 96, generator=g), torch.randn(40, 96, generator=g)
    out = OP.overload(x, *quantize_rows(weight, code), None, impl=impl)
    exact = x.double() @ weight.double().T
    error = float((out - exact).norm() / exact.norm())
    assert 1e-3 < error < (0.02 if code == torch.int8 else 0.06)


@pytest.mark.parametrize(("impl", "code"), ON_CPU)
def test_without_bias_and_without_rows(impl: str, code: torch.dtype) -> None:
    case = make_case((3, 128), 9, code, torch.float32, bias=False)
    assert_close_to(OP.overload(*case.args, impl=impl), case.exact(), 1e-6, "no bias")
    assert OP.overload(*replace(case, x=case.x[:0]).args, impl=impl).shape == (0, 9)


def test_rows_merge() -> None:
    """Linears that share their input can be one: weights and scales one below the other."""
    parts = [make_case((4, 84), n, torch.int8, torch.float32, seed=n) for n in (5, 12)]
    x = parts[0].x
    merged = OP.overload(
        x,
        torch.cat([p.weight for p in parts]),
        torch.cat([p.scales for p in parts]),
        torch.cat([p.bias for p in parts if p.bias is not None]),
    )
    assert torch.equal(merged, torch.cat([OP.overload(x, *p.args[1:]) for p in parts], 1))


@pytest.mark.parametrize("impl", ["reference", "library", "triton"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(2, 96)}, r"x must be \[\.\.\., K\] with K padded to 16 equal to .* 128"),
        ({"x": torch.zeros(2, 129)}, r"not \[2, 129\]"),
        ({"x": torch.zeros(2, 128, dtype=torch.float64)}, "x must be bfloat16"),
        ({"weight": torch.zeros(8, 128)}, "weight must be an int8 or float8_e4m3fn"),
        ({"weight": torch.zeros(128, dtype=torch.int8)}, "weight must be an int8"),
        ({"scales": torch.zeros(7)}, r"scales must be a float32 \[8\]"),
        ({"scales": torch.zeros(8, dtype=torch.float16)}, "scales must be a float32"),
        ({"bias": torch.zeros(7)}, r"bias must be a float \[8\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(impl: str, change: dict[str, Any], match: str) -> None:
    case = replace(make_case((2, 128), 8, torch.int8, torch.float32), **change)
    with pytest.raises(ValueError, match=match):
        OP.overload(*case.args, impl=impl)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_opcheck(impl: str, bias: bool, code: torch.dtype, device: torch.device) -> None:
    case = make_case((2, 3, 84), 16, code, torch.float32, bias=bias, device=device)
    # What test_schema does with its inputs is not there for float8.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += ["test_schema"] if code == torch.int8 else []
    torch.library.opcheck(OP.overload, case.args, {"impl": impl}, test_utils=tests)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_exports_with_dynamic_rows(code: torch.dtype) -> None:
    case = make_case((2, 5, 84), 24, code, torch.bfloat16)

    class Linear(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = OP.overload(x, *case.args[1:])
            return out

    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(Linear(), (case.x,), dynamic_shapes=({0: dim, 1: dim},))
    for shape in ((1, 1, 84), (3, 17, 84)):
        x = torch.randn(shape).to(torch.bfloat16)
        assert torch.equal(program.module()(x), Linear()(x))


def test_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((2, 128), 8, torch.int8, torch.float32)
    choice = OP.choose(CPU, *case.args)
    assert choice.name == "library"
    no_gpu = "needs CUDA, this is cpu"
    assert choice.rejected == {"cublas": no_gpu, "triton": no_gpu}
    eight = make_case((2, 128), 8, FLOAT8, torch.float32)
    choice = OP.choose(CPU, *eight.args)
    assert choice.name == "reference"
    assert choice.rejected["library"] == "the weight is torch.float8_e4m3fn"
    triton = OP.implementations["triton"]
    assert triton.supports_args(*case.args) is None
    assert triton.supports_args(*eight.args) is None
    for change, reason in (
        ({"x": case.x.double()}, "x is torch.float64"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "bias is torch.float64"),
    ):
        assert triton.supports_args(*replace(case, **change).args) == reason
    cublas = OP.implementations["cublas"].supports_args
    half = make_case((2, 128), 16, FLOAT8, torch.bfloat16)
    assert cublas(*half.args) is None
    for change, reason in (
        ({"x": half.x.float()}, "x is torch.float32"),
        ({"bias": torch.zeros(16)}, "bias is torch.float32, x is torch.bfloat16"),
        ({"weight": half.weight[:12]}, "12 outputs are not a multiple of 16"),
        ({"weight": half.weight[:, :80]}, "is slow with a width of 80, no multiple of 128"),
        ({"weight": half.weight.to(torch.int8)}, "the weight is torch.int8"),
    ):
        assert cublas(*replace(half, **change).args) == reason
    assert "is for CPUs" in str(OP.implementations["library"].supported(torch.device("cuda")))


def test_float8_wants_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, missing in (((8, 0), True), ((8, 9), False), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        said = float8_missing(cuda)
        assert (said is not None) == missing
        if said is not None:
            assert said == "needs a GPU of compute capability 8.9 or later, this one has 8.0"
    assert float8_missing(CPU) is None


# ---- Triton


@pytest.fixture(autouse=True)
def _kernels_run(request: pytest.FixtureRequest) -> None:
    if "triton" in request.node.name:
        reason = cuda_or_interpreter(request.getfixturevalue("device"))
        assert reason is None, reason


def check_triton(case: Case) -> None:
    """As near to float64 as eager code in x's dtype with the same codes; repeatable."""
    out = OP.overload(*case.args, impl="triton")
    assert out.dtype == case.x.dtype
    assert out.is_contiguous()
    rows = out.shape[-1] >= 32  # a row of few values can be one of cancelled sums
    assert_close_to(out, case.exact(), case.bound(), "triton against float64", rows=rows)
    assert torch.equal(out, OP.overload(*case.args, impl="triton")), "differs from run to run"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 83, 256, 9000])
def test_triton_rounds_as_the_reference(
    width: int, code: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """Code by code; rows too long for one block, and those of no value that is finite, too."""
    x = rows_of_all_sizes((5, width), dtype).to(device)
    x[1], x[2, 0], x[3, -1] = 0, float("nan"), float("inf")
    codes, scales = round_rows(x, code)
    wanted, sizes = quantize_rows(x, code)
    assert scales.isnan().tolist() == [False, False, True, True, False]
    good = ~sizes.isnan()
    assert torch.equal(codes[good].float(), wanted[good].float())
    assert torch.equal(scales[good], sizes[good])
    assert codes[0].float().abs().max() == LARGEST[code]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 70])
def test_triton(rows: int, code: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    check_triton(make_case((rows, 200), 37, code, dtype, device=device, seed=rows))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("channels", [16, 1100])
@pytest.mark.parametrize("outputs", [1, 4, 136])
def test_triton_sizes_off_every_block(
    rows: int, channels: int, outputs: int, device: torch.device
) -> None:
    check_triton(make_case((rows, channels), outputs, torch.int8, torch.float16, device=device))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    channels=st.integers(1, 150),
    code=st.sampled_from(CODES),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_triton_any_shape(
    device: torch.device,
    rows: int,
    outputs: int,
    channels: int,
    code: torch.dtype,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    check_triton(make_case((rows, channels), outputs, code, dtype, bias=bias, device=device))


def test_triton_strides(device: torch.device) -> None:
    """A slice of a longer sequence, a transposed x, every other row of what is stored."""
    case = make_case((2, 3, 96), 40, torch.int8, torch.float32, device=device)
    check_triton(case)
    longer = torch.randn(2, 6, 96, device=device)
    check_triton(replace(case, x=longer[:, 3:]))
    turned = torch.randn(96, 3, 2, device=device).permute(2, 1, 0)
    assert turned.stride(-1) != 1
    check_triton(replace(case, x=turned))
    assert case.bias is not None
    check_triton(
        replace(case, weight=case.weight[::2], scales=case.scales[::2], bias=case.bias[::2])
    )


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_triton_broken_output_is_caught(rows: int, code: torch.dtype, device: torch.device) -> None:
    case = make_case((rows, 200), 40, code, torch.bfloat16, device=device)
    exact = case.exact()
    assert float(exact.square().mean().sqrt()) > 1
    assert_catches_broken(OP.overload(*case.args, impl="triton"), exact, case.bound())
    rolled = case.weight.view(torch.uint8).roll(1, 1).view(code)  # float8 itself does not roll
    one_off = replace(case, weight=rolled)
    wrong = OP.overload(*one_off.args, impl="triton")
    with pytest.raises(AssertionError):
        assert_close_to(wrong, exact, case.bound(), "columns rolled")


@pytest.mark.parametrize("impl", ["reference", "library", "triton"])
def test_a_broken_token_breaks_no_other(impl: str, device: torch.device) -> None:
    case = make_case((6, 84), 20, torch.int8, torch.float32, device=device)
    if impl == "library" and device.type != "cpu":
        pytest.skip("for CPUs")
    x = case.x.clone()
    x[1], x[2, 5], x[4, 80] = 0, float("nan"), float("inf")
    out = OP.overload(x, *case.args[1:], impl=impl)
    assert out.isnan().all(1).tolist() == [False, False, True, False, True, False]
    assert torch.equal(out[1], case.bias)
    kept = [0, 3, 5]
    assert torch.equal(out[kept], OP.overload(*case.args, impl=impl)[kept])


def test_triton_no_rows(device: torch.device) -> None:
    case = make_case((3, 2, 128), 9, FLOAT8, torch.bfloat16, device=device)
    out = OP.overload(case.x[:, :0], *case.args[1:], impl="triton")
    assert out.shape == (3, 0, 9)
    assert out.dtype == torch.bfloat16


# ---- full size, on a GPU

LAYERS = {
    "vision qkv": (1280, 3840),
    "vision gate_up": (1280, 6840),
    "vision up": (1280, 3420),
    "vision down": (3420, 1280),
    "merger": (5120, 3584),
    "siglip": (1152, 4304),
    "language gate_up": (3584, 37888),
    "language down": (18944, 3584),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64, 577, 4097])
@pytest.mark.parametrize("layer", LAYERS)
def test_triton_full_size(layer: str, rows: int, code: torch.dtype, device: torch.device) -> None:
    channels, outputs = LAYERS[layer]
    case = make_case((rows, channels), outputs, code, torch.bfloat16, device=device)
    out = OP.overload(*case.args, impl="triton")
    assert torch.equal(out, OP.overload(*case.args, impl="triton"))
    assert_catches_broken(out, case.exact(), case.bound())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 577, 4097])
def test_cublas(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    for channels, outputs in ((1280, 3840), (18944, 3584)):
        for bias in (True, False):
            case = make_case((2, rows, channels), outputs, FLOAT8, dtype, bias=bias, device=device)
            out = OP.overload(*case.args, impl="cublas")
            assert out.is_contiguous()
            assert_catches_broken(out, case.exact(), case.bound())
    x = case.x.clone()
    x[0, 0, 5] = float("nan")
    out = OP.overload(x, *case.args[1:], impl="cublas")
    assert int(out.isnan().all(-1).sum()) == int(out.isnan().any(-1).sum()) == 1
    assert OP.overload(x[:0], *case.args[1:], impl="cublas").shape == (0, rows, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES, ids=str)
def test_triton_in_a_graph(code: torch.dtype, device: torch.device) -> None:
    """Captured once, replayed on another input."""
    case = make_case((300, 3420), 1280, code, torch.bfloat16, device=device)
    x = case.x.clone()
    OP.overload(x, *case.args[1:], impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP.overload(x, *case.args[1:], impl="triton")
    x.copy_(case.x.flip(0))
    graph.replay()
    assert torch.equal(out.flip(0), OP.overload(*case.args, impl="triton"))


@pytest.mark.gpu
def test_triton_output_past_int32(device: torch.device) -> None:
    """More than 2^31 output values: the last rows must be where they belong."""
    case = make_case((60_000, 128), 37_892, torch.int8, torch.bfloat16, device=device)
    out = OP.overload(*case.args, impl="triton")
    assert out.numel() > 2**31
    tail = replace(case, x=case.x[-64:])
    assert_close_to(out[-64:], tail.exact(), tail.bound(), "last rows")
