"""sparsevila::cached_attention: the write, the attention, and that chunks add up to the whole."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.kernels.attention.hopper import _splits
from sparsevila_compile.kernels.attention.op import OP as ATTENTION
from sparsevila_compile.kernels.attention.reference import attend
from sparsevila_compile.kernels.cached_attention import split_kv
from sparsevila_compile.kernels.cached_attention import triton as cached_triton
from sparsevila_compile.kernels.cached_attention.op import LSE, OP
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
IMPLS = ["library", "triton few", "triton many"]


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation; of Triton's, the split-keys path ("few") or flash forward ("many")."""
    name, _, path = str(request.param).partition(" ")
    if path:
        monkeypatch.setattr(cached_triton, "_few_queries", lambda *_: path == "few")
    return name


@pytest.fixture
def device(request: pytest.FixtureRequest, device: torch.device) -> torch.device:
    """Where the implementation under test is used: ``library`` is the CPU's."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return device_for(OP, parameters.get("impl", "triton").partition(" ")[0], device)


def keys_of(case: Case, window: int = 0) -> KeysOf:
    def keys(b: int, h: int, i: int) -> list[int]:
        own = int(case.cache_lens[b]) + i
        if i >= int(case.new_lens[b]):
            return []
        return [j for j in range(case.held(b)) if j <= own and (window == 0 or own - j < window)]

    return keys


@pytest.mark.parametrize("impl", ["reference", "library"], indirect=True)
@pytest.mark.parametrize("window", [0, 1, 3])
def test_naive(window: int, impl: str) -> None:
    """Empty and part-filled caches, no new token, some, all; and one that overflows its cache."""
    case = Case.random(
        CPU,
        torch.float64,
        (4, 2),
        8,
        4,
        12,
        lens=[0, 0, 5, 5, 8, 10, 12],
        news=[4, 1, 0, 3, 4, 4, 2],
    )
    out = run(OP, impl, case, 0.3, window)
    naive = naive_attention(case.q, *case.written(), keys_of(case, window), 0.3)
    assert (naive[2] == 0).all()
    assert_close_to(out, naive, 1e-12, impl)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize(
    "dtype, window",
    [(torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 50)],
    ids=["fp32", "bf16", "fp16", "fp32, window"],
)
def test_ragged_prefill(dtype: torch.dtype, window: int, impl: str, device: torch.device) -> None:
    case = Case.random(
        device, dtype, (4, 2), 64, 37, 171, lens=[0, 100, 134, 150, 171], news=[37, 13, 37, 0, 5]
    )
    check(OP, impl, case, keys_of(case, window), 0.125, 0.125, window)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize(
    "dim, heads",
    [(64, (2, 2)), (72, (4, 2)), (80, (7, 1)), (96, (8, 1)), (128, (14, 2)), (128, (8, 4))],
)
@pytest.mark.parametrize("rows", [1, 6])
def test_head_dims_and_groups(
    rows: int, dim: int, heads: tuple[int, int], impl: str, device: torch.device
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lens, news = [130, 0], [rows, max(1, rows - 2)]
        case = Case.random(device, dtype, heads, dim, rows, 141, lens, news)
        check(OP, impl, case, keys_of(case), 0.1, 0.1, 0)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_catches_broken(impl: str, device: torch.device) -> None:
    case = Case.random(device, torch.bfloat16, (4, 2), 64, 8, 90, lens=[33, 80], news=[8, 8])
    exact = run(OP, "reference", case.to(torch.float64), 0.125, 0)
    bound = bound_from(case.eager(keys_of(case), 0.125), exact)
    assert_catches_broken(run(OP, impl, case, 0.125, 0), exact, bound)


@pytest.mark.parametrize("impl", ["reference", *IMPLS], indirect=True)
@pytest.mark.parametrize("window", [0, 11])
def test_chunks_add_up(window: int, impl: str, device: torch.device) -> None:
    """A sequence fed in chunks of any size gives causal attention over the whole of it."""
    case = Case.random(device, torch.float32, (4, 2), 64, 60, 64, lens=[0, 0], news=[60, 60])
    whole = ATTENTION.overload(case.q, case.k, case.v, None, 0.125, True, window)
    caches = case.args()[3:5]
    outs, done = [], 0
    for size in (1, 30, 5, 23, 1):
        new = (t[:, :, done : done + size] for t in (case.q, case.k, case.v))
        lens = torch.tensor([[done, done], [size, size]], dtype=torch.int32, device=device)
        outs.append(OP.overload(*new, *caches, *lens, 0.125, window, impl=impl))
        done += size
    assert_catches_broken(torch.cat(outs, dim=1), whole, 2e-6)
    for cache, new_tokens in zip(caches, (case.k, case.v), strict=True):
        assert torch.equal(cache[:, :, :60], new_tokens)
        assert cache[:, :, 60:].isnan().all()


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_strided_caches(impl: str, device: torch.device) -> None:
    """Caches may be views, here of [B, L, 2, Hkv, D] with keys and values side by side."""
    case = Case.random(device, torch.float32, (4, 2), 72, 3, 50, lens=[20, 41], news=[3, 2])
    exact = run(OP, "reference", case.to(torch.float64), 0.125, 0)
    both = torch.stack([case.k_cache, case.v_cache]).permute(1, 3, 0, 2, 4).contiguous()
    k_cache, v_cache = both.permute(2, 0, 3, 1, 4)
    out = OP.overload(
        case.q, case.k, case.v, k_cache, v_cache, case.cache_lens, case.new_lens, 0.125, 0,
        impl=impl,
    )  # fmt: skip
    assert_close_to(out, exact, 2e-6, impl)
    for cache, expected in zip((k_cache, v_cache), case.written(), strict=True):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits(splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of shares gives the same, with more shares than tiles and in a repeated run."""
    monkeypatch.setattr(split_kv, "_splits", lambda programs, tiles, device: splits)
    case = Case.random(device, torch.float32, (4, 2), 64, 2, 300, lens=[290, 3, 64], news=[2, 1, 2])
    check(OP, "triton", case, keys_of(case), 0.125, 0.125, 0)
    assert torch.equal(run(OP, "triton", case, 0.125, 0), run(OP, "triton", case, 0.125, 0))


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_nothing_new(impl: str, device: torch.device) -> None:
    """No new token in any row: zeros, and caches as they were."""
    case = Case.random(device, torch.float32, (4, 2), 64, 3, 20, lens=[0, 20], news=[0, 0])
    assert torch.equal(run(OP, impl, case, 0.125, 0), torch.zeros(2, 3, 4, 64, device=device))


