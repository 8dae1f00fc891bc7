"""Cases of ``column_reduce``, and the two independent computations they are checked against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsevila_compile.kernels.column_reduce.op import OP
from tests.kernels.compare import bound_from


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    row_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    q_start: Tensor | None = None
    k_lens: Tensor | None = None
    columns: Tensor | None = None
    row_lse: Tensor | None = None
    scale: float = 0.0
    causal: bool = False
    heads: str = "mean"

    def on(self, device: torch.device) -> Case:
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def run(self, impl: str) -> Tensor:
        return OP.overload(*vars(self).values(), impl=impl)


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
                scores = key @ c.q[b, h, i].double() * c.scale
                if c.row_lse is None:
                    p = torch.softmax(scores, 0)
                else:
                    p = torch.exp(scores - float(c.row_lse[b, h, i]))
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
    if c.row_lse is None:
        p = torch.softmax(scores, -1).nan_to_num(0.0)
    else:
        p = torch.exp(
            scores
            - c.row_lse.masked_fill(~c.row_lse.isfinite(), float("inf")).to(scores)[..., None]
        )
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
    sums are float32 here; in float32 a few times, and never under the resolution of a row's
    log-sum-exp, a float32 of the size of its greatest score."""
    if c.q.dtype == torch.float32:
        longest = [x.float().norm(dim=-1).nan_to_num(0).max() for x in (c.q, c.k)]
        size = float(longest[0] * longest[1]) * c.scale
        return max(bound_from(eager(c), exact, factor=4), torch.finfo(torch.float32).eps * size)
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


def with_lse(c: Case) -> Case:
    """The case with its row_lse given: NaN where a row has no weight, -inf where it sees nothing."""
    batch, q_heads, rows, _ = c.q.shape
    lse = torch.full((batch, q_heads, rows), float("-inf"))
    ones = replace(c, row_weights=None, columns=None, heads="none")
    for i in range(rows):
        # One row alone, unnormalised: exp(score - 0) summed over what it sees.
        alone = torch.zeros(batch, rows)
        alone[:, i] = 1
        sums = naive(replace(ones, row_weights=alone, row_lse=torch.zeros(batch, q_heads, rows)))
        lse[:, :, i] = sums.sum(-1).log().float()
    if c.row_weights is not None:
        lse.masked_fill_((c.row_weights == 0)[:, None], float("nan"))
    return replace(c, row_lse=lse)


def rising(c: Case) -> Case:
    """Every row's first keys score next to nothing, its last ones far more than exp can express."""
    size = torch.linspace(0, 1, c.k.shape[2], device=c.k.device).pow(4)[:, None]
    q = c.q.abs()
    return replace(c, q=q, k=(c.k.abs() * size).to(c.k.dtype), scale=300 / c.q.shape[3])


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
    "lse": lambda: with_lse(case(heads="none")),
    "lse-bf16": lambda: with_lse(case(dim=80, dtype=BF16)),
    "lse-causal": lambda: with_lse(
        case(heads_q=14, rows=11, causal=True, q_start=torch.tensor([-5, 62]), heads="kv")
    ),
    "lse-packed": lambda: with_lse(case(batch=1, rows=130, keys=130, cu_seqlens=SEGMENTS)),
    "lse-weights": lambda: with_lse(
        nan_rows(case(rows=60, row_weights=sparse_weights(2, 60), k_lens=torch.tensor([75, 50])))
    ),
    "rising": lambda: rising(case(keys=150, heads="none")),
    "rising-bf16": lambda: rising(case(keys=200, dim=80, dtype=BF16)),
    "rising-causal": lambda: rising(
        case(rows=5, keys=300, causal=True, q_start=torch.tensor([290, 150]), heads="kv")
    ),
    "strided": lambda: strided(case(dim=72, dtype=BF16, heads="kv")),
    "strided-fp32": lambda: strided(case(dim=80)),
    "few-rows": lambda: case(rows=2, keys=150, k_lens=torch.tensor([150, 31]), heads="none"),
    "few-rows-dim80": lambda: case(rows=4, keys=170, dim=80, dtype=BF16),
    "few-rows-hidden": lambda: case(
        rows=4, keys=170, causal=True, q_start=torch.tensor([-2, 166]), heads="kv"
    ),
    "few-rows-lse": lambda: with_lse(
        case(rows=4, keys=170, causal=True, q_start=torch.tensor([90, 30]))
    ),
    "few-rows-retrieval": lambda: cached(
        nan_rows(
            case(
                heads_q=14,
                rows=6,
                keys=200,
                causal=True,
                q_start=torch.tensor([180, 100]),
                columns=padded(2, 196, 170),
                row_weights=sparse_weights(2, 6),
                heads="kv",
            )
        ),
        [186, 140],
    ),
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
