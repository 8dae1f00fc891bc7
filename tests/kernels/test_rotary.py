"""``rotary``: every implementation against complex numbers, and against what a model computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsevila_compile.kernels.rotary.op import OP
from tests.kernels.compare import assert_catches_broken, bound_from

rotary = torch.ops.sparsevila.rotary
IMPLEMENTATIONS = ["reference", "triton"]
HEADS = [(1, 1), (4, 2), (7, 1), (28, 4), (16, 16)]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def arguments(
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    table: torch.dtype | None = None,
) -> Arguments:
    """q and k are seen in one merged projection that holds v too; tables are of random angles."""
    g = torch.Generator().manual_seed(batch + length + sum(heads) + width)
    q_size, k_size = heads[0] * width, heads[1] * width
    merged = torch.randn(batch, length, q_size + 2 * k_size, generator=g).to(device, dtype)
    q = merged[..., :q_size].view(batch, length, heads[0], width)
    k = merged[..., q_size : q_size + k_size].view(batch, length, heads[1], width)
    angles = 100 * torch.rand(batch, length, width // 2, generator=g)
    angles = torch.cat([angles, angles], dim=-1).to(device)
    return q, k, angles.cos().to(table or dtype), angles.sin().to(table or dtype)


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves of x as complex numbers, turned: ``[B, H, S, D]`` in float64."""
    half = x.shape[-1] // 2
    x, cos, sin = x.double(), cos.double()[:, :, None], sin.double()[:, :, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(
        cos[..., :half], sin[..., :half]
    )
    return torch.cat([turned.real, turned.imag], dim=-1).transpose(1, 2)


def model(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' attentions compute it; float32 tables as its vision encoders do."""
    dtype = x.dtype
    x = x.transpose(1, 2).to(cos.dtype)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(dtype)


def check(given: Arguments, impl: str) -> None:
    q, k, cos, sin = given
    for x, out in zip((q, k), rotary(*given, impl=impl), strict=True):
        assert out.dtype == x.dtype
        assert out.is_contiguous()
        truth = exact(x, cos, sin)
        assert_catches_broken(out, truth, bound_from(model(x, cos, sin), truth))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [2, 64, 72, 80, 96, 128])
@pytest.mark.usefixtures("poisoned_memory")
def test_widths(width: int, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    check(arguments(2, 3, (4, 2), width, dtype, device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 1), (2, 5)])
@pytest.mark.usefixtures("poisoned_memory")
def test_heads(
    batch: int, length: int, heads: tuple[int, int], impl: str, device: torch.device
) -> None:
    check(arguments(batch, length, heads, 16, torch.float32, device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_float32_tables(impl: str, device: torch.device) -> None:
    check(arguments(1, 7, (4, 4), 80, torch.float16, device, torch.float32), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(impl: str, device: torch.device) -> None:
    """Heads before positions, a last dim with gaps, tables that batches share."""
    q, k, cos, sin = arguments(2, 5, (4, 2), 16, torch.float32, device)
    wanted = rotary(q, k, cos, sin)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = torch.stack([k, k], dim=-1)[..., 0]
    for given in ((transposed, k, cos, sin), (q, gaps, cos, sin)):
        for out, truth in zip(rotary(*given, impl=impl), wanted, strict=True):
            assert_catches_broken(out, truth, 1e-6)
    shared = [t[:1].expand(2, -1, -1) for t in (cos, sin)]
    check((q, k, *shared), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("table", [torch.float16, torch.float32])
def test_rounds_as_models_do(table: torch.dtype, impl: str, device: torch.device) -> None:
    """In float16 the result is a model's own, wherever that rounds."""
    q, k, cos, sin = arguments(2, 5, (4, 2), 64, torch.float16, device, table)
    for x, out in zip((q, k), rotary(q, k, cos, sin, impl=impl), strict=True):
        wanted = model(x, cos, sin)
        assert (out != wanted).float().mean() <= (0 if impl == "reference" else 0.001)
        if table == torch.float16:  # three roundings differ from one
            assert (exact(x, cos, sin).half() != wanted).float().mean() > 0.05


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_refuses(impl: str, device: torch.device) -> None:
    q, k, cos, sin = arguments(2, 3, (4, 2), 16, torch.float32, device)
    with pytest.raises(ValueError, match="D even"):
        rotary(q[..., :15], k, cos, sin, impl=impl)
    with pytest.raises(ValueError, match=r"k is a torch.float32 \[B, S, Hk, 16\]"):
        rotary(q, k[..., :8], cos, sin, impl=impl)
    with pytest.raises(ValueError, match=r"sin is a floating \[B, S, 16\]"):
        rotary(q, k, cos, sin[..., :8], impl=impl)
    with pytest.raises(ValueError, match=r"cos is .*float32 and sin is .*float16"):
        rotary(q, k, cos, sin.half(), impl=impl)
    with pytest.raises(ValueError, match=r"cos is \[2, 3, ...\] as q, not \[1, 3, 16\]"):
        rotary(q, k, cos[:1], sin, impl=impl)
    with pytest.raises(ValueError, match=r"k is \[2, 3, ...\] as q"):
        rotary(q, k[:, :2], cos, sin, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens(impl: str, device: torch.device) -> None:
    q, k, cos, sin = (t[:, :0] for t in arguments(2, 3, (4, 2), 16, torch.float32, device))
    assert [t.shape for t in rotary(q, k, cos, sin, impl=impl)] == [(2, 4, 0, 16), (2, 2, 0, 16)]


def test_schema(device: torch.device) -> None:
    torch.library.opcheck(OP.overload, arguments(2, 3, (4, 2), 16, torch.float32, device))


def test_choice() -> None:
    given = arguments(1, 2, (2, 1), 8, torch.float32, torch.device("cpu"))
    assert OP.choose(torch.device("cpu"), *given).rejected == {"triton": "needs CUDA, this is cpu"}
    if torch.cuda.is_available():
        refused = OP.choose(torch.device("cuda"), *(t.double() for t in given))
        assert refused.rejected == {"triton": "needs half or float32, not torch.float64"}


@pytest.mark.gpu
@pytest.mark.parametrize("heads, width", [((28, 4), 128), ((32, 32), 128), ((16, 16), 80)])
@pytest.mark.parametrize("batch, length", [(1, 1), (8, 1), (1, 4097), (2, 513)])
@pytest.mark.parametrize("table", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("poisoned_memory")
def test_full_size(
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    table: torch.dtype,
    device: torch.device,
) -> None:
    given = arguments(batch, length, heads, width, torch.bfloat16, device, table)
    check(given, "triton")
    q, k, cos, sin = given
    for x, out in zip((q, k), rotary(*given, impl="triton"), strict=True):
        assert (out != model(x, cos, sin)).float().mean() < 0.001
