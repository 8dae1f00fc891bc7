"""``column_reduce``: the reference against loops, the kernels against both, and the promises."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsevila_compile.kernels.column_reduce import reference as reference_module
from sparsevila_compile.kernels.column_reduce.op import OP
from sparsevila_compile.kernels.triton_support import interpreting
from tests.kernels.compare import (
    assert_catches_broken,
    assert_close_to,
    bound_from,
    relative_error,
)

column_reduce = torch.ops.sparsevila.column_reduce


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    row_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    q_start: Tensor | None = None
    k_lens: Tensor | None = None
    columns: Tensor | None = None
    scale: float = 0.0
    causal: bool = False
    heads: str = "mean"

    def on(self, device: torch.device) -> Case:
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def run(self, impl: str) -> Tensor:
        return column_reduce(*vars(self).values(), impl=impl)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def case(
    batch: int = 2,
    heads_q: int = 4,
    heads_kv: int = 2,
    rows: int = 37,
    keys: int = 75,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    **rest: Any,
) -> Case:
    q = randn(batch, heads_q, rows, dim, dtype=dtype, seed=1)
    k = randn(batch, heads_kv, keys, dim, dtype=dtype, seed=2)
    # Scores of standard deviation 2: softmax is neither flat (any kernel would pass) nor one-hot.
    return Case(q, k, scale=2 / math.sqrt(dim), **rest)


def padded(batch: int, keys: int, width: int) -> Tensor:
    """Columns in no order, with repeats, padding and one that is no key."""
    columns = randint(0, keys, (batch, width), seed=3)
    columns[:, 5:9] = -1
    columns[:, 11] = columns[:, 10]
    columns[:, 12] = keys + 3
    return columns


def sparse_weights(batch: int, rows: int) -> Tensor:
    """Mostly zeros; what there is lies in the middle, with one negative weight."""
    weights = torch.zeros(batch, rows)
    weights[:, rows // 3 : rows // 2] = randn(batch, rows // 2 - rows // 3, seed=4).abs() + 0.1
    weights[:, rows // 2 - 1] = -0.5
    return weights


def naive(c: Case) -> Tensor:
    """float64, one row of one head at a time."""
    batch, q_heads, rows, _ = c.q.shape
    kv_heads, keys = c.k.shape[1:3]
    sums = torch.zeros(batch, q_heads, keys, dtype=torch.float64)
    bounds = None if c.cu_seqlens is None else c.cu_seqlens.tolist()
    for b in range(batch):
        for i in range(rows):
            first, end, uniform = 0, keys, 1 / rows
            if bounds is not None:
                own = [(s, e) for s, e in pairwise(bounds) if s <= i < e]
                first, end = own[0] if own else (0, 0)
                uniform = 1 / (end - first) if own else 0.0
            if c.k_lens is not None:
                end = int(c.k_lens[b])
            if c.q_start is not None:
                end = min(end, int(c.q_start[b]) + i + 1)
            weight = uniform if c.row_weights is None else float(c.row_weights[b, i])
            if end <= first or weight == 0:
                continue
            for h in range(q_heads):
                key = c.k[b, h * kv_heads // q_heads, first:end].double()
                p = torch.softmax(key @ c.q[b, h, i].double() * c.scale, 0)
                sums[b, h, first:end] += weight * p
    groups = {"mean": 1, "kv": kv_heads, "none": q_heads}[c.heads]
    pooled = sums.reshape(batch, groups, q_heads // groups, keys).mean(2)
    if c.columns is None:
        return pooled
    out = torch.zeros(batch, groups, c.columns.shape[1], dtype=torch.float64)
    for b in range(batch):
        for v, j in enumerate(c.columns[b].tolist()):
            if 0 <= j < keys:
                out[b, :, v] = pooled[b, :, j]
    return out


def eager(c: Case) -> Tensor:
    """The matrix written out in the dtype of q: how far plain code in that dtype is off."""
    batch, q_heads, rows, _ = c.q.shape
    keys = c.k.shape[2]
    sharing = q_heads // c.k.shape[1]
    key = torch.arange(keys)
    seen = torch.ones(batch, rows, keys, dtype=torch.bool)
    weights = torch.full((batch, rows), 1 / rows)
    if c.cu_seqlens is not None:
        sizes = c.cu_seqlens.diff()
        segment = torch.full((rows,), -1)
        inside = slice(int(c.cu_seqlens[0]), int(c.cu_seqlens[-1]))
        segment[inside] = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        seen &= (segment[:, None] == segment) & (segment >= 0)[:, None]
        weights = torch.where(segment >= 0, 1 / sizes[segment.clamp(min=0)].clamp(min=1), 0.0)[None]
    if c.k_lens is not None:
        seen &= key < c.k_lens[:, None, None]
    if c.q_start is not None:
        seen &= key <= (c.q_start[:, None] + torch.arange(rows))[:, :, None]
    weights = weights if c.row_weights is None else c.row_weights
    q = c.q.masked_fill((weights == 0)[:, None, :, None], 0)
    k = c.k.masked_fill(~seen.any(1)[:, None, :, None], 0).repeat_interleave(sharing, 1)
    scores = (q @ k.transpose(2, 3) * c.scale).masked_fill(~seen[:, None], float("-inf"))
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    sums = (weights[:, None, :, None].to(p.dtype) * p).sum(2)
    groups = {"mean": 1, "kv": c.k.shape[1], "none": q_heads}[c.heads]
    pooled = sums.reshape(batch, groups, -1, keys).mean(2)
    if c.columns is None:
        return pooled
    exists = (c.columns >= 0) & (c.columns < keys)
    at = c.columns.clamp(0, keys - 1)[:, None].expand(-1, groups, -1)
    return torch.where(exists[:, None], pooled.gather(2, at), 0)


def allowed(c: Case, exact: Tensor) -> float:
    """The bound for this case: a tenth of what eager code errs in half precision, since scores and
    sums are float32 here; in float32 a few times, and never under a few units of resolution."""
    if c.q.dtype == torch.float32:
        return max(bound_from(eager(c), exact, factor=4), 2e-6)
    return min(bound_from(eager(c), exact), 0.02) / 10


def cached(c: Case, lens: list[int]) -> Case:
    """k as a view of a larger cache kept as [B, L, H, D], whose unused positions are NaN."""
    batch, kv_heads, keys, dim = c.k.shape
    cache = torch.full((batch, keys + 9, kv_heads, dim), float("nan"), dtype=c.k.dtype)
    for b, n in enumerate(lens):
        cache[b, :n] = c.k[b, :, :n].transpose(0, 1)
    return replace(c, k=cache.transpose(1, 2), k_lens=torch.tensor(lens))


def strided(c: Case) -> Case:
    """q and k cut out of one fused tensor; k's last dim is not the contiguous one."""
    q = torch.cat([c.q, c.q + 1], -1).transpose(1, 2).contiguous().transpose(1, 2)
    return replace(c, q=q[..., : c.q.shape[-1]], k=c.k.transpose(2, 3).contiguous().transpose(2, 3))


