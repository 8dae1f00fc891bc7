"""``column_reduce``: the reference against loops, the kernels against both, and the promises."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
    Case,
    allowed,
    case,
    naive,
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


@pytest.mark.skipif(not interpreting(), reason="on a GPU: test_offsets_past_two_to_the_31")
@pytest.mark.parametrize(("far", "rows"), [("batch", 40), ("head", 40), ("head", 2), ("batch", 2)])
def test_offsets_past_two_to_the_31_interpreted(far: str, rows: int, tmp_path: Path) -> None:
    """Of the second batch entry, or head; a file without contents stands for so much memory."""
    small = case(heads_q=2, heads_kv=2, rows=rows, keys=60, dim=16, dtype=BF16, heads="none")
    size = 2**31  # twice as much, so that an offset that wraps around still finds memory: zeros
    file = torch.from_file(str(tmp_path / "k"), shared=True, size=2 * size + 2**16, dtype=BF16)
    strides = (size + 64, 60 * 16, 16, 1) if far == "batch" else (2 * 60 * 16, size + 64, 16, 1)
    k = file.as_strided(small.k.shape, strides, size)
    k.copy_(small.k)
    exact = naive(small)
    assert_close_to(replace(small, k=k).run("triton"), exact, allowed(small, exact), far)


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
