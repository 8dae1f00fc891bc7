"""The one-token path of cached_attention and retrieval_attention: shares, lengths, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsevila_compile.kernels.cached_attention import decode, decode_config
from sparsevila_compile.kernels.cached_attention.decode_config import Config
from sparsevila_compile.kernels.cached_attention.op import OP as CACHED
from sparsevila_compile.kernels.retrieval_attention.op import OP as RETRIEVAL
from tests.kernels.caches import Case, KeysOf, check, run
from tests.kernels.compare import assert_catches_broken, assert_close_to, bound_from

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENS = [150, 0, 64, 90, 161, 70]
NEWS = [1, 1, 1, 0, 1, 1]
"""Rows: plain; nothing cached; all tail; inactive; full; nothing but index before the new token."""
TAILS = [100, 0, 0, 60, 140, 70]


def random_case(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int] = (14, 2), dim: int = 64
) -> Case:
    return Case.random(device, dtype, heads, dim, 1, 161, LENS, NEWS)


def index_of(case: Case, slots: int, used: int, *, at_end: bool = True) -> torch.Tensor:
    """int32 [B, Hkv, slots], ascending, at most ``used`` present, the rest -1 at the end or among
    them."""
    kv_heads = case.k.shape[1]
    index = torch.full((len(TAILS), kv_heads, slots), -1, dtype=torch.int32)
    for b, tail in enumerate(TAILS):
        for h in range(kv_heads):
            n = min(tail, max(used - h, 0), slots)
            where = torch.arange(n) if at_end else torch.randperm(slots)[:n].sort().values
            index[b, h, where] = torch.randperm(tail)[:n].sort().values.int()
    return index.to(case.q.device)


def tails_of(case: Case) -> torch.Tensor:
    return torch.tensor(TAILS, dtype=torch.int32, device=case.q.device)


def keys_of(case: Case, index: torch.Tensor) -> KeysOf:
    named = index.tolist()

    def keys(b: int, h: int, i: int) -> list[int]:
        if not NEWS[b]:
            return []
        return [j for j in named[b][h] if j >= 0] + list(range(TAILS[b], case.held(b)))

    return keys


def cut(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the kernels run with another configuration than the one chosen."""
    chosen = decode.configure

    def configure(*args: Any) -> Config:
        return replace(chosen(*args), **changes)

    monkeypatch.setattr(decode, "configure", configure)


