"""``select_tokens``: every implementation against a plain sort, exactly."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsevila_compile.kernels.select_tokens import triton as triton_module
from sparsevila_compile.kernels.select_tokens.op import OP

select_tokens = torch.ops.sparsevila.select_tokens

IMPLEMENTATIONS = ["reference", "library", "triton"]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    scores: Tensor
    starts: Tensor
    lengths: Tensor
    keep: Tensor
    offsets: Tensor
    total: int

    def run(self, impl: str, device: torch.device) -> Tensor:
        arguments = [v.to(device) if isinstance(v, Tensor) else v for v in vars(self).values()]
        return select_tokens(*arguments, impl=impl)


def case(
    scores: Tensor,
    *segments: tuple[int, int, int, int],
    total: int,
    index: torch.dtype = torch.int64,
) -> Case:
    """Segments as (start, length, keep, offset)."""
    columns = torch.tensor(segments, dtype=index).reshape(-1, 4).unbind(1)
    return Case(scores, *columns, total)


def naive(c: Case) -> Tensor:
    values = [float(x) for x in c.scores.double()]
    out = [-1] * c.total
    for start, length, keep, offset in zip(
        c.starts.tolist(), c.lengths.tolist(), c.keep.tolist(), c.offsets.tolist(), strict=True
    ):
        # Python's -0.0 == 0.0, and a tuple tells the NaNs from -inf.
        order = sorted(
            range(start, start + length),
            key=lambda t: (math.isnan(values[t]), 0 if math.isnan(values[t]) else -values[t], t),
        )
        out[offset : offset + keep] = sorted(order[:keep])
    return torch.tensor(out, dtype=torch.int64)


def check(c: Case, impl: str, device: torch.device) -> Tensor:
    expected = naive(c)
    out = c.run(impl, device)
    assert out.dtype == torch.int64
    assert torch.equal(out.cpu(), expected), f"{impl}: {out} is not {expected}"
    return expected


def randn(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spotted(n: int, seed: int = 0) -> Tensor:
    """Many ties, zeros of both signs, infinities, denormals and NaNs with several bit patterns."""
    choice = random.Random(seed)
    some = [0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, -NAN, 1e-42, -1e-42, 3.4e38, -3.4e38]
    scores = torch.tensor([choice.choice(some) for _ in range(n)])
    scores.view(torch.int32)[scores.isnan() & (torch.arange(n) % 2 == 0)] = 0x7F800001
    return scores


def close(n: int) -> Tensor:
    """Neighbouring floats, shuffled: they differ in the last bits alone, as do column sums."""
    bits = (
        torch.tensor([1.0]).view(torch.int32)
        + torch.randperm(n, generator=torch.Generator().manual_seed(7)).int()
    )
    return bits.view(torch.float32)


EMPTY = [(5, 0, 0, 0)] * 7
"""Empty segments beside a long one make the blocks of the kernel short: it runs through several."""

CASES = {
    "one": case(randn(50), (0, 50, 12, 0), total=12),
    "keep-all": case(randn(50), (0, 50, 50, 0), total=50),
    "keep-none": case(randn(50), (0, 50, 0, 0), (10, 20, 3, 0), total=3),
    "single-score": case(randn(1), (0, 1, 1, 0), total=1),
    "ragged": case(
        randn(700), (0, 13, 4, 0), (13, 0, 0, 4), (13, 500, 77, 4), (513, 187, 187, 81), total=268
    ),
    "unused-slots": case(randn(90), (0, 40, 5, 3), (40, 50, 9, 20), total=40),
    "offsets-in-no-order": case(randn(90), (40, 50, 9, 0), (0, 40, 5, 15), total=21),
    "gaps-and-overlap": case(randn(90), (3, 30, 6, 0), (20, 60, 11, 6), (20, 60, 2, 17), total=19),
    "int32-indices": case(randn(90), (0, 40, 5, 3), (40, 50, 9, 20), total=40, index=torch.int32),
    "all-equal": case(torch.full((600,), 0.25), (0, 300, 100, 0), (300, 300, 7, 100), total=107),
    "all-nan": case(torch.full((60,), NAN), (0, 30, 10, 0), (30, 30, 30, 10), total=40),
    "nan-below-minus-inf": case(
        torch.tensor([NAN, -INF, NAN, -INF, NAN]), (0, 5, 1, 0), (0, 5, 2, 1), (0, 5, 3, 3), total=6
    ),
    "zeros-of-both-signs": case(
        torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0]), (0, 5, 2, 0), (1, 4, 3, 2), total=5
    ),
    "spotted": case(spotted(900), (0, 400, 150, 0), (400, 500, 31, 150), total=190),
    "ties-across-blocks": case(randn(5000).mul(3).round(), (0, 5000, 1234, 0), *EMPTY, total=1234),
    "spotted-across-blocks": case(spotted(5000, 1), (0, 5000, 3000, 0), *EMPTY, total=3000),
    "close": case(close(5000), (0, 5000, 1111, 0), *EMPTY, total=1111),
    "negative": case(-randn(3000).abs() * 1e-30, (0, 3000, 10, 0), *EMPTY, total=10),
    "bf16": case(randn(2000, dtype=torch.bfloat16), (0, 2000, 300, 0), *EMPTY, total=300),
    "fp16": case(randn(2000, dtype=torch.float16), (0, 2000, 300, 0), *EMPTY, total=300),
    "strided": case(randn(3 * 500)[1::3], (0, 500, 99, 0), total=99),
    "rows": case(
        randn(12 * 130), *[(130 * r, 130 - 3 * r, 13, 13 * r) for r in range(12)], total=12 * 13
    ),
    "long": case(randn(200_000), (0, 200_000, 20_000, 0), total=20_000),
    "shared": case(randn(20_000), (0, 20_000, 4000, 0), total=4000),
    "shared-ties": case(randn(20_000).mul(3).round(), (0, 20_000, 5000, 0), total=5000),
    "shared-all-equal": case(torch.full((9000,), 0.25), (0, 9000, 7000, 0), total=7000),
    "shared-spotted": case(spotted(18_000), (0, 9000, 4000, 0), (9000, 9000, 31, 4000), total=4031),
    "shared-close": case(close(20_000), (0, 20_000, 1111, 0), total=1111),
    "shared-ragged": case(
        *(randn(30_000), (100, 23_000, 4000, 9), (0, 0, 0, 0), (23_200, 300, 300, 4500)),
        *((5, 29_995, 0, 0),),
        total=4900,
    ),
    "nothing": case(randn(5), total=4),
    "no-slots": case(randn(5), (0, 5, 0, 0), total=0),
    "no-scores": case(randn(0), (0, 0, 0, 0), total=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_sort(impl: str, name: str, device: torch.device) -> None:
    check(CASES[name], impl, device)


@pytest.mark.parametrize("impl", ["reference", "library"])
def test_float64_keeps_all_its_bits(impl: str, device: torch.device) -> None:
    """Scores that float32 cannot tell apart."""
    scores = 1 + torch.randperm(300, generator=torch.Generator().manual_seed(3)).double() * 2**-50
    c = case(scores, (0, 300, 20, 0), total=20)
    check(c, impl, device)
    assert OP.choose(torch.device("cuda"), *vars(c).values()).name == "library"


def test_by_hand() -> None:
    scores = torch.tensor([0.1, 0.9, NAN, 0.9, -INF, 0.9, 0.2])
    c = case(scores, (0, 7, 3, 1), (2, 4, 1, 4), (2, 3, 2, 5), total=8)
    assert naive(c).tolist() == [-1, 1, 3, 5, 3, 3, 4, -1]


score = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, INF, -INF, NAN]) | st.floats(width=32)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    scores = draw(st.lists(score, max_size=60))
    segments, used = [], 0
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(scores)))
        length = draw(st.integers(0, len(scores) - start))
        keep = draw(st.integers(0, length))
        offset = used + draw(st.integers(0, 3))
        segments.append((start, length, keep, offset))
        used = offset + keep
    tensor = torch.tensor(scores, dtype=torch.float32)
    return case(tensor, *segments, total=used + draw(st.integers(0, 3)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_sort_whatever_the_scores(impl: str, device: torch.device) -> None:
    @settings(max_examples=60, deadline=None, database=None)
    @given(drawn_cases())
    def run(c: Case) -> None:
        check(c, impl, device)

    run()


def test_comparison_is_exact() -> None:
    """What a kernel that writes nothing, stops early or breaks ties wrongly leaves is unequal."""
    expected = naive(CASES["ties-across-blocks"])
    assert expected.unique().numel() == 1234
    assert expected.min() >= 0
    assert expected.max() > 4096
    last = expected.clone()
    last[-1] = -1
    scores = CASES["ties-across-blocks"].scores
    backwards = 4999 - naive(replace(CASES["ties-across-blocks"], scores=scores.flip(0))).flip(0)
    assert torch.equal(scores[backwards].sort().values, scores[expected].sort().values)
    for wrong in (torch.zeros_like(expected), torch.full_like(expected, -1), last, backwards):
        assert not torch.equal(wrong, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("scores is a floating tensor", {"scores": torch.ones(50, dtype=torch.int32)}),
        ("scores is a floating tensor", {"scores": torch.ones(5, 10)}),
        ("keep is an int32 or int64", {"keep": torch.tensor([12.0])}),
        ("starts is an int32 or int64", {"starts": torch.tensor(0)}),
        ("lengths, keep and offsets", {"keep": torch.tensor([3, 4])}),
    ],
)
def test_refuses(impl: str, message: str, change: dict[str, Any], device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CASES["one"], **change).run(impl, device)


OUT_OF_RANGE = {
    "segment 0 is 45 to 55": (45, 10, 2, 0),
    "segment 0 is -1 to 9": (-1, 10, 2, 0),
    "segment 0 keeps 11 of 10": (40, 10, 11, 0),
    "segment 0 keeps -1 of 10": (40, 10, -1, 0),
    "segment 0 writes 9 to 13 of 12": (40, 10, 4, 9),
    "segment 0 writes -1 to 3 of 12": (40, 10, 4, -1),
}


@pytest.mark.parametrize("impl", ["reference", "library"])
@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_refuses_segments_out_of_range(message: str, impl: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        case(randn(50), OUT_OF_RANGE[message], total=12).run(impl, device)


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_triton_touches_nothing_out_of_range(message: str, device: torch.device) -> None:
    """The kernel cannot refuse these; it must neither read beside the scores nor write beside
    its slots, and what it gives are indices of scores."""
    scores, segment = randn(50), OUT_OF_RANGE[message]
    beside = torch.full((150,), INF)  # would win if it were read
    beside[50:100] = scores
    out = case(beside.to(device)[50:100], segment, total=12).run("triton", device).cpu()
    assert out.shape == (12,)
    assert ((out >= -1) & (out < 50)).all()
    chosen = out[out >= 0]
    assert chosen.unique().numel() == chosen.numel()
    start, length, keep, offset = segment
    if start < 0:
        assert chosen.numel() == 0
    elif offset == 0:
        room = min(length, 50 - start)
        assert (
            chosen.tolist()
            == naive(case(scores, (start, room, max(0, min(keep, room)), 0), total=chosen.numel()))[
                : chosen.numel()
            ].tolist()
        )


def test_choice_of_implementation() -> None:
    arguments = vars(CASES["one"]).values()
    assert OP.choose(torch.device("cuda"), *arguments).name == "triton"
    assert OP.choose(torch.device("cpu"), *arguments).name == "library"


@pytest.mark.parametrize("most", [1, 4, 7])
def test_many_segments_share_programs(
    most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many programs there may be, and so parts of each segment, the same is chosen."""
    monkeypatch.setattr(triton_module, "_PART", 256)
    monkeypatch.setattr(triton_module, "_MOST_PROGRAMS", most)
    segments = [(0, 900, 200, 0), (900, 1100, 1100, 200), (2000, 1000, 1, 1310)]
    check(case(spotted(3000), *segments, total=1320), "triton", device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, device: torch.device) -> None:
    c = CASES["ragged"]
    arguments = tuple(v.to(device) if isinstance(v, Tensor) else v for v in vars(c).values())
    torch.library.opcheck(OP.overload, arguments, {"impl": impl})


