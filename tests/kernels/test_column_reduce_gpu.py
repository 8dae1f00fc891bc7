"""``column_reduce`` on a GPU, at the sizes of models, every width of head dim, far offsets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.column_reduce_cases import BF16, FP16, Case, padded, rising
from tests.kernels.compare import assert_catches_broken, assert_close_to

pytestmark = pytest.mark.gpu


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


def known(c: Case) -> Case:
    """The case with its row_lse, from one head's scores at a time."""
    lse = torch.empty(c.q.shape[:3], device="cuda")
    sharing = c.q.shape[1] // c.k.shape[1]
    key = torch.arange(c.k.shape[2], device="cuda")
    for b in range(c.q.shape[0]):
        for h in range(c.q.shape[1]):
            scores = c.q[b, h].float() @ c.k[b, h // sharing].float().T * c.scale
            if c.q_start is not None:
                last = c.q_start[b] + torch.arange(c.q.shape[2], device="cuda")
                scores.masked_fill_(key > last[:, None], float("-inf"))
            if c.cu_seqlens is not None:
                segment = torch.bucketize(key, c.cu_seqlens, right=True)
                scores.masked_fill_(segment != segment[:, None], float("-inf"))
            lse[b, h] = scores.logsumexp(-1)
    return replace(c, row_lse=lse)


FULL_SIZE: dict[str, Callable[[], Case]] = {
    "encoder-4096": lambda: on_gpu(1, 16, 16, 4096, 4096, 80),
    "encoder-4096-fp16": lambda: on_gpu(1, 16, 16, 4096, 4096, 80, FP16),
    "encoder-4096-fp32": lambda: on_gpu(1, 16, 16, 4096, 4096, 80, torch.float32),
    "encoder-4096-lse": lambda: known(on_gpu(1, 16, 16, 4096, 4096, 80)),
    "encoder-2501-dim96": lambda: on_gpu(2, 12, 12, 2501, 2501, 96),
    "encoder-1500-dim128": lambda: on_gpu(2, 8, 8, 1500, 1500, 128),
    **{
        # Widths of both parts of a head dim: 16, 32, 64 and 128, alone and together.
        f"odd-dim{dim}": lambda dim=dim: on_gpu(2, 8, 8, 1501, 1501, dim)
        for dim in (32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128)
    },
    "odd-dim96-fp16": lambda: on_gpu(3, 12, 12, 1333, 1333, 96, FP16),
    "shared-keys": lambda: on_gpu(3, 28, 4, 901, 1100, 64, heads="kv"),
    "shared-keys-none": lambda: on_gpu(3, 28, 4, 901, 1100, 80, heads="none"),
    "most-columns": lambda: on_gpu(
        2, 16, 16, 1111, 1111, 80, columns=padded(2, 1111, 900), heads="kv"
    ),
    "far-apart-scores": lambda: rising(on_gpu(2, 16, 16, 1200, 1300, 80)),
    "encoder-packed-odd": lambda: on_gpu(
        *(1, 16, 16, 9001, 9001, 80),
        cu_seqlens=torch.tensor([5, 5, 1000, 1064, 1065, 4097, 4097, 8990]),
    ),
    "encoder-packed-lse": lambda: known(
        on_gpu(1, 16, 16, 3000, 3000, 72, cu_seqlens=torch.tensor([0, 1000, 2000, 3000]))
    ),
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
    "frames-256x729-packed": lambda: on_gpu(
        1, 16, 16, 256 * 729, 256 * 729, 72, cu_seqlens=torch.arange(0, 256 * 729 + 1, 729)
    ),
    "question-32x50K-lse": lambda: known(question(32, 50_000)),
    "question-32x50K": lambda: question(32, 50_000),
    "question-32x50K-kv-batch": lambda: question(32, 50_000, batch=3, heads="kv"),
    "question-128x100K": lambda: question(128, 100_000),
    "question-128x100K-none": lambda: question(128, 100_000, heads="none"),
}


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.usefixtures("poisoned_memory")
def test_full_size(name: str) -> None:
    c = FULL_SIZE[name]()
    expected = c.run("reference")
    out = c.run("triton")
    assert_close_to(out, expected, 1e-4 if c.q.dtype == torch.float32 else 1e-3, name)
    assert torch.equal(out, c.run("triton")), "not the same twice"


@pytest.mark.parametrize("name", ["odd-dim80", "odd-dim96", "encoder-packed-odd"])
def test_comparison_catches_broken_results(name: str) -> None:
    c = FULL_SIZE[name]()
    assert_catches_broken(c.run("triton"), c.run("reference"), 1e-3)


def test_nan_is_not_hidden() -> None:
    c = FULL_SIZE["odd-dim80"]()
    for i in range(1000, 1009):
        q = c.q.clone()
        q[1, 3, i, 7] = float("nan")
        out = replace(c, q=q).run("triton")
        assert out[1].isnan().all(), i
        assert out[0].isfinite().all()


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
