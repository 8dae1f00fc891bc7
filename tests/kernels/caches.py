"""KV caches for the tests of the ops that append to one: ragged, and NaN where nothing is cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.kernels.compare import assert_close_to, bound_from, eager_attention

KeysOf = Callable[[int, int, int], list[int]]
"""The cache positions that query i of batch row b sees, through key/value head h."""


@dataclass(frozen=True)
class Case:
    """The tensors of one call; calls work on copies of the caches."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_lens: torch.Tensor
    new_lens: torch.Tensor

    @staticmethod
    def random(
        device: torch.device,
        dtype: torch.dtype,
        heads: tuple[int, int],
        dim: int,
        rows: int,
        capacity: int,
        lens: list[int],
        news: list[int],
    ) -> Case:
        """Row b of the batch holds lens[b] tokens and gets news[b] of the ``rows`` new ones."""
        torch.manual_seed(dim + rows)
        batch, (q_heads, kv_heads) = len(lens), heads
        q, k, v = (
            torch.randn(batch, rows, h, dim, device=device).to(dtype).transpose(1, 2)
            for h in (q_heads, kv_heads, kv_heads)
        )
        caches = torch.randn(2, batch, kv_heads, capacity, dim, device=device).to(dtype)
        for b, length in enumerate(lens):
            caches[:, b, :, length:] = float("nan")
        ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lens, news)]
        return Case(q, k, v, caches[0], caches[1], *ints)

    def to(self, dtype: torch.dtype) -> Case:
        floats = {n: getattr(self, n).to(dtype) for n in ("q", "k", "v", "k_cache", "v_cache")}
        return replace(self, **floats)

    def args(self) -> tuple[torch.Tensor, ...]:
        """The op's tensor arguments, with fresh caches."""
        caches = (self.k_cache.clone(), self.v_cache.clone())
        return (self.q, self.k, self.v, *caches, self.cache_lens, self.new_lens)

    def held(self, b: int) -> int:
        """Tokens in row b's cache after the call."""
        capacity = self.k_cache.shape[2]
        return min(int(self.cache_lens[b]) + int(self.new_lens[b]), capacity)

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The caches after the call, token by token."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        for b in range(len(self.cache_lens)):
            start = int(self.cache_lens[b])
            for position in range(start, self.held(b)):
                k_cache[b, :, position] = self.k[b, :, position - start]
                v_cache[b, :, position] = self.v[b, :, position - start]
        return k_cache, v_cache

    def eager(self, keys_of: KeysOf, scale: float) -> torch.Tensor:
        """Dense masked attention over the caches in their own dtype: [B, S, Hq, D]."""
        k_cache, v_cache = (cache.nan_to_num(0.0) for cache in self.written())
        batch, heads, rows, _ = self.q.shape
        kv_heads, capacity = k_cache.shape[1:3]
        visible = torch.zeros(batch, heads, rows, capacity, dtype=torch.bool)
        group = heads // kv_heads
        for b in range(batch):
            for h in range(kv_heads):
                for i in range(int(self.new_lens[b])):
                    visible[b, h * group : (h + 1) * group, i, keys_of(b, h, i)] = True
        return eager_attention(self.q, k_cache, v_cache, visible.to(self.q.device), scale)


def device_for(op: Any, impl: str, device: torch.device) -> torch.device:
    """``device``, or the CPU where an implementation is not made for it.

    Only there is it ever chosen, and only there does its accuracy count.
    """
    implementation = op.implementations.get(impl)
    made_for_it = implementation is None or implementation.supported(device) is None
    return device if made_for_it else torch.device("cpu")


def run(op: Any, impl: str, case: Case, *rest: Any) -> torch.Tensor:
    """Call the op; the caches must hold exactly the new tokens, and elsewhere what they held."""
    args = case.args()
    out: torch.Tensor = op.overload(*args, *rest, impl=impl)
    for cache, expected in zip(args[3:5], case.written(), strict=True):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    assert out.is_contiguous()
    assert out.dtype == case.q.dtype
    return out


def check(op: Any, impl: str, case: Case, keys_of: KeysOf, scale: float, *rest: Any) -> None:
    """``impl`` errs at most twice what eager code in the same dtype errs against float64."""
    exact = run(op, "reference", case.to(torch.float64), *rest)
    bound = bound_from(case.eager(keys_of, scale), exact)
    assert_close_to(run(op, impl, case, *rest), exact, bound, f"{op.name}/{impl}")