def test_sizes_stay_symbolic() -> None:
    class Module(torch.nn.Module):
        """Half of every row of scores [R, V], as retrieval does it."""

        def forward(self, scores: Tensor) -> Tensor:
            rows, width = scores.shape
            kept = width // 2
            row = torch.arange(rows)
            lengths, keep = torch.full_like(row, width), torch.full_like(row, kept)
            flat = select_tokens(
                scores.reshape(-1), row * width, lengths, keep, row * kept, rows * kept
            )
            return flat.reshape(rows, kept) - (row * width)[:, None]

    dim = torch.export.Dim
    program = torch.export.export(
        Module(),
        (randn(60).reshape(3, 20),),
        dynamic_shapes=({0: dim("rows"), 1: dim("width", min=4)},),
    )
    scores = randn(5 * 30, 5).reshape(5, 30)
    expected = scores.topk(15).indices.sort().values
    assert torch.equal(program.module()(scores), expected)


FULL_SIZE = {
    "32-rows-of-50K": ([50_000] * 32, 5_000),
    "one-of-100K": ([100_000], 10_000),
    "8-of-100K": ([100_000] * 8, 25_000),
    "224-of-12K": ([12_288] * 224, 1229),
    "one-of-200K": ([200_000], 20_000),
    "ragged-frames": ([729 - r % 300 for r in range(256)], 180),
}


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name: str, ties: bool) -> None:
    lengths, keep = FULL_SIZE[name]
    scores = randn(sum(lengths)).softmax(0)  # alike in their upper bits, as column sums are
    if ties:
        scores = (scores / scores.max() * 1000).round()
    starts = [sum(lengths[:r]) for r in range(len(lengths))]
    segments = [
        (s, n, keep, keep * r) for r, (s, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    c = case(scores, *segments, total=keep * len(lengths) + 5)
    device = torch.device("cuda")
    expected = c.run("reference", torch.device("cpu"))
    for impl in IMPLEMENTATIONS:
        assert torch.equal(c.run(impl, device).cpu(), expected), impl
    assert torch.equal(c.run("triton", device), c.run("triton", device))


@pytest.mark.gpu
def test_no_wait_and_capture() -> None:
    """Nothing is read on the host, and a captured graph follows new values."""
    c = case(randn(3000).cuda(), (0, 1000, 100, 0), (1000, 2000, 300, 100), total=420)
    device = torch.device("cuda")
    c = replace(c, **{n: v.cuda() for n, v in vars(c).items() if isinstance(v, Tensor)})
    c.run("triton", device)  # compiled before anything is watched
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        c.run("triton", device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = c.run("triton", device)
    c.scores.neg_()
    c.keep.sub_(50)
    graph.replay()
    assert torch.equal(out, c.run("reference", device))
