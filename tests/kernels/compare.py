"""The one comparison of the kernel tests, and the proof that it can fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

_MAX_BOUND = 0.1
"""Zeros have a relative error of 1; a bound near that would pass them."""


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """norm(out - ref) / norm(ref), in float64."""
    out, ref = out.double(), ref.to(out.device).double()
    return float((out - ref).norm() / ref.norm())


def bound_from(low: torch.Tensor, exact: torch.Tensor, factor: float = 2.0) -> float:
    """What a kernel may err: ``factor`` times what eager code in the same dtype errs.

    ``low`` is the eager low-precision result, ``exact`` the float64 one. Not below the dtype's
    resolution (float32: four times that), since two right sums in another order differ by as much.
    """
    floor = (4 if low.dtype == torch.float32 else 1) * torch.finfo(low.dtype).eps
    return max(factor * relative_error(low, exact), floor)


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys_of: Callable[[int, int, int], list[int]],
    scale: float,
) -> torch.Tensor:
    """Attention by definition, one query at a time in float64: [B, S, Hq, D] on the CPU.

    q [B, Hq, S, D]; k, v [B, Hkv, N, D]; ``keys_of(b, kv_head, i)`` lists the keys that query i
    sees; with none its output is zero.
    """
    q, k, v = (t.detach().cpu().double() for t in (q, k, v))
    batch, heads, rows, dim = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, rows, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                keys = keys_of(b, h // group, i)
                if not keys:
                    continue
                scores = [scale * float(q[b, h, i] @ k[b, h // group, j]) for j in keys]
                weights = [math.exp(s - max(scores)) for s in scores]
                for j, weight in zip(keys, weights, strict=True):
                    out[b, i, h] += weight / sum(weights) * v[b, h // group, j]
    return out


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """What a model's plain eager attention gives in the dtype of its inputs: [B, S, Hq, D].

    q [B, Hq, S, D]; k, v [B, Hkv, N, D]; visible bool, broadcastable to [B, Hq, S, N]. A query that
    sees no key gets zeros.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    return (weights @ v).transpose(1, 2)


def assert_close_to(
    out: torch.Tensor, ref: torch.Tensor, bound: float, what: str, *, rows: bool = True
) -> None:
    """Relative root-mean-square error of ``out`` against ``ref`` is at most ``bound``.

    With ``rows``, every row along the last dim must also be within 8 times the bound of its own
    size, so that one lost row among thousands is seen; a row that is zero in ``ref`` must be zero.
    Refuses values that are not finite and a reference without scale.
    """
    assert 0 < bound <= _MAX_BOUND, f"{what}: a bound of {bound:.3g} tests nothing"
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, not {tuple(ref.shape)}"
    wide, exact = out.detach().double(), ref.detach().to(out.device).double()
    assert exact.isfinite().all(), f"{what}: the reference is not finite"
    assert exact.square().mean().sqrt() > 0, f"{what}: the reference is all zeros"
    bad = int((~wide.isfinite()).sum())
    assert bad == 0, f"{what}: {bad} of {wide.numel()} values are not finite"
    error = relative_error(wide, exact)
    assert error <= bound, f"{what}: relative error {error:.3g}, allowed {bound:.3g}"
    if rows:
        size, off = exact.norm(dim=-1), (wide - exact).norm(dim=-1)
        row_bound = min(8 * bound, 0.5)
        wrong = off > row_bound * size
        assert not wrong.any(), (
            f"{what}: {int(wrong.sum())} of {wrong.numel()} rows are off by more than "
            f"{row_bound:.3g} of their own size"
        )


def assert_catches_broken(
    out: torch.Tensor, ref: torch.Tensor, bound: float, *, rows: bool = True
) -> None:
    """``out`` passes the comparison, and nothing like what a broken kernel leaves does.

    Broken are: all zeros, the last quarter of any one dim zeroed, one NaN, the values of another
    place (rolled by one along a dim).
    """
    assert_close_to(out, ref, bound, "unbroken", rows=rows)
    broken = {"zeros": torch.zeros_like(out)}
    for dim, length in enumerate(out.shape):
        if length > 1:
            cut = out.clone()
            cut.narrow(dim, length - (length + 3) // 4, (length + 3) // 4).zero_()
            broken[f"dim {dim} truncated"] = cut
            broken[f"dim {dim} rolled"] = out.roll(1, dim)
    hole = out.clone()
    hole.view(-1)[-1] = float("nan")
    broken["one NaN"] = hole
    for name, wrong in broken.items():
        with pytest.raises(AssertionError):
            assert_close_to(wrong, ref, bound, name, rows=rows)