@pytest.mark.parametrize("impl", ["reference", *IMPLS], indirect=True)
def test_opcheck(impl: str, device: torch.device) -> None:
    """Schema (with its mutations), fake and dispatch agree, static and dynamic."""
    case = Case.random(device, torch.float32, (4, 2), 16, 2, 9, lens=[3, 0], news=[2, 1])
    filled = case.written()  # opcheck compares caches by value: no NaN
    args = (*case.args()[:3], *(c.nan_to_num(0.0) for c in filled), *case.args()[5:], 0.25, 0)
    result = torch.library.opcheck(OP.overload, args, {"impl": impl})
    assert set(result.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in result


def test_refusals() -> None:
    case = Case.random(CPU, torch.float32, (4, 2), 16, 2, 9, lens=[3], news=[2])
    q, k, v, k_cache, v_cache, cache_lens, new_lens = case.args()
    with pytest.raises(ValueError, match="k_cache must be"):
        OP.overload(q, k, v, k_cache.half(), v_cache, cache_lens, new_lens, 1.0, 0)
    with pytest.raises(ValueError, match="v_cache must be"):
        OP.overload(q, k, v, k_cache, v_cache[..., :8], cache_lens, new_lens, 1.0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        OP.overload(*case.args(), 1.0, -1)


def test_choice() -> None:
    args = (*Case.random(CPU, torch.float32, (4, 2), 16, 2, 9, [3], [2]).args(), 1.0, 0)
    assert OP.choose(CPU, *args).name == "library"
    on_gpu = OP.choose(torch.device("cuda"), *args)
    assert on_gpu.name == "triton"
    assert on_gpu.rejected == {"library": "reads lengths on the host, this is cuda"}


def check_full_size(case: Case, scale: float) -> None:
    """Some rows of every batch row and head, one batch row at a time."""
    args = case.args()
    out = OP.overload(*args, scale, 0, impl="triton")
    k_cache, v_cache = case.written()
    assert torch.equal(args[3], k_cache)
    assert torch.equal(args[4], v_cache)
    assert out.isfinite().all()
    for b, (start, count) in enumerate(
        zip(case.cache_lens.tolist(), case.new_lens.tolist(), strict=True)
    ):
        rows = sorted({*torch.linspace(0, count - 1, 48).long().tolist()})
        key = torch.arange(start + count, device="cuda")
        visible = key <= start + torch.tensor(rows, device="cuda")[:, None]
        q, k, v = (
            case.q[b : b + 1, :, rows],
            k_cache[b : b + 1, :, : start + count],
            v_cache[b : b + 1, :, : start + count],
        )
        exact = attend(q.double(), k.double(), v.double(), visible, scale).transpose(1, 2)
        bound = bound_from(eager_attention(q, k, v, visible, scale), exact)
        assert_catches_broken(out[b : b + 1, rows], exact, bound)
        assert (out[b, count:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, dim, rows, lens, news",
    [
        ((28, 4), 128, 8192, [50000], [8192]),
        ((28, 4), 128, 2048, [50000, 0], [2048, 1500]),
        ((28, 4), 128, 60, [50000], [60]),
        ((28, 4), 128, 1, [50000], [1]),
        ((28, 4), 128, 1, [50000, 49999, 3, 20000, 12345, 50001, 0, 31111], [1] * 8),
        ((16, 2), 64, 1, [50000] * 8, [1] * 8),
        ((32, 32), 96, 1, [10000] * 2, [1] * 2),
        ((8, 8), 72, 4, [10000] * 2, [4, 2]),
    ],
)
def test_full_size(
    heads: tuple[int, int], dim: int, rows: int, lens: list[int], news: list[int]
) -> None:
    capacity = max(lens) + rows + 7
    case = Case.random(torch.device("cuda"), torch.bfloat16, heads, dim, rows, capacity, lens, news)
    filled = {"k_cache": case.k_cache.nan_to_num(1e4), "v_cache": case.v_cache.nan_to_num(1e4)}
    check_full_size(Case(**{**case.__dict__, **filled}), dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 512])
def test_captured_in_a_graph(rows: int) -> None:
    """One captured call serves other lengths: nothing about them is read on the host."""
    device, scale = torch.device("cuda"), 128**-0.5
    lens, news = [1000, 17], [rows, 1]
    case = Case.random(device, torch.bfloat16, (28, 4), 128, rows, 9000, lens, news)
    args = case.args()
    OP.overload(*args, scale, 0, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP.overload(*args, scale, 0, impl="triton")
    for lens in ([1000, 17], [8000, 0], [3, 8450]):
        other = Case.random(device, torch.bfloat16, (28, 4), 128, rows, 9000, lens, news)
        for mine, theirs in zip(args, other.args(), strict=True):
            mine.copy_(theirs)
        graph.replay()
        fresh = OP.overload(*other.args(), scale, 0, impl="triton")
        assert torch.equal(out, fresh)
        assert fresh.float().square().mean() > 0


def check_lse(case: Case, impl: str, window: int) -> None:
    """Output, writes and log-sum-exp of ``cached_attention_lse``."""
    scale = case.q.shape[-1] ** -0.5
    wide = case.to(torch.float64)
    exact, exact_lse = LSE.overload(*wide.args(), scale, window)
    assert torch.equal(exact, run(OP, "reference", wide, scale, window))
    args = case.args()
    out, lse = LSE.overload(*args, scale, window, impl=impl)
    for cache, expected in zip(args[3:5], case.written(), strict=True):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    assert_close_to(out, exact, bound_from(case.eager(keys_of(case, window), scale), exact), impl)
    assert lse.dtype == torch.float32
    assert_catches_broken(lse, exact_lse, 1e-5)
    padding = torch.arange(case.q.shape[2], device=lse.device) >= case.new_lens[:, None]
    assert padding.any()
    assert (lse.transpose(1, 2)[padding] == 0).all()


def test_lse_naive() -> None:
    """Against scores written out, row by row, with an overflowing cache and padding."""
    case = Case.random(CPU, torch.float64, (4, 2), 8, 4, 12, lens=[0, 5, 10], news=[4, 1, 4])
    lse = LSE.overload(*case.args(), 0.3, 3)[1]
    k_cache = case.written()[0]
    naive = torch.zeros(3, 4, 4, dtype=torch.float64)
    for b in range(3):
        for h in range(4):
            for i in range(4):
                keys = keys_of(case, 3)(b, h // 2, i)
                if keys:
                    scores = k_cache[b, h // 2, keys] @ case.q[b, h, i]
                    naive[b, h, i] = (0.3 * scores).exp().sum().log()
    assert_catches_broken(lse, naive, 1e-12)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("rows", [5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lse(dtype: torch.dtype, rows: int, window: int, device: torch.device) -> None:
    lens, news = [0, 100, 134, 150, 171], [rows, 3, rows, 0, 5]
    case = Case.random(device, dtype, (4, 2), 64, rows, 171, lens, news)
    check_lse(case, "triton", window)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lse_opcheck(impl: str, device: torch.device) -> None:
    case = Case.random(device, torch.float32, (4, 2), 16, 2, 9, lens=[3, 0], news=[2, 1])
    filled = case.written()  # opcheck compares caches by value: no NaN
    args = (*case.args()[:3], *(c.nan_to_num(0.0) for c in filled), *case.args()[5:], 0.25, 0)
    result = torch.library.opcheck(LSE.overload, args, {"impl": impl})
    assert set(result.values()) == {"SUCCESS"}
    assert LSE.choose(torch.device("cuda"), *args).name == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 1500])
@pytest.mark.parametrize(
    "heads, dim, rows, lens",
    [
        ((28, 4), 128, 32, [20000]),
        ((28, 4), 128, 17, [9000, 3, 0, 12000]),
        ((16, 2), 80, 200, [5000]),
        ((8, 8), 64, 100, [7000, 7001]),
        ((28, 4), 128, 700, [3000, 17]),
    ],
)
def test_many_rows_on_hopper(
    heads: tuple[int, int],
    dim: int,
    rows: int,
    lens: list[int],
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flash forward with its keys split among programs (few rows) or not, and its log-sum-exp."""
    monkeypatch.setattr(cached_triton, "_few_queries", lambda *_: False)
    news = [rows, *(max(0, rows - 3 - b) for b in range(len(lens) - 1))]
    case = Case.random(
        torch.device("cuda"), torch.bfloat16, heads, dim, rows, max(lens) + rows - 1, lens, news
    )
    scale = dim**-0.5
    for part in range(0, heads[1], 2):  # some key/value heads at a time: the exact one is large
        group = heads[0] // heads[1]
        some = slice(part, part + 1)
        few = Case(
            case.q[:, part * group : (part + 1) * group],
            *(getattr(case, n)[:, some].contiguous() for n in ("k", "v", "k_cache", "v_cache")),
            case.cache_lens,
            case.new_lens,
        )
        exact, exact_lse = LSE.overload(*few.to(torch.float64).args(), scale, window)
        low = run(OP, "reference", few, scale, window)
        bound = bound_from(low, exact, factor=3.0)
        args = few.args()
        out, lse = LSE.overload(*args, scale, window, impl="triton")
        assert_catches_broken(out, exact, bound)
        assert_catches_broken(lse, exact_lse, 1e-5)
        assert torch.equal(out, run(OP, "triton", few, scale, window))
        for b, count in enumerate(news):
            assert (out[b, count:] == 0).all()
            assert (lse[b, :, count:] == 0).all()
    whole = LSE.overload(*case.args(), scale, window, impl="triton")
    again = LSE.overload(*case.args(), scale, window, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_plan_for_few_rows() -> None:
    """Keys are split where blocks of rows are too few for the processors, and only there."""
    assert _splits(1, 28, 4, 8192, 58000, 132) == 0
    assert _splits(8, 28, 4, 512, 2048, 132) == 0
    assert 12 <= _splits(1, 28, 4, 32, 50000, 132) <= 20
    assert 3 <= _splits(8, 28, 4, 16, 50000, 132) <= 8
    assert _splits(1, 28, 4, 32, 128, 132) <= 1