def nan_rows(c: Case) -> Case:
    """NaN wherever a row has no weight: not one may show."""
    assert c.row_weights is not None
    unused = (c.row_weights == 0)[:, None, :, None]
    assert unused.any()
    return replace(c, q=c.q.masked_fill(unused, float("nan")))


BF16, FP16 = torch.bfloat16, torch.float16
SEGMENTS = torch.tensor([3, 3, 20, 20, 90, 127])  # empty ones, and rows in none at both ends

CASES: dict[str, Callable[[], Case]] = {
    "dim64": lambda: case(dim=64),
    "dim72": lambda: case(dim=72, heads="kv"),
    "dim80": lambda: case(dim=80, heads="none"),
    "dim96": lambda: case(dim=96),
    "dim128": lambda: case(dim=128, heads="kv"),
    "dim64-bf16": lambda: case(dim=64, dtype=BF16, heads="none"),
    "dim72-fp16": lambda: case(dim=72, dtype=FP16),
    "dim80-bf16": lambda: case(dim=80, dtype=BF16, heads="kv"),
    "dim96-bf16": lambda: case(dim=96, dtype=BF16),
    "dim128-bf16": lambda: case(dim=128, dtype=BF16, columns=padded(2, 75, 40)),
    "dim256": lambda: case(dim=256, batch=1, rows=9, keys=40),
    "dim256-bf16": lambda: case(dim=256, batch=1, rows=9, keys=40, dtype=BF16),
    "dim20": lambda: case(dim=20),
    "gqa1": lambda: case(heads_q=3, heads_kv=3, heads="kv"),
    "gqa2-none": lambda: case(heads_q=6, heads_kv=3, heads="none"),
    "gqa7": lambda: case(heads_q=14, heads_kv=2, rows=11, heads="kv"),
    "gqa7-none": lambda: case(batch=1, heads_q=14, heads_kv=2, rows=11, heads="none"),
    "gqa7-mean": lambda: case(heads_q=14, heads_kv=2, rows=11),
    "gqa8": lambda: case(heads_q=8, heads_kv=1, batch=3, rows=13, heads="kv"),
    "one-row": lambda: case(rows=1, keys=131),
    "one-key": lambda: case(keys=1, rows=5, batch=3),
    "many-rows": lambda: case(batch=1, heads_q=2, heads_kv=1, rows=90, keys=67),
    "split-keys": lambda: case(batch=1, heads_q=7, heads_kv=1, rows=3, keys=700, heads="kv"),
    "causal": lambda: case(causal=True, q_start=torch.tensor([38, 20])),
    "causal-prefix": lambda: case(causal=True, q_start=torch.tensor([0, 30]), heads="none"),
    "causal-hidden-rows": lambda: case(
        causal=True, q_start=torch.tensor([-9, 70], dtype=torch.int32)
    ),
    "causal-split": lambda: case(
        batch=1, rows=5, keys=600, causal=True, q_start=torch.tensor([411]), heads="kv"
    ),
    "k-lens": lambda: case(k_lens=torch.tensor([75, 41], dtype=torch.int32), heads="kv"),
    "k-lens-zero": lambda: case(k_lens=torch.tensor([0, 33])),
    "columns": lambda: case(columns=padded(2, 75, 40), heads="none"),
    "columns-int32": lambda: case(columns=padded(2, 75, 33).int()),
    "weights": lambda: nan_rows(case(rows=100, row_weights=sparse_weights(2, 100), heads="kv")),
    "weights-bf16": lambda: nan_rows(
        case(rows=100, row_weights=sparse_weights(2, 100), dtype=BF16, dim=80)
    ),
    "packed": lambda: case(batch=1, rows=130, keys=130, cu_seqlens=SEGMENTS),
    "packed-weights": lambda: nan_rows(
        case(
            batch=1,
            rows=130,
            keys=130,
            cu_seqlens=SEGMENTS.int(),
            row_weights=sparse_weights(1, 130),
            heads="kv",
        )
    ),
    "packed-columns": lambda: case(
        batch=1, rows=130, keys=130, cu_seqlens=SEGMENTS, columns=padded(1, 130, 40), dtype=BF16
    ),
    "strided": lambda: strided(case(dim=72, dtype=BF16, heads="kv")),
    "strided-fp32": lambda: strided(case(dim=80)),
    "retrieval": lambda: cached(
        nan_rows(
            case(
                heads_q=14,
                rows=40,
                keys=170,
                causal=True,
                q_start=torch.tensor([120, 60]),
                columns=padded(2, 150, 50),
                row_weights=sparse_weights(2, 40),
                heads="kv",
            )
        ),
        [160, 100],
    ),
}


