"""``add_rms_norm``: every implementation against float64, and against what a model computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsevila_compile.kernels.add_rms_norm.op import OP
from tests.kernels.compare import assert_catches_broken, bound_from

add_rms_norm = torch.ops.sparsevila.add_rms_norm
EPS = 1e-5
IMPLEMENTATIONS = ["reference", "triton"]
WIDTHS = [1, 64, 72, 80, 96, 128, 1500]


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual have gaps between their rows, and rows of very different size."""
    g = torch.Generator().manual_seed(sum(shape))
    *rows, width = shape
    size = torch.logspace(-1, 1, rows[-1])[:, None]
    x, residual = (torch.randn(*rows, width + gap, generator=g) * size for gap in (3, 8))
    weight = 1 + 0.2 * torch.randn(width, generator=g)
    return (
        x.to(device, dtype)[..., :width],
        residual.to(device, dtype)[..., :width],
        weight.to(device, dtype),
    )


def exact(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By definition, in float64."""
    h = x.double() if residual is None else x.double() + residual.double()
    return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double(), h


def model(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' decoder layers compute it."""
    h = x if residual is None else residual + x
    wide = h.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(h.dtype), h


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_float64(width: int, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    x, residual, weight = arguments((2, 3, width), dtype, device)
    for added in (residual, None):
        outs = add_rms_norm(x, added, weight, EPS, impl=impl)
        truths, lows = exact(x, added, weight), model(x, added, weight)
        checked = 2 if added is not None else 1
        for out, truth, low in list(zip(outs, truths, lows, strict=True))[:checked]:
            assert out.dtype == dtype
            assert out.is_contiguous()
            assert_catches_broken(out, truth, bound_from(low, truth))
        assert outs[1].shape == (x.shape if added is not None else (0,))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rounds_as_models_do(impl: str, device: torch.device) -> None:
    """In float16 the result is a model's own, but for the last bit of a few values."""
    x, residual, weight = arguments((5, 300), torch.float16, device)
    out, h = add_rms_norm(x, residual, weight, EPS, impl=impl)
    wanted, wanted_h = model(x, residual, weight)
    assert torch.equal(h, wanted_h)
    off = (out != wanted).float().mean()
    assert off <= (0 if impl == "reference" else 0.01)
    double_rounding = exact(x, residual, weight)[0].half()  # would be, rounded once at the end
    assert (double_rounding != wanted).float().mean() > 0.05


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_refuses(impl: str, device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"weight is a torch.float32 \[8\]"):
        add_rms_norm(x, None, torch.ones(7, device=device), EPS, impl=impl)
    with pytest.raises(ValueError, match=r"weight is a torch.float32 \[8\], not torch.float16"):
        add_rms_norm(x, None, torch.ones(8, device=device).half(), EPS, impl=impl)
    with pytest.raises(ValueError, match=r"residual is \[2, 8\] as x, not \[1, 8\]"):
        add_rms_norm(x, x[:1], torch.ones(8, device=device), EPS, impl=impl)
    with pytest.raises(ValueError, match="residual is like x"):
        add_rms_norm(x, x[0], torch.ones(8, device=device), EPS, impl=impl)
    with pytest.raises(ValueError, match="x is a floating"):
        add_rms_norm(x.int(), None, torch.ones(8, device=device).int(), EPS, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_rows(impl: str, device: torch.device) -> None:
    x, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert [t.shape for t in add_rms_norm(x, x, weight, EPS, impl=impl)] == [(0, 8), (0, 8)]


def test_schema(device: torch.device) -> None:
    x, residual, weight = arguments((3, 64), torch.float32, device)
    torch.library.opcheck(OP.overload, (x, residual, weight, EPS))
    torch.library.opcheck(OP.overload, (x, None, weight, EPS))


def test_choice() -> None:
    def refused(x: Tensor, where: str = "cuda") -> dict[str, str]:
        choice = OP.choose(torch.device(where), x, None, x[0], EPS)
        assert choice.name == "reference"
        return choice.rejected

    assert refused(torch.ones(2, 8), "cpu") == {"triton": "needs CUDA, this is cpu"}
    if torch.cuda.is_available():
        assert refused(torch.ones(2, 8).double()) == {
            "triton": "needs half or float32, not torch.float64"
        }
        wide = torch.ones(2, 40000)
        assert refused(wide) == {"triton": "holds a row of at most 32768 values, not 40000"}


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1280, 3584, 4096, 5120, 8192])
@pytest.mark.parametrize("rows", [1, 8, 4097])
@pytest.mark.usefixtures("poisoned_memory")
def test_full_size(rows: int, width: int, device: torch.device) -> None:
    x, residual, weight = arguments((rows, width), torch.bfloat16, device)
    out, h = add_rms_norm(x, residual, weight, EPS, impl="triton")
    wanted, wanted_h = model(x, residual, weight)
    assert torch.equal(h, wanted_h)
    assert (out != wanted).float().mean() < 0.01
    truth = exact(x, residual, weight)[0]
    assert_catches_broken(out, truth, bound_from(wanted, truth))
