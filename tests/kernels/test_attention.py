"""sparsevila::attention: reference against a naive loop, implementations against the reference."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from sparsevila_compile.kernels.attention.hopper_parts import unsuitable
from sparsevila_compile.kernels.attention.op import LSE, OP
from sparsevila_compile.kernels.attention.reference import attend
from sparsevila_compile.kernels.triton_support import cuda_or_interpreter, needs_cuda
from tests.kernels.compare import (
    assert_catches_broken,
    assert_close_to,
    bound_from,
    eager_attention,
    naive_attention,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Restriction:
    """Which keys a query may see, in the words of the op's arguments."""

    cu_seqlens: tuple[int, ...] | None = None
    causal: bool = False
    window: int = 0

    def sees(self, i: int, j: int) -> bool:
        if self.cu_seqlens is not None:
            bounds = zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)
            if not any(first <= i < end and first <= j < end for first, end in bounds):
                return False
        return (not self.causal or j <= i) and (self.window == 0 or i - j < self.window)

    def visible(self, length: int) -> torch.Tensor:
        return torch.tensor([[self.sees(i, j) for j in range(length)] for i in range(length)])

    def args(self, device: torch.device) -> tuple[torch.Tensor | None, bool, int]:
        packed = self.cu_seqlens
        cu = None if packed is None else torch.tensor(packed, dtype=torch.int32, device=device)
        return cu, self.causal, self.window


SMALL = {
    "full": Restriction(),
    "causal": Restriction(causal=True),
    "window": Restriction(causal=True, window=4),
    "window of one": Restriction(causal=True, window=1),
    "packed": Restriction((0, 5, 6, 13)),
    "packed, empty segments, rows outside": Restriction((2, 2, 5, 5, 9, 11)),
    "packed, no segment": Restriction((4,)),
    "packed causal window": Restriction((0, 6, 13), causal=True, window=3),
}
LARGE = {
    "full": Restriction(),
    "causal": Restriction(causal=True),
    "window": Restriction(causal=True, window=70),
    "packed": Restriction((0, 64, 65, 65, 140, 150)),
    "packed causal window, rows outside": Restriction((3, 80, 130), causal=True, window=30),
}