@pytest.fixture(scope="module")
def exact() -> Callable[[str], tuple[Case, Tensor]]:
    """The case and its float64 loops, computed once for all tests."""
    known: dict[str, tuple[Case, Tensor]] = {}

    def get(name: str) -> tuple[Case, Tensor]:
        if name not in known:
            c = CASES[name]()
            known[name] = c, naive(c)
        return known[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_loops(name: str, exact: Any, device: torch.device) -> None:
    c, expected = exact(name)
    out = c.on(device).run("reference")
    assert out.dtype == torch.float32
    assert_close_to(out, expected, allowed(c, expected), name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_equals_reference(name: str, exact: Any, device: torch.device) -> None:
    c, expected = exact(name)
    out = c.on(device).run("triton")
    bound = allowed(c, expected)
    assert_close_to(out, c.on(device).run("reference"), bound, f"{name}, reference")
    assert_close_to(out, expected, bound, f"{name}, loops")
    if c.columns is not None:
        absent = (c.columns < 0) | (c.columns >= c.k.shape[2])
        assert absent.any()
        assert not out.cpu().masked_select(absent[:, None]).any(), "padding reports something"


@pytest.mark.parametrize("name", ["dim72-fp16", "packed", "retrieval"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_comparison_catches_broken_results(
    name: str, impl: str, exact: Any, device: torch.device
) -> None:
    c, expected = exact(name)
    assert_catches_broken(c.on(device).run(impl).cpu(), expected, allowed(c, expected))


@pytest.mark.parametrize(
    ("what", "name", "broken"),
    [
        ("head dim cut", "dim72-fp16", lambda c: replace(c, q=c.q[..., :64], k=c.k[..., :64])),
        ("key head shared wrongly", "gqa2-none", lambda c: replace(c, k=c.k.roll(1, 1))),
        ("rows of another start", "causal", lambda c: replace(c, q_start=c.q_start + 1)),
        ("last key lost", "k-lens", lambda c: replace(c, k_lens=c.k_lens - 1)),
        ("weights ignored", "packed-weights", lambda c: replace(c, row_weights=None, q=randn(1))),
        ("rows over chosen columns alone", "split-keys", lambda c: replace(c, k=c.k[:, :, :650])),
        ("segments merged", "packed", lambda c: replace(c, cu_seqlens=c.cu_seqlens[[0, 4, 5]])),
        ("scale doubled", "dim64-bf16", lambda c: replace(c, scale=2 * c.scale)),
    ],
)
def test_cases_tell_right_from_wrong(
    what: str, name: str, broken: Callable[[Case], Case], exact: Any
) -> None:
    """The values of each case are such that this mistake would exceed its bound."""
    c, expected = exact(name)
    wrong = broken(c)
    if wrong.q.dim() != 4:  # weights ignored: the NaN rows would give it away by themselves
        wrong = replace(wrong, q=c.q.nan_to_num(0.5))
    out = naive(wrong)
    error = relative_error(out, expected[..., : out.shape[-1]])
    assert error > 4 * allowed(c, expected), f"{what}: {error:.3g}"


@pytest.mark.parametrize("name", ["packed", "split-keys", "weights-bf16"])
def test_triton_repeats_itself(name: str, device: torch.device) -> None:
    c = CASES[name]().on(device)
    assert torch.equal(c.run("triton"), c.run("triton"))


def test_uniform_rows_sum_to_one() -> None:
    out = case().run("reference")
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 1))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_attended_is_zero(impl: str, device: torch.device) -> None:
    nothing = [
        case(k_lens=torch.tensor([0, 0])),
        case(causal=True, q_start=torch.tensor([-40, -37])),
        case(row_weights=torch.zeros(2, 37)),
        case(batch=1, rows=9, keys=9, cu_seqlens=torch.tensor([4])),
        case(rows=0),
        case(keys=0, columns=torch.tensor([[0, -1], [-1, 2]])),
        case(columns=torch.full((2, 5), -1)),
    ]
    for c in nothing:
        out = c.on(device).run(impl)
        width = c.k.shape[2] if c.columns is None else c.columns.shape[1]
        assert out.shape == (c.q.shape[0], 1, width)
        assert not out.any()
    assert case(batch=0).on(device).run(impl).shape == (0, 1, 75)
    assert case(columns=torch.zeros(2, 0).long()).on(device).run(impl).shape == (2, 1, 0)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_in_a_used_row_is_not_hidden(impl: str, device: torch.device) -> None:
    c = case()
    c.q[1, 2, 5, 7] = float("nan")
    out = c.on(device).run(impl)
    assert out[1].isnan().all()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("message", "broken"),
    [
        ("heads is one of", {"heads": "all"}),
        ("q_start is given", {"causal": True}),
        ("q_start is given", {"q_start": torch.tensor([0, 0])}),
        ("packed", {"cu_seqlens": torch.tensor([0, 37]), "k_lens": torch.tensor([1, 2])}),
        ("batch 1 and one length", {"cu_seqlens": torch.tensor([0, 37])}),
        ("row_weights is float32", {"row_weights": torch.ones(2, 37).double()}),
        ("row_weights is", {"row_weights": torch.ones(2, 36)}),
        ("columns is an int32 or int64", {"columns": torch.ones(2, 3)}),
        ("k_lens has batch 3", {"k_lens": torch.tensor([1, 2, 3])}),
        ("do not go with", {"k": torch.ones(2, 3, 75, 64)}),
        ("do not go with", {"k": torch.ones(2, 2, 75, 72)}),
        ("have 4 dims", {"q": torch.ones(4, 37, 64)}),
    ],
)
def test_refuses(message: str, broken: dict[str, Any], impl: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        replace(case(), **broken).on(device).run(impl)


def test_reference_refuses_values_out_of_range() -> None:
    with pytest.raises(ValueError, match="k_lens"):
        case(k_lens=torch.tensor([3, 76])).run("reference")
    for bounds in ([0, 131], [-1, 5], [0, 9, 3]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            case(batch=1, rows=130, keys=130, cu_seqlens=torch.tensor(bounds)).run("reference")


def test_choice_of_implementation() -> None:
    c = case()
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert OP.choose(cuda, *vars(c).values()).name == "triton"
    assert "needs CUDA" in OP.choose(cpu, *vars(c).values()).rejected["triton"]
    for other in (case(dim=257), replace(c, k=c.k.half()), replace(c, q=c.q.double())):
        choice = OP.choose(cuda, *vars(other).values())
        assert choice.name == "reference"
        assert choice.rejected["triton"]


class PeakMemory(TorchDispatchMode):
    """The most bytes that results of operations held at one time."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.results: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.results += [weakref.ref(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        alive = [t.untyped_storage() for r in self.results if (t := r()) is not None]
        held = {s.data_ptr(): s.nbytes() for s in alive}
        self.peak = max(self.peak, sum(n for p, n in held.items() if p not in self.inputs))
        return out


def test_reference_keeps_few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference_module.SCORES_BYTES == 64 * 2**20
    c = case(batch=2, heads_q=4, heads_kv=2, rows=300, keys=2000, dim=16)
    scores = 4 * 4 * 300 * 2000
    with PeakMemory([c.q, c.k]) as whole:
        expected = OP.reference(*vars(c).values())
    assert scores < whole.peak < 1.2 * scores  # one head's product is not kept beside another's
    budget = scores // 20
    monkeypatch.setattr(reference_module, "SCORES_BYTES", budget)
    with PeakMemory([c.q, c.k]) as parts:
        out = OP.reference(*vars(c).values())
    assert parts.peak < 1.5 * budget
    assert_close_to(out, expected, 1e-6, "in parts")


@pytest.mark.skipif(not interpreting(), reason="counts products in Triton's interpreter")
def test_triton_skips_what_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    dot, products = InterpreterBuilder.create_dot, []
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *a: (products.append(1), dot(*a))[1]
    )

    def count(**rest: Any) -> int:
        products.clear()
        shape = {"batch": 1, "heads_q": 1, "heads_kv": 1, "rows": 128, "keys": 128, "dim": 16}
        case(**{**shape, **rest}).run("triton")
        return len(products)

    full = count()  # 4 x 4 tiles, two passes
    assert full == 32
    weights = torch.zeros(1, 128)
    weights[0, 70] = 1.0
    assert count(row_weights=weights) == full // 4
    assert count(cu_seqlens=torch.tensor([0, 32, 64, 96, 128])) == full // 4
    assert count(causal=True, q_start=torch.tensor([0])) == 2 * (4 * 5 // 2)
    assert count(k_lens=torch.tensor([32])) == full // 4


@pytest.mark.parametrize("name", ["gqa1", "retrieval", "packed-weights"])
def test_opcheck(name: str, device: torch.device) -> None:
    c = CASES[name]().on(device)
    torch.library.opcheck(OP.overload, tuple(vars(c).values()))
    torch.library.opcheck(
        OP.overload,
        tuple(vars(c).values()),
        {"impl": "triton"},
        test_utils=("test_schema", "test_faketensor"),
    )


def test_lengths_stay_symbolic() -> None:
    class Module(torch.nn.Module):
        def forward(
            self, q: Tensor, k: Tensor, w: Tensor, start: Tensor, columns: Tensor
        ) -> Tensor:
            return column_reduce(q, k, w, None, start, None, columns, 0.2, True, "kv")

    def inputs(batch: int, rows: int, keys: int, width: int) -> tuple[Tensor, ...]:
        c = case(batch=batch, rows=rows, keys=keys, heads_q=14)
        start = torch.full((batch,), keys - rows)
        return c.q, c.k, torch.ones(batch, rows), start, randint(-1, keys, (batch, width))

    dim = torch.export.Dim
    batch, rows, keys, width = dim("batch"), dim("rows"), dim("keys"), dim("width")
    shapes = ({0: batch, 2: rows}, {0: batch, 2: keys}, {0: batch, 1: rows}, {0: batch})
    program = torch.export.export(
        Module(), inputs(2, 6, 40, 9), dynamic_shapes=(*shapes, {0: batch, 1: width})
    )
    other = inputs(3, 7, 31, 12)
    torch.testing.assert_close(program.module()(*other), Module()(*other))


def on_gpu(
    batch: int,
    heads_q: int,
    heads_kv: int,
    rows: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = BF16,
    **rest: Any,
) -> Case:
    make = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(batch, rows, heads_q, dim, device="cuda", generator=make)
    k = torch.randn(batch, keys, heads_kv, dim, device="cuda", generator=make)
    moved = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in rest.items()}
    q, k = (x.to(dtype).transpose(1, 2) for x in (q, k))
    return Case(q, k, scale=2 / math.sqrt(dim), **moved)


def question(rows: int, keys: int, batch: int = 1, heads: str = "mean") -> Case:
    """The last rows of a long prompt, asking for the middle 90 % of the cache."""
    columns = torch.arange(keys // 20, keys - keys // 20).expand(batch, -1)
    lens = torch.tensor([keys - 17 * b for b in range(batch)])
    return on_gpu(
        *(batch, 28, 4, rows, keys, 128),
        causal=True,
        q_start=lens - rows,
        k_lens=lens,
        columns=columns,
        heads=heads,
    )


FULL_SIZE: dict[str, Callable[[], Case]] = {
    "encoder-4096": lambda: on_gpu(1, 16, 16, 4096, 4096, 80),
    "encoder-4096-fp16": lambda: on_gpu(1, 16, 16, 4096, 4096, 80, FP16),
    "encoder-4096-fp32": lambda: on_gpu(1, 16, 16, 4096, 4096, 80, torch.float32),
    "encoder-packed": lambda: on_gpu(
        1, 16, 16, 4096, 4096, 80, cu_seqlens=torch.tensor([0, 1000, 1000, 1064, 2500, 4090])
    ),
    "encoder-cls": lambda: on_gpu(
        8, 16, 16, 577, 577, 64, row_weights=torch.eye(577)[:1].expand(8, -1)
    ),
    "images-64x1024": lambda: on_gpu(64, 16, 16, 1024, 1024, 80),
    "images-64x1024-packed": lambda: on_gpu(
        1, 16, 16, 65536, 65536, 80, cu_seqlens=torch.arange(0, 65537, 1024)
    ),
    "frames-256x729": lambda: on_gpu(256, 16, 16, 729, 729, 72),
    "question-32x50K": lambda: question(32, 50_000),
    "question-32x50K-kv-batch": lambda: question(32, 50_000, batch=3, heads="kv"),
    "question-128x100K": lambda: question(128, 100_000),
    "question-128x100K-none": lambda: question(128, 100_000, heads="none"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.usefixtures("poisoned_memory")
def test_full_size(name: str) -> None:
    c = FULL_SIZE[name]()
    expected = c.run("reference")
    out = c.run("triton")
    assert_close_to(out, expected, 1e-4 if c.q.dtype == torch.float32 else 1e-3, name)
    assert torch.equal(out, c.run("triton")), "not the same twice"


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """The second picture of a batch starts 2.4 billion elements into the cache."""
    cache = torch.empty(2, 1_200_000, 16, 128, dtype=BF16, device="cuda")
    small = on_gpu(2, 16, 16, 16, 300, 128)
    place = slice(1_000_000, 1_000_300)
    cache[:, place] = small.k.transpose(1, 2)
    c = replace(small, k=cache[:, place].transpose(1, 2))
    assert c.k.stride(0) > 2**31
    assert_close_to(c.run("triton"), small.run("reference"), 1e-3, "far offsets")
    columns = torch.arange(1_000_000, 1_000_300, device="cuda").expand(2, -1)
    cache[:, :1_000_000].zero_()
    c = replace(small, k=cache.transpose(1, 2), columns=columns, k_lens=torch.full((2,), 1_000_300))
    c = c.on(torch.device("cuda"))
    assert_close_to(c.run("triton"), c.run("reference"), 1e-3, "far columns")


@pytest.mark.gpu
def test_no_wait_and_capture() -> None:
    """Nothing is read on the host, and a captured graph follows new values."""
    c = question(32, 4000, batch=2, heads="kv")
    c.run("triton")  # compiled before anything is watched
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        c.run("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = c.run("triton")
    assert c.k_lens is not None
    assert c.q_start is not None
    c.k_lens.sub_(500)
    c.q_start.sub_(500)
    c.q.mul_(0.5)
    graph.replay()
    assert_close_to(out, c.run("reference"), 1e-3, "replayed")
