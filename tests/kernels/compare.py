"""The one comparison of the kernel tests, and the proof that it can fail."""

from __future__ import annotations

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

    ``low`` is the eager low-precision result, ``exact`` the float64 one. Not below a few units of
    the dtype's resolution, since two right float32 sums differ by that much.
    """
    return max(factor * relative_error(low, exact), 4 * torch.finfo(low.dtype).eps)


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