def qkv(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    heads: tuple[int, int],
    length: int,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, S, D] as models have them: views of [B, S, H, D]."""
    torch.manual_seed(length + dim)
    return tuple(
        torch.randn(batch, length, h, dim, device=device).to(dtype).transpose(1, 2)
        for h in (heads[0], heads[1], heads[1])
    )


@pytest.mark.parametrize("impl", ["reference", "library"])
@pytest.mark.parametrize("case", SMALL)
def test_naive(case: str, impl: str) -> None:
    restriction, cpu = SMALL[case], torch.device("cpu")
    batch = 1 if restriction.cu_seqlens else 2
    q, k, v = qkv(cpu, torch.float64, batch, (4, 2), 13, 8)
    naive = naive_attention(
        q, k, v, lambda b, h, i: [j for j in range(13) if restriction.sees(i, j)], 0.3
    )
    out = OP.overload(q, k, v, restriction.args(cpu)[0], 0.3, *restriction.args(cpu)[1:], impl=impl)
    assert out.is_contiguous()
    assert out.dtype == torch.float64
    if case == "packed, no segment":
        assert torch.equal(out, torch.zeros(1, 13, 4, 8, dtype=torch.float64))
    else:
        assert_catches_broken(out, naive, 1e-12)


def check(
    impl: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    restriction: Restriction,
    *,
    broken: bool = False,
) -> None:
    """The implementation errs at most twice what eager code in the same dtype errs."""
    scale = q.shape[-1] ** -0.5
    cu, causal, window = restriction.args(q.device)
    exact = OP.overload(q.double(), k.double(), v.double(), cu, scale, causal, window)
    visible = restriction.visible(q.shape[2]).to(q.device)
    bound = bound_from(eager_attention(q, k, v, visible, scale), exact)
    out = OP.overload(q, k, v, cu, scale, causal, window, impl=impl)
    assert out.is_contiguous()
    assert out.dtype == q.dtype
    assert_close_to(out, exact, bound, impl)
    if broken:
        assert_catches_broken(out, exact, bound)


@pytest.mark.parametrize("impl", ["library", "triton"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("case", LARGE)
def test_restrictions(case: str, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    batch = 1 if LARGE[case].cu_seqlens else 2
    check(impl, *qkv(device, dtype, batch, (4, 2), 150, 64), LARGE[case])


@pytest.mark.parametrize("impl", ["library", "triton"])
@pytest.mark.parametrize(
    "dim, heads, length",
    [
        (64, (2, 2), 129),
        (72, (4, 2), 31),
        (80, (7, 1), 65),
        (96, (8, 1), 40),
        (128, (7, 1), 97),
        (128, (16, 2), 1),
        (256, (2, 1), 70),
    ],
)
def test_head_dims_and_groups(
    dim: int, heads: tuple[int, int], length: int, impl: str, device: torch.device
) -> None:
    broken = dim == 80
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(device, dtype, 2, heads, length, dim)
        check(impl, q, k, v, Restriction(causal=True), broken=broken)


@pytest.mark.parametrize("impl", ["library", "triton"])
def test_strides(impl: str, device: torch.device) -> None:
    q, k, v = qkv(device, torch.float32, 2, (4, 2), 70, 80)
    spread = torch.full((2, 4, 70, 160), float("nan"), device=device)
    spread[..., ::2] = q
    fused = torch.cat([k, v], dim=-1)
    check(impl, spread[..., ::2], fused[..., :80], fused[..., 80:], Restriction(causal=True))
    reordered = k.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # dim-major
    check(impl, q, reordered, v, Restriction())


@pytest.mark.parametrize("impl", ["reference", "library", "triton"])
def test_no_rows(impl: str, device: torch.device) -> None:
    q, k, v = qkv(device, torch.float32, 2, (4, 2), 0, 64)
    assert OP.overload(q, k, v, None, 1.0, True, 0, impl=impl).shape == (2, 0, 4, 64)


@pytest.mark.parametrize("impl", ["reference", "library", "triton"])
@pytest.mark.parametrize("case", ["causal", "packed"])
def test_opcheck(case: str, impl: str, device: torch.device) -> None:
    """Schema, fake and dispatch agree, with static and with dynamic shapes (all of opcheck)."""
    restriction = SMALL[case]
    q, k, v = qkv(device, torch.float32, 1, (4, 2), 13, 16)
    cu, causal, window = restriction.args(device)
    result = torch.library.opcheck(OP.overload, (q, k, v, cu, 0.25, causal, window), {"impl": impl})
    assert set(result.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in result


def test_reference_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long inputs go some rows at a time; the result is the same."""
    q, k, v = qkv(torch.device("cpu"), torch.float64, 1, (4, 2), 50, 16)
    whole = OP.reference(q, k, v, None, 0.25, True, 9)
    monkeypatch.setattr(sys.modules[OP.reference.__module__], "_MAX_SCORES", 4 * 50 * 7)
    assert_close_to(OP.reference(q, k, v, None, 0.25, True, 9), whole, 1e-13, "in pieces")


def test_refusals() -> None:
    q, k, v = qkv(torch.device("cpu"), torch.float32, 2, (4, 2), 13, 16)
    with pytest.raises(ValueError, match="cannot share"):
        OP.overload(q[:, :3], k, v, None, 1.0, True, 0)
    with pytest.raises(ValueError, match="head dims differ"):
        OP.overload(q, k, v[..., :8], None, 1.0, True, 0)
    with pytest.raises(ValueError, match="dtypes differ"):
        OP.overload(q, k, v.half(), None, 1.0, True, 0)
    with pytest.raises(ValueError, match="13 queries, but 12 keys"):
        OP.overload(q, k[:, :, :12], v, None, 1.0, True, 0)
    with pytest.raises(ValueError, match="batch of 1"):
        OP.overload(q, k, v, torch.tensor([0, 13]), 1.0, False, 0)
    with pytest.raises(ValueError, match="needs causal"):
        OP.overload(q, k, v, None, 1.0, False, 3)
    with pytest.raises(ValueError, match="no implementation 'tritn'"):
        OP.overload(q, k, v, None, 1.0, False, 0, impl="tritn")


def test_choice() -> None:
    """The CPU never gets the Triton interpreter; packed on CUDA never reads on the host."""
    q, k, v = qkv(torch.device("cpu"), torch.float32, 1, (4, 2), 13, 16)
    cu = torch.tensor([0, 13])
    chosen = {
        (kind, packed, window): OP.choose(
            torch.device(kind), q, k, v, cu if packed else None, 1.0, True, window
        ).name
        for kind in ("cpu", "cuda")
        for packed in (False, True)
        for window in (0, 4)
    }
    assert chosen == {
        ("cpu", False, 0): "library",
        ("cpu", False, 4): "library_segments",
        ("cpu", True, 0): "library_segments",
        ("cpu", True, 4): "library_segments",
        ("cuda", False, 0): "library",
        ("cuda", False, 4): "triton",
        ("cuda", True, 0): "triton",
        ("cuda", True, 4): "triton",
    }
    double = OP.choose(torch.device("cuda"), q.double(), k.double(), v.double(), cu, 1.0, False, 0)
    assert double.name == "reference"
    assert "float64" in double.rejected["triton"]
    assert needs_cuda(torch.device("cpu")) == "needs CUDA, this is cpu"


