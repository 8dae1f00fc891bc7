"""SmoothQuant (Xiao et al., arXiv 2211.10438) as plain tensor functions; graphs are unknown here.

Tokens and output channels are rounded to 8 bits with one scale each, so a channel of the input that
is a hundred times the others takes their digits. It is divided by a scale and the weight's column
multiplied by it: the product stays, and the difficulty moves to the weight, which has it easier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from .awq import CHUNK_ELEMENTS, check_finite
from .errors import UserError
from .kernels.w8a8_linear.reference import w8a8_linear
from .kernels.w8a8_linear.rounding import quantize_rows

MOST_TOKENS = 4096
"""Tokens on which the error is measured at most, evenly spaced; the largest values are of all."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""A weight as ``w8a8_linear`` takes it: codes ``[N, K']`` and float32 scales ``[N]``."""


@torch.no_grad()
def quantize_weight(weight: torch.Tensor, dtype: torch.dtype) -> Rows:
    """Round every row of ``[N, K]`` (any float dtype) to int8 or float8_e4m3fn.

    Raises:
        UserError: values are not finite.
    """
    check_finite(weight)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    codes, scales = zip(*(quantize_rows(w, dtype) for w in torch.split(weight, rows)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def channel_peaks(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest ``|x|`` of each channel of tokens ``[..., K]``, float32 ``[K]``.

    Raises:
        UserError: no tokens came, or values were not finite.
    """
    flat = [x.flatten(0, -2) for x in values if x.numel()]
    if not flat:
        raise UserError(
            "SmoothQuant calibration: no tokens reached a linear; give calibration data that uses it"
        )
    peaks = torch.stack([x.abs().amax(0).float() for x in flat]).amax(0)
    if not bool(peaks.isfinite().all()):
        raise UserError(
            "SmoothQuant calibration: a linear's input has inf or NaN values; "
            "run the model in bfloat16 or float32, or check the checkpoint"
        )
    return peaks


def migration_scale(
    peaks: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float
) -> torch.Tensor:
    """``max|x_j|^alpha / max|w_j|^(1 - alpha)`` (eq. 4), over all weights that share the input.

    Divided by the scales' geometric mean, since a common factor changes no code; a channel that is
    zero in the input or in the weights gets 1.

    Args:
        peaks: float32 ``[K]``, of :func:`channel_peaks`.
        weights: ``[N_i, K]`` each.
        alpha: 0 leaves the difficulty with the input, 1 moves all of it to the weights.

    Returns:
        Float32 ``[K]``: what the input is divided by and the weights' columns are multiplied by.
    """
    columns = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    used = (peaks > 0) & (columns > 0)
    log = alpha * peaks.clamp(min=1e-30).log() - (1 - alpha) * columns.clamp(min=1e-30).log()
    log = torch.where(used, log, 0.0)
    middle = log.sum() / used.sum().clamp(min=1)
    return torch.where(used, (log - middle).exp(), 1.0)


@dataclass(frozen=True)
class Smoothed:
    """Weights quantized for one input; each stands for its weight times ``scale``.

    ``error_plain`` (without smoothing), ``error`` (what is returned) and ``error_smooth`` (None
    where smoothing was not possible) are mean squared output errors on the calibration data, with
    the rounding of tokens; ``output_power`` is the same of the exact output.
    """

    scale: torch.Tensor
    rows: list[Rows]
    error_plain: float
    error_smooth: float | None
    output_power: float

    @property
    def smooth(self) -> bool:
        return self.error_smooth is not None and self.error_smooth < self.error_plain

    @property
    def error(self) -> float:
        return (
            self.error_smooth if self.smooth and self.error_smooth is not None else self.error_plain
        )


@torch.no_grad()
def quantize_smooth(
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    dtype: torch.dtype,
    alpha: float,
    applied: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Smoothed:
    """Quantize weights that share one input, smoothed where that lowers the error on it.

    Args:
        weights: ``[N_i, K]`` each, any float dtype.
        values: the input, ``[..., K]`` of each sample.
        dtype: int8 or float8_e4m3fn.
        alpha: migration strength, see :func:`migration_scale`.
        applied: maps a wanted scale, float32 ``[K]``, to the one that the network will really
            divide by; None where nothing can divide the input, which leaves it unsmoothed.

    Raises:
        UserError: no calibration data came, or weights or values are not finite.
    """
    peaks = channel_peaks(values)
    tokens = _spaced(values)
    ones = torch.ones_like(peaks)
    plain = [quantize_weight(w, dtype) for w in weights]
    error_plain, power = _error(weights, plain, tokens, ones)
    if not isfinite(error_plain):
        raise UserError(
            "the output error is not finite; weights or activations are too large; "
            "run the model in bfloat16 or float32"
        )
    if applied is None:
        return Smoothed(ones, plain, error_plain, None, power)
    scale = applied(migration_scale(peaks, weights, alpha))
    smooth = [quantize_weight(w.float() * scale, dtype) for w in weights]
    error, _ = _error(weights, smooth, tokens, scale)
    if error < error_plain:
        return Smoothed(scale, smooth, error_plain, error, power)
    return Smoothed(ones, plain, error_plain, error, power)


def _spaced(values: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = [x.flatten(0, -2) for x in values]
    step = -(-sum(map(len, flat)) // MOST_TOKENS)
    return torch.cat([x[::step] for x in flat])


def _error(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[Rows],
    tokens: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[float, float]:
    """Mean over tokens of the squared output error of all weights, and of the exact output."""
    error = power = 0.0
    for chunk, divided in _divided(tokens, scale):
        for weight, (codes, scales) in zip(weights, quantized, strict=True):
            exact = chunk @ weight.float().T
            out = w8a8_linear(divided, codes, scales, None)
            error += float((out - exact).square().sum(dtype=torch.float64))
            power += float(exact.square().sum(dtype=torch.float64))
    return error / len(tokens), power / len(tokens)


def _divided(
    tokens: torch.Tensor, scale: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens in float32, and as the quantized linear gets them: rounded to their dtype."""
    for part in torch.split(tokens, 1024):
        wide = part.float()
        yield wide, (wide / scale).to(part.dtype).float()
