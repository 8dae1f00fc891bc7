"""SmoothQuant's tensor functions: where the difficulty goes, and when it pays."""

from __future__ import annotations

import pytest
import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.smoothquant import (
    MOST_TOKENS,
    channel_peaks,
    migration_scale,
    quantize_smooth,
    quantize_weight,
)

INT8 = torch.int8


def test_alpha_decides_how_much_moves() -> None:
    """At 0 the columns of the weight become alike; at 1 the channels of the input."""
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(20, 32, generator=g) * torch.logspace(-1, 1, 32) for _ in range(2)]
    values = [torch.randn(7, 32, generator=g) * torch.logspace(1, -1, 32).roll(5) for _ in range(3)]
    peaks = channel_peaks(values)
    assert torch.equal(peaks, torch.cat(values).abs().amax(0))
    columns = torch.cat(weights).abs().amax(0)

    def spread(x: torch.Tensor) -> float:
        return float(x.log().std())

    scales = {alpha: migration_scale(peaks, weights, alpha) for alpha in (0.0, 0.5, 1.0)}
    assert spread(columns * scales[0.0]) < 1e-5 < spread(peaks / scales[0.0])
    assert spread(peaks / scales[1.0]) < 1e-5 < spread(columns * scales[1.0])
    half = (peaks / scales[0.5]).log() - (columns * scales[0.5]).log()
    assert float(half.std()) < 1e-5, "at 0.5 both have the same peaks, up to a common factor"
    for scale in scales.values():
        assert abs(float(scale.log().mean())) < 1e-5
    peaks[3], weights[0][:, 4], weights[1][:, 4] = 0, 0, 0
    scale = migration_scale(peaks, weights, 0.5)
    assert scale[3:5].tolist() == [1, 1]
    assert scale.isfinite().all()


def test_smoothing_that_gains_nothing_is_left_out() -> None:
    """The scale that the network would really apply is judged, not the one that was wanted."""
    g = torch.Generator().manual_seed(5)
    weights, values = [torch.randn(24, 32, generator=g)], [torch.randn(60, 32, generator=g)]
    values[0][:, 7] *= 40
    good = quantize_smooth(weights, values, INT8, 0.5, lambda scale: scale)
    assert good.smooth
    assert good.error == good.error_smooth < 0.5 * good.error_plain
    assert 0 < good.error < 1e-3 * good.output_power
    bad = quantize_smooth(weights, values, INT8, 0.5, lambda scale: 1 / scale)
    assert not bad.smooth
    assert bad.error_smooth is not None
    assert bad.error == bad.error_plain == good.error_plain < bad.error_smooth
    assert (bad.scale == 1).all()
    nowhere = quantize_smooth(weights, values, INT8, 0.5, None)
    assert nowhere.error_smooth is None
    for left in (bad, nowhere):
        assert torch.equal(left.rows[0][0], quantize_weight(weights[0], INT8)[0])


def test_broken_calibration_is_named() -> None:
    weights = [torch.ones(4, 8)]
    with pytest.raises(UserError, match="no tokens reached a linear"):
        quantize_smooth(weights, [torch.ones(0, 8)], INT8, 0.5, None)
    with pytest.raises(UserError, match="a linear's input has inf or NaN values"):
        quantize_smooth(weights, [torch.full((2, 8), float("inf"))], INT8, 0.5, None)
    with pytest.raises(UserError, match="a weight to be quantized has inf or NaN"):
        quantize_smooth([torch.full((4, 8), float("nan"))], [torch.ones(2, 8)], INT8, 0.5, None)


def test_the_error_is_that_of_the_op() -> None:
    """Against a float64 product of what is stored; more tokens than are measured change little."""
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(n, 48, generator=g) for n in (9, 14)]
    values = [torch.randn(2, 700, 48, generator=g) for _ in range(4)]
    assert sum(x[..., 0].numel() for x in values) > MOST_TOKENS
    found = quantize_smooth(weights, values, INT8, 0.5, None)
    x = torch.cat([v.flatten(0, 1) for v in values]).double()
    scale = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    error = power = 0.0
    for weight, (codes, scales) in zip(weights, found.rows, strict=True):
        exact = x @ weight.double().T
        out = rounded @ (codes.double() * scales.double()[:, None]).T
        error += float((out - exact).square().sum()) / len(x)
        power += float(exact.square().sum()) / len(x)
    assert abs(found.error_plain / error - 1) < 0.02
    assert abs(found.output_power / power - 1) < 0.02