def test_imports_without_triton() -> None:
    """All three attention ops load where Triton is not installed, and say so when asked."""
    code = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *a: None if name.startswith("triton") else find(name, *a)
import torch
from importlib import import_module
for name in ("attention", "cached_attention", "retrieval_attention"):
    op = import_module(f"sparsevila_compile.kernels.{name}.op").OP
    print(op.implementations["triton"].supported(torch.device("cuda")))
q = torch.zeros(1, 1, 1, 16)
try:
    torch.ops.sparsevila.attention(q, q, q, None, 1.0, True, 0, impl="triton")
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["triton is not installed"] * 3 + [
        "attention/triton: triton is not installed"
    ]


def test_kernels_can_run_here(device: torch.device) -> None:
    """The Triton tests above ran: on a GPU or in the interpreter, never skipped."""
    assert cuda_or_interpreter(device) is None


_LSE_BOUND = 1e-5
"""Scores are float32 sums of exact products whatever the inputs' dtype, and so is their log."""


def naive_lse(
    q: torch.Tensor, k: torch.Tensor, restriction: Restriction, scale: float
) -> torch.Tensor:
    """log(sum of exp) by definition, one row at a time: [B, Hq, S]."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    lse = torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keys = [j for j in range(length) if restriction.sees(i, j)]
                if keys:
                    scores = [float(q[b, h, i] @ k[b, h // group, j]) for j in keys]
                    lse[b, h, i] = math.log(sum(math.exp(scale * s) for s in scores))
    return lse


@pytest.mark.parametrize("case", SMALL)
def test_lse_naive(case: str) -> None:
    restriction, cpu = SMALL[case], torch.device("cpu")
    q, k, v = qkv(cpu, torch.float64, 1 if restriction.cu_seqlens else 2, (4, 2), 13, 8)
    args = (q, k, v, restriction.args(cpu)[0], 0.3, *restriction.args(cpu)[1:])
    out, lse = LSE.overload(*args)
    assert torch.equal(out, OP.overload(*args))
    assert lse.dtype == torch.float64
    naive = naive_lse(q, k, restriction, 0.3)
    if case == "packed, no segment":
        assert torch.equal(lse, torch.zeros(1, 4, 13, dtype=torch.float64))
    else:
        assert_catches_broken(lse, naive, 1e-12)


def check_lse(
    impl: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    restriction: Restriction,
) -> None:
    """The rows' log-sum-exp, and that asking for it leaves the attention as it was."""
    cu, causal, window = restriction.args(q.device)
    scale = q.shape[-1] ** -0.5
    exact = LSE.overload(q.double(), k.double(), v.double(), cu, scale, causal, window)
    out, lse = LSE.overload(q, k, v, cu, scale, causal, window, impl=impl)
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    bound = bound_from(
        eager_attention(q, k, v, restriction.visible(q.shape[2]).to(q.device), scale), exact[0]
    )
    assert_close_to(out, exact[0], bound, impl)
    assert_catches_broken(lse, exact[1], _LSE_BOUND)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("case", LARGE)
def test_lse(case: str, dtype: torch.dtype, device: torch.device) -> None:
    batch = 1 if LARGE[case].cu_seqlens else 2
    check_lse("triton", *qkv(device, dtype, batch, (4, 2), 150, 64), LARGE[case])