@pytest.mark.parametrize("splits, stages", [(1, 3), (2, 1), (3, 2), (7, 1), (9, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shares(
    dtype: torch.dtype,
    splits: int,
    stages: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any number of shares: of the index, of the tail, of both, of nothing; twice the same bits."""
    cut(monkeypatch, splits=splits, stages=stages, block_n=16, run=4)
    case = random_case(device, dtype, (7, 1))
    index, tails = index_of(case, 75, 75), tails_of(case)
    exact = run(RETRIEVAL, "reference", case.to(torch.float64), index, tails, 0.125)
    bound = bound_from(case.eager(keys_of(case, index), 0.125), exact)
    once, again = (run(RETRIEVAL, "triton", case, index, tails, 0.125) for _ in range(2))
    assert_catches_broken(once, exact, bound)
    assert torch.equal(once, again)
    assert (once[3] == 0).all()  # inactive
    dense = run(CACHED, "reference", case.to(torch.float64), 0.125, 0)
    assert_catches_broken(run(CACHED, "triton", case, 0.125, 0), dense, bound)


@pytest.mark.parametrize("at_end", [True, False])
def test_padding(at_end: bool, device: torch.device) -> None:
    """Absent slots change nothing, wherever they are and however many."""
    case = random_case(device, torch.float32)
    tails = tails_of(case)
    for slots, used in ((64, 40), (500, 9), (130, 0)):
        index = index_of(case, slots, used, at_end=at_end)
        exact = run(RETRIEVAL, "reference", case.to(torch.float64), index, tails, 0.125)
        out = run(RETRIEVAL, "triton", case, index, tails, 0.125)
        assert_catches_broken(out, exact, 2e-6)


def test_first_token(device: torch.device) -> None:
    """With an empty cache the output is the new value itself."""
    case = Case.random(device, torch.bfloat16, (7, 1), 80, 1, 5, [0], [1])
    out = run(CACHED, "triton", case, 0.1, 0)
    assert_close_to(out, case.v.expand(1, 7, 1, 80).transpose(1, 2), 1e-6, "dense")
    nothing = torch.full((1, 1, 3), -1, dtype=torch.int32, device=device)
    tail = torch.zeros(1, dtype=torch.int32, device=device)
    assert torch.equal(run(RETRIEVAL, "triton", case, nothing, tail, 0.1), out)


@pytest.mark.parametrize("window", [1, 40, 1000])
def test_window(window: int, device: torch.device) -> None:
    case = random_case(device, torch.float32, (4, 2))
    exact = run(CACHED, "reference", case.to(torch.float64), 0.125, window)
    assert_catches_broken(run(CACHED, "triton", case, 0.125, window), exact, 2e-6)


@pytest.mark.parametrize(
    "dim, heads",
    [(64, (16, 2)), (72, (4, 4)), (80, (10, 2)), (96, (3, 1)), (128, (20, 1)), (256, (4, 2))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_head_dims_and_groups(
    dtype: torch.dtype, dim: int, heads: tuple[int, int], device: torch.device
) -> None:
    case = random_case(device, dtype, heads, dim)
    index = index_of(case, 70, 50)
    check(RETRIEVAL, "triton", case, keys_of(case, index), 0.1, index, tails_of(case), 0.1)


def test_far_apart_scores(device: torch.device) -> None:
    """Shares whose largest scores differ by more than the exponent of float32 can hold."""
    case = random_case(device, torch.float32, (4, 2))
    case.k_cache[:, :, 17] *= 60
    exact = run(CACHED, "reference", case.to(torch.float64), 3.0, 0)
    # Scores in the hundreds: float32 rounds them by 1e-5, and their weights by as much.
    assert_catches_broken(run(CACHED, "triton", case, 3.0, 0), exact, 1e-4)


@pytest.mark.parametrize("shared_memory", [91 * 1024, 219 * 1024])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("heads", [(28, 4), (32, 32), (16, 2), (40, 8), (12, 1), (5, 5)])
def test_configuration(
    heads: tuple[int, int], indexed: bool, shared_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the shape: tiles fit, and three quarters of 132 processors have work at any time."""
    monkeypatch.setattr(decode_config, "processors", lambda device: 132)
    monkeypatch.setattr(decode_config, "_tile_memory", lambda device: shared_memory)
    for batch in (1, 2, 3, 8, 24, 32, 100, 300):
        for dim, dtype in ((64, torch.bfloat16), (128, torch.float16), (256, torch.float32)):
            for keys in (5000, 50_000):
                group, groups = heads[0] // heads[1], batch * heads[1]
                config = decode.configure(
                    batch, heads[1], group, dim, dtype, keys, indexed, torch.device("cpu")
                )
                assert 1 <= config.splits <= decode_config.MAX_SPLITS
                tile = 2 * config.block_n * dim * dtype.itemsize
                held = config.stages - (config.stages > 1 and group <= 8)
                assert held * tile <= shared_memory
                programs = groups * config.splits
                if config.splits < -(-keys // config.block_n):  # else: one tile each
                    assert programs / (-(-programs // 132) * 132) > 0.75


def test_configuration_of_little() -> None:
    """Few keys are not cut finer than tiles."""
    few = decode.configure(1, 4, 7, 128, torch.bfloat16, 100, False, torch.device("cpu"))
    assert few.splits <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(28, 4), (32, 32), (16, 2), (24, 2), (40, 8)])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_full_size(batch: int, heads: tuple[int, int]) -> None:
    """2K caches of other models, every row and head against float64."""
    device = torch.device("cuda")
    lens = [(2000 - 37 * b) % 2001 for b in range(batch)]
    case = Case.random(device, torch.bfloat16, heads, 128, 1, 2048, lens, [1] * batch)
    out = run(CACHED, "triton", case, 0.088, 0)
    exact = run(CACHED, "reference", case.to(torch.float64), 0.088, 0)
    low = run(CACHED, "reference", case, 0.088, 0)
    assert_catches_broken(out, exact, bound_from(low, exact, 3.0))
