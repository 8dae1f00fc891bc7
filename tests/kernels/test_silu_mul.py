"""``silu_mul``: every implementation against float64, and against what a model computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsevila_compile.kernels.silu_mul.op import OP
from tests.kernels.compare import assert_catches_broken, bound_from

silu_mul = torch.ops.sparsevila.silu_mul
IMPLEMENTATIONS = ["reference", "triton"]


def halves(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Gate and up as the halves of one projection: rows twice as far apart as they are long."""
    g = torch.Generator().manual_seed(sum(shape))
    *rows, width = shape
    both = (3 * torch.randn(*rows, 2 * width, generator=g)).to(device, dtype)
    return both[..., :width], both[..., width:]


def exact(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.double()
    return g / (1 + (-g).exp()) * up.double()


def model(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers' MLPs compute it."""
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4,), (3, 72), (2, 3, 1500), (1, 1, 3420)])
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_float64(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    gate, up = halves(shape, dtype, device)
    out = silu_mul(gate, up, impl=impl)
    assert out.dtype == dtype
    assert out.is_contiguous()
    truth = exact(gate, up)
    assert_catches_broken(out, truth, bound_from(model(gate, up), truth))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(impl: str, device: torch.device) -> None:
    """Separate projections, transposed ones, and rows that no single stride reaches."""
    gate, up = halves((4, 6, 40), torch.float32, device)
    wanted = model(gate, up)
    bound = bound_from(wanted, exact(gate, up))
    assert_catches_broken(silu_mul(gate.contiguous(), up, impl=impl), wanted, bound)
    turned = up.transpose(1, 2).contiguous().transpose(1, 2)
    assert_catches_broken(silu_mul(gate, turned, impl=impl), wanted, bound)
    assert_catches_broken(silu_mul(gate[:, ::2], up[:, ::2], impl=impl), wanted[:, ::2], bound)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extremes(impl: str, device: torch.device) -> None:
    gate = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0, float("nan")], device=device)
    out = silu_mul(gate, torch.full_like(gate, 2.0), impl=impl)
    assert out[:5].tolist() == [0, 0, 0, 200, 2000]
    assert out[5].isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rounds_as_models_do(impl: str, device: torch.device) -> None:
    gate, up = halves((5, 700), torch.float16, device)
    wanted = model(gate, up)
    off = (silu_mul(gate, up, impl=impl) != wanted).float().mean()
    assert off <= (0 if impl == "reference" else 0.01)
    assert (exact(gate, up).half() != wanted).float().mean() > 0.05  # rounded once, at the end


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_refuses(impl: str, device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"up is like gate, torch.float32 \[2, 8\]"):
        silu_mul(x, x[:, :7], impl=impl)
    with pytest.raises(ValueError, match=r"up is like gate, .* not torch.float16"):
        silu_mul(x, x.half(), impl=impl)
    with pytest.raises(ValueError, match=r"up is \[2, 8\] as gate, not \[1, 8\]"):
        silu_mul(x, x[:1], impl=impl)
    with pytest.raises(ValueError, match="gate is a floating"):
        silu_mul(x.int(), x.int(), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_rows(impl: str, device: torch.device) -> None:
    x = torch.empty(0, 8, device=device)
    assert silu_mul(x, x, impl=impl).shape == (0, 8)


def test_schema(device: torch.device) -> None:
    torch.library.opcheck(OP.overload, halves((3, 64), torch.float32, device))


def test_choice() -> None:
    x = torch.ones(2, 8)
    assert OP.choose(torch.device("cpu"), x, x).rejected == {"triton": "needs CUDA, this is cpu"}
    if torch.cuda.is_available():
        refused = OP.choose(torch.device("cuda"), x.double(), x.double())
        assert refused.rejected == {"triton": "needs half or float32, not torch.float64"}


@pytest.mark.gpu
@pytest.mark.parametrize("width", [3420, 11008, 18944, 27648])
@pytest.mark.parametrize("rows", [1, 8, 4097])
@pytest.mark.usefixtures("poisoned_memory")
def test_full_size(rows: int, width: int, device: torch.device) -> None:
    gate, up = halves((rows, width), torch.bfloat16, device)
    out, wanted, truth = silu_mul(gate, up, impl="triton"), model(gate, up), exact(gate, up)
    assert (out != wanted).float().mean() < 0.01
    assert_catches_broken(out, truth, bound_from(wanted, truth))