@pytest.mark.parametrize(
    "dim, heads, length", [(72, (4, 2), 31), (80, (7, 1), 65), (128, (7, 1), 97)]
)
def test_lse_head_dims(dim: int, heads: tuple[int, int], length: int, device: torch.device) -> None:
    q, k, v = qkv(device, torch.bfloat16, 2, heads, length, dim)
    check_lse("triton", q, k, v, Restriction(causal=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lse_opcheck(impl: str, device: torch.device) -> None:
    cu, causal, window = SMALL["packed"].args(device)
    q, k, v = qkv(device, torch.float32, 1, (4, 2), 13, 16)
    result = torch.library.opcheck(
        LSE.overload, (q, k, v, cu, 0.25, causal, window), {"impl": impl}
    )
    assert set(result.values()) == {"SUCCESS"}
    empty = LSE.overload(q[:, :, :0], k[:, :, :0], v[:, :, :0], None, 1.0, True, 0, impl=impl)
    assert [t.shape for t in empty] == [(1, 0, 4, 16), (1, 4, 0)]


def test_lse_choice() -> None:
    q, k, v = qkv(torch.device("cpu"), torch.bfloat16, 1, (4, 2), 13, 16)
    assert LSE.choose(torch.device("cuda"), q, k, v, None, 1.0, True, 0).name == "triton"
    assert LSE.choose(torch.device("cpu"), q, k, v, None, 1.0, True, 0).name == "reference"


ENCODER_WINDOWS = tuple(range(0, 4096 + 1, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["library", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "heads, dim, length, restriction",
    [
        ((16, 16), 80, 4096, Restriction(ENCODER_WINDOWS)),
        ((16, 16), 80, 10000, Restriction((0, 4096, 4097, 8192, 10000))),
        ((16, 16), 64, 4096, Restriction()),
        ((16, 16), 72, 4095, Restriction()),
        ((28, 4), 128, 4096, Restriction(causal=True)),
        ((28, 4), 128, 16384, Restriction(causal=True)),
        ((32, 4), 96, 8191, Restriction(causal=True, window=1024)),
    ],
)
def test_full_size(
    heads: tuple[int, int],
    dim: int,
    length: int,
    restriction: Restriction,
    dtype: torch.dtype,
    impl: str,
) -> None:
    device, scale = torch.device("cuda"), dim**-0.5
    q, k, v = qkv(device, dtype, 1, heads, length, dim)
    cu, causal, window = restriction.args(device)
    exact = OP.overload(q.float(), k.float(), v.float(), cu, scale, causal, window)
    out = OP.overload(q, k, v, cu, scale, causal, window, impl=impl)
    rows = torch.linspace(0, length - 1, 64).long().tolist()  # these set the bound
    visible = torch.tensor([[restriction.sees(i, j) for j in range(length)] for i in rows])
    low = eager_attention(q[:, :, rows], k, v, visible.to(device), scale)
    double = attend(
        q[:, :, rows].double(), k.double(), v.double(), visible.to(device), scale
    ).transpose(1, 2)
    assert_close_to(exact[:, rows], double, 1e-5, "reference in float32")
    bound = bound_from(low, double)
    assert_close_to(out, exact, bound, f"{impl} at {length}")
    assert_catches_broken(out, exact, bound)


HOPPER = {
    "full": Restriction(),
    "causal": Restriction(causal=True),
    "window": Restriction(causal=True, window=200),
    "windows of 64": Restriction(tuple(range(0, 833, 64))),
    "segments": Restriction((0, 300, 301, 301, 400, 833)),
    "small segments": Restriction((0, 5, 9, 70, 71, 200, 210, 260, 700, 833)),
    "packed causal window, rows outside": Restriction((30, 320, 700), causal=True, window=150),
    "many rows outside": Restriction((470, 471, 599, 727)),
    "around a block": Restriction((0, 127, 255, 384, 512, 641, 833)),
    "one long, many short": Restriction((0, 500, *range(501, 531), *[531] * 60, 833)),
    "many short, one long": Restriction((*[2] * 50, *range(3, 40), 833)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dim, heads", [(64, (4, 2)), (80, (2, 2)), (128, (7, 1))])
@pytest.mark.parametrize("case", HOPPER)
def test_hopper(case: str, dim: int, heads: tuple[int, int]) -> None:
    """Every restriction in the kernels for Hopper: several tiles of keys, rows and programs."""
    device = torch.device("cuda")
    q, k, v = qkv(device, torch.bfloat16, 1, heads, 833, dim)
    if torch.cuda.get_device_capability(device)[0] == 9:
        assert unsuitable(q, k, v, 1.0) is None
    check_lse("triton", q, k, v, HOPPER[case])
    check("triton", q, k, v, HOPPER[case], broken=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [32, 40, 48, 72, 96, 112, 120])
def test_hopper_head_dims(dim: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(torch.device("cuda"), dtype, 3, (4, 2), 301, dim)
    check("triton", q, k, v, Restriction(causal=True), broken=True)
    check_lse("triton", q[:1], k[:1], v[:1], Restriction((0, 100, 301)))


@pytest.mark.gpu
def test_hopper_many_programs() -> None:
    """More blocks of rows than processors: each program does several, and repeats to the bit."""
    q, k, v = qkv(torch.device("cuda"), torch.bfloat16, 8, (28, 4), 700, 128)
    check("triton", q, k, v, Restriction(causal=True))
    once, again = (OP.overload(q, k, v, None, 0.1, True, 0, impl="triton") for _ in range(2))
    assert torch.equal(once, again)
