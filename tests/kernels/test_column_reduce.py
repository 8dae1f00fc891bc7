"""``column_reduce``: the reference against loops, the kernels against both, and the promises."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsevila_compile.kernels.column_reduce import reference as reference_module
from sparsevila_compile.kernels.column_reduce import triton as triton_module
from sparsevila_compile.kernels.column_reduce.op import OP
from sparsevila_compile.kernels.triton_support import interpreting
from tests.kernels.column_reduce_cases import (
    BF16,
    CASES,
    FULL_SIZE,
    Case,
    allowed,
    case,
    naive,
    on_gpu,
    question,
    randint,
    randn,
)
from tests.kernels.compare import assert_catches_broken, assert_close_to, relative_error


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
        ("given sums ignored", "lse", lambda c: replace(c, row_lse=c.row_lse + 0.01)),
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


@pytest.mark.parametrize("name", ["dim80-bf16", "packed-columns", "retrieval", "few-rows-dim80"])
def test_tiles_of_other_gpus(
    name: str, exact: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, expected = exact(name)
    monkeypatch.setattr(triton_module, "is_hopper", lambda device: False)
    assert_close_to(c.on(device).run("triton"), expected, allowed(c, expected), name)


@pytest.mark.parametrize("name", ["packed", "split-keys", "weights-bf16", "few-rows-retrieval"])
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
        ("row_lse is float32", {"row_lse": torch.ones(2, 4, 37).double()}),
        ("row_lse is", {"row_lse": torch.ones(2, 4, 36)}),
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


@pytest.mark.parametrize("name", ["gqa1", "retrieval", "packed-weights", "lse"])
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
            return OP.overload(q, k, w, None, start, None, columns, None, 0.2, True, "kv")

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
