"""sparsevila::retrieval_attention: the named positions and the tail, and nothing else."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.kernels.attention.reference import attend
from sparsevila_compile.kernels.cached_attention import split_kv
from sparsevila_compile.kernels.cached_attention.op import OP as CACHED
from sparsevila_compile.kernels.retrieval_attention.op import OP
from tests.kernels.caches import Case, KeysOf, check, device_for, run
from tests.kernels.compare import (
    assert_catches_broken,
    assert_close_to,
    bound_from,
    eager_attention,
    naive_attention,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CPU = torch.device("cpu")


@pytest.fixture
def device(request: pytest.FixtureRequest, device: torch.device) -> torch.device:
    """Where the implementation under test is used: ``library`` is the CPU's."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return device_for(OP, parameters.get("impl", "triton"), device)


def random_index(
    case: Case, tails: list[int], index_heads: int, slots: int, dtype: torch.dtype = torch.int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """index [B, H, slots] with some slots absent, in any order, another number for every head."""
    limits = [min(t, int(n)) for t, n in zip(tails, case.cache_lens, strict=True)]
    index = torch.full((len(tails), index_heads, slots), -1, dtype=dtype)
    for b, limit in enumerate(limits):
        for h in range(index_heads):
            named = min(limit, max(0, slots - 2 - h))
            index[b, h, torch.randperm(slots)[:named]] = torch.randperm(limit)[:named].to(dtype)
    device = case.q.device
    return index.to(device), torch.tensor(tails, dtype=torch.int32, device=device)


def keys_of(case: Case, index: torch.Tensor, tails: list[int]) -> KeysOf:
    named = index.tolist()

    def keys(b: int, h: int, i: int) -> list[int]:
        if i >= int(case.new_lens[b]):
            return []
        chosen = [j for j in named[b][h if len(named[b]) > 1 else 0] if j >= 0]
        own = int(case.cache_lens[b]) + i
        return chosen + [j for j in range(tails[b], case.held(b)) if j <= own]

    return keys


@pytest.mark.parametrize("impl", ["reference", "library"])
@pytest.mark.parametrize("index_heads", [1, 2])
@pytest.mark.parametrize("slots", [0, 6])
@pytest.mark.parametrize("rows", [1, 3])
def test_naive(rows: int, slots: int, index_heads: int, impl: str) -> None:
    """Rows: plain; nothing cached; nothing new; no tail before the new tokens; all tail; full; a
    tail that starts after the first new token."""
    case = Case.random(
        CPU, torch.float64, (4, 2), 8, rows, 15,
        lens=[10, 0, 7, 9, 5, 15, 9], news=[rows, 1, 0, rows, rows, 1, rows],
    )  # fmt: skip
    tails = [6, 0, 3, 9, 0, 12, 10]
    index, tail_start = random_index(case, tails, index_heads, slots)
    out = run(OP, impl, case, index, tail_start, 0.3)
    naive = naive_attention(case.q, *case.written(), keys_of(case, index, tails), 0.3)
    assert_close_to(out, naive, 1e-12, impl)


@pytest.mark.parametrize("impl", ["library", "triton"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("index_heads", [1, 2])
def test_ragged(index_heads: int, dtype: torch.dtype, impl: str, device: torch.device) -> None:
    case = Case.random(
        device, dtype, (4, 2), 64, 1, 200, lens=[199, 150, 0, 70, 200], news=[1, 1, 1, 0, 1]
    )
    tails = [120, 150, 0, 20, 190]
    index, tail_start = random_index(case, tails, index_heads, 75, torch.int64)
    check(OP, impl, case, keys_of(case, index, tails), 0.125, index, tail_start, 0.125)


@pytest.mark.parametrize("impl", ["library", "triton"])
@pytest.mark.parametrize(
    "dim, heads",
    [(64, (2, 2)), (72, (4, 2)), (80, (7, 1)), (96, (8, 1)), (128, (14, 2)), (128, (8, 4))],
)
@pytest.mark.parametrize("rows", [1, 11])
def test_head_dims_and_groups(
    rows: int, dim: int, heads: tuple[int, int], impl: str, device: torch.device
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lens, news, tails = [130, 40], [rows, max(1, rows - 2)], [90, 43]
        case = Case.random(device, dtype, heads, dim, rows, 141, lens, news)
        index, tail_start = random_index(case, tails, heads[1], 40)
        check(OP, impl, case, keys_of(case, index, tails), 0.1, index, tail_start, 0.1)


@pytest.mark.parametrize("impl", ["library", "triton"])
def test_catches_broken(impl: str, device: torch.device) -> None:
    case = Case.random(device, torch.bfloat16, (4, 2), 64, 4, 90, lens=[33, 80], news=[4, 4])
    index, tail_start = random_index(case, [30, 60], 2, 20)
    exact = run(OP, "reference", case.to(torch.float64), index, tail_start, 0.125)
    bound = bound_from(case.eager(keys_of(case, index, [30, 60]), 0.125), exact)
    assert_catches_broken(run(OP, impl, case, index, tail_start, 0.125), exact, bound)


@pytest.mark.parametrize("impl", ["reference", "library", "triton"])
def test_all_named_is_dense(impl: str, device: torch.device) -> None:
    """An index of everything before the tail gives cached_attention; of nothing, the tail alone."""
    case = Case.random(device, torch.float32, (4, 2), 64, 2, 90, lens=[70, 30], news=[2, 2])
    dense = run(CACHED, "reference", case, 0.125, 0)
    tail_start = torch.tensor([60, 20], dtype=torch.int32, device=device)
    everything = torch.full((2, 1, 64), -1, device=device)
    everything[0, 0, :60], everything[1, 0, 9:29] = torch.randperm(60), torch.randperm(20)
    everything = everything.to(device)
    assert_catches_broken(run(OP, impl, case, everything, tail_start, 0.125), dense, 2e-6)

    alone = run(CACHED, "reference", case, 0.125, 11)[:, :1]  # ten cached tokens and the new one
    absent = torch.full_like(everything, -1)
    for nothing in (absent, absent[:, :, :0]):
        out = run(OP, impl, case, nothing, tail_start, 0.125)[:, :1]
        assert_catches_broken(out, alone, 2e-6)


@pytest.mark.parametrize("impl", ["library", "triton"])
def test_index_is_any_view(impl: str, device: torch.device) -> None:
    case = Case.random(device, torch.float32, (4, 2), 64, 1, 90, lens=[70, 30], news=[1, 1])
    index, tail_start = random_index(case, [60, 20], 2, 16, torch.int64)
    view = index.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not view.is_contiguous()
    contiguous = run(OP, impl, case, index, tail_start, 0.125)
    assert torch.equal(run(OP, impl, case, view, tail_start, 0.125), contiguous)
    assert contiguous.square().mean() > 0


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits(splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of shares gives the same: shares of the index, of the tail, of both, of none."""
    monkeypatch.setattr(split_kv, "_splits", lambda programs, tiles, device: splits)
    case = Case.random(device, torch.float32, (4, 2), 64, 2, 300, lens=[290, 3, 64], news=[2, 1, 2])
    tails = [150, 3, 0]
    index, tail_start = random_index(case, tails, 1, 100)
    check(OP, "triton", case, keys_of(case, index, tails), 0.125, index, tail_start, 0.125)
    first, second = (run(OP, "triton", case, index, tail_start, 0.125) for _ in range(2))
    assert torch.equal(first, second)


def test_index_into_the_tail(device: torch.device) -> None:
    """An error where the index can be looked at; for a kernel such an entry is absent."""
    case = Case.random(device, torch.float32, (4, 2), 64, 1, 90, lens=[70, 30], news=[1, 1])
    index, tail_start = random_index(case, [60, 20], 1, 16)
    for wrong in (20, 1_000_000):
        bad, absent = index.clone(), index.clone()
        bad[1, 0, 5], absent[1, 0, 5] = wrong, -1
        for impl in ("reference", "library"):
            with pytest.raises(ValueError, match=f"names cache position {wrong}, but the tail"):
                OP.overload(*case.args(), bad, tail_start, 0.125, impl=impl)
        out = run(OP, "triton", case, bad, tail_start, 0.125)
        assert torch.equal(out, run(OP, "triton", case, absent, tail_start, 0.125))


@pytest.mark.parametrize("impl", ["reference", "library", "triton"])
def test_opcheck(impl: str, device: torch.device) -> None:
    """Schema (with its mutations), fake and dispatch agree, static and dynamic."""
    case = Case.random(device, torch.float32, (4, 2), 16, 2, 9, lens=[3, 4], news=[2, 1])
    index, tail_start = random_index(case, [2, 3], 2, 3)
    filled = case.written()  # opcheck compares caches by value: no NaN
    args = (*case.args()[:3], *(c.nan_to_num(0.0) for c in filled), *case.args()[5:])
    result = torch.library.opcheck(OP.overload, (*args, index, tail_start, 0.25), {"impl": impl})
    assert set(result.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in result


def test_refusals() -> None:
    case = Case.random(CPU, torch.float32, (8, 4), 16, 2, 9, lens=[3], news=[2])
    tail_start = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="2 heads, not 1 or 4"):
        OP.overload(*case.args(), torch.zeros(1, 2, 3, dtype=torch.int64), tail_start, 1.0)
    with pytest.raises(ValueError, match="index must be int"):
        OP.overload(*case.args(), torch.zeros(1, 1, 3), tail_start, 1.0)


def test_choice() -> None:
    case = Case.random(CPU, torch.float32, (4, 2), 16, 2, 9, lens=[3], news=[2])
    args = (*case.args(), *random_index(case, [2], 1, 3), 1.0)
    assert OP.choose(CPU, *args).name == "library"
    assert OP.choose(torch.device("cuda"), *args).name == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("index_heads", [1, 4])
@pytest.mark.parametrize("slots", [5000, 0])
@pytest.mark.parametrize(
    "lens", [[50000], [50000, 49999, 300, 20000, 12345, 50001, 40, 31111]], ids=["B1", "B8"]
)
def test_full_size(lens: list[int], slots: int, index_heads: int) -> None:
    """5,000 of 50,000 positions and a tail of 40, 28 query and 4 key/value heads of 128."""
    device, scale = torch.device("cuda"), 128**-0.5
    case = Case.random(device, torch.bfloat16, (28, 4), 128, 1, 50010, lens, [1] * len(lens))
    tails = [n - 40 for n in lens]
    index, tail_start = random_index(case, tails, index_heads, slots)
    out = run(OP, "triton", case, index, tail_start, scale)
    k_cache, v_cache = case.written()
    keys = keys_of(case, index, tails)
    for b in range(len(lens)):
        for h in range(4):
            q = case.q[b : b + 1, h * 7 : h * 7 + 7]
            at = torch.tensor(keys(b, h, 0), device=device)
            k, v = k_cache[b : b + 1, h : h + 1, at], v_cache[b : b + 1, h : h + 1, at]
            visible = torch.ones(1, len(at), dtype=torch.bool, device=device)
            exact = attend(q.double(), k.double(), v.double(), visible, scale).transpose(1, 2)
            bound = bound_from(eager_attention(q, k, v, visible, scale), exact)
            assert_catches_broken(out[b : b + 1, :, h * 7 : h * 7 + 7], exact, bound)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """One captured call serves other lengths and other indices."""
    device, scale = torch.device("cuda"), 128**-0.5
    case = Case.random(device, torch.bfloat16, (28, 4), 128, 1, 9000, [1000, 170], [1, 1])
    args = (*case.args(), *random_index(case, [900, 150], 4, 100))
    OP.overload(*args, scale, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP.overload(*args, scale, impl="triton")
    for lens, tails in (([8000, 40], [7000, 20]), ([30, 8990], [30, 0])):
        other = Case.random(device, torch.bfloat16, (28, 4), 128, 1, 9000, lens, [1, 1])
        theirs = (*other.args(), *random_index(other, tails, 4, 100))
        for mine, new in zip(args, theirs, strict=True):
            mine.copy_(new)
        graph.replay()
        fresh = run(OP, "triton", other, *theirs[-2:], scale)
        assert torch.equal(out, fresh)
        assert fresh.float().square().mean() > 0
