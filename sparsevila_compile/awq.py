"""AWQ (Lin et al., arXiv 2306.00978) as plain tensor functions; graphs and models are unknown here.

What is minimised is the error of a linear's output over the calibration data,
``mean over tokens of ||(W' - W) x||^2`` with ``W'`` the weight as it will be stored. That depends on
the data only through its second moment, since it equals ``trace(D C D^T)`` with ``D = W' - W`` and
``C = mean of x x^T``. So :class:`ActivationStats` keeps ``sum of x x^T``, float32 ``[K, K]``, rather
than sampled tokens: the memory does not grow with the data (1.4 GB at K = 18944), every token
counts, the rare ones with huge activations included, nothing is drawn at random, and the error is
exact instead of estimated, so "no worse than round-to-nearest" holds on all of the data.

Group scales are rounded to the dtype they are stored in before codes are computed: what is searched
is what is stored. Everything is computed in float32 and is deterministic; with TF32 matrix products
allowed (``torch.set_float32_matmul_precision``) the errors compared are only good to three digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import UserError
from .kernels.w4a16_linear.packing import GROUP_SIZES, MAX_CODE, dequantize_codes

CHUNK_ELEMENTS = 2**24
"""Values of a weight (or of activations) worked on at once; bounds the temporary memory."""

SHRINKS = tuple(1 - 0.05 * i for i in range(11))
"""Shares of a group's range tried when clipping; the first, 1, is no clipping."""


class Quantized(NamedTuple):
    """A weight ``[N, K]`` in 4 bits: codes uint8 ``[N, K]`` 0..15, scales ``[N, K // group_size]``
    in their storage dtype, zero_points uint8 of the same shape. Weight = (code - zero_point) *
    scale."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The weight these stand for, float32 ``[N, K]``."""
        group_size = self.codes.shape[1] // self.scales.shape[1]
        return dequantize_codes(self.codes, self.scales, self.zero_points, group_size)


class ActivationStats:
    """What AWQ needs of the inputs of one linear, or of several that share their input.

    Holds the number of tokens, the sum of ``|x|`` per channel (float64 ``[K]``) and the sum of
    ``x x^T`` (float32 ``[K, K]``). Independent of how the data is split into batches, up to
    rounding.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.abs_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.gram = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Add tokens ``[..., K]``, any float dtype; leave padding out beforehand."""
        channels = self.abs_sum.shape[0]
        if x.shape[-1] != channels:
            raise ValueError(f"x must be [..., {channels}], not {list(x.shape)}")
        for rows in x.detach().reshape(-1, channels).split(_chunk_rows(channels)):
            tokens = rows.to(self.gram.device, torch.float32)
            self.gram.addmm_(tokens.T, tokens)
            self.abs_sum += tokens.abs().sum(0, dtype=torch.float64)
            self.tokens += tokens.shape[0]

    def mean_abs(self) -> torch.Tensor:
        """Mean ``|x|`` per channel, float32 ``[K]``.

        Raises:
            UserError: no tokens came, or values were not finite.
        """
        if self.tokens == 0:
            raise UserError(
                "AWQ calibration: no tokens reached a linear; give calibration data that uses it"
            )
        if not bool(self.abs_sum.isfinite().all()):
            raise UserError(
                "AWQ calibration: a linear's input has inf or NaN values; "
                "run the model in bfloat16 or float32, or check the checkpoint"
            )
        return (self.abs_sum / self.tokens).float()

    def squared_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean over tokens of ``(row . x)^2`` for each row of float32 ``[n, K]``; float64 ``[n]``."""
        product = torch.mm(rows, self.gram).mul_(rows).sum(1, dtype=torch.float64)
        return product.clamp_(min=0) / self.tokens


def check_width(channels: int, group_size: int, what: str = "a linear") -> None:
    """Raise UserError unless ``group_size`` is one that exists and divides the width K."""
    if group_size not in GROUP_SIZES:
        raise UserError(f"group_size {group_size}: choose one of {list(GROUP_SIZES)}")
    if channels == 0 or channels % group_size:
        fitting = [size for size in GROUP_SIZES if channels and channels % size == 0]
        advice = f"use group_size {' or '.join(map(str, fitting))}, or " if fitting else ""
        raise UserError(
            f"{what}: its width {channels} is not divisible by group_size {group_size}; "
            f"{advice}leave it unquantized"
        )


def quantize_groupwise(
    weight: torch.Tensor,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    shrink: torch.Tensor | float = 1.0,
) -> Quantized:
    """Round-to-nearest to 4 bits with a scale and an integer zero point per row and group.

    A group's range is that of its values and 0, so 0 stays exactly 0; a group of zeros gets scale 1.

    Args:
        weight: ``[N, K]``, any float dtype, finite.
        group_size: 32, 64 or 128; divides K.
        scale_dtype: what scales are stored in; codes are computed for the rounded scale.
        shrink: share of the range that is kept, a number or float32 ``[N, K // group_size]``;
            values outside are clipped.

    Raises:
        UserError: ``group_size`` does not fit, values are not finite, or too large for
            ``scale_dtype``.
    """
    _check_weight(weight, group_size)
    quantized = _quantize(weight.float(), group_size, scale_dtype, shrink)
    if not bool(quantized.scales.isfinite().all()):
        raise UserError(f"a weight is too large for scales in {scale_dtype}; use float32 scales")
    return quantized


@dataclass(frozen=True)
class ScaleChoice:
    """What :func:`search_scale` found; errors as in :class:`AwqResult`."""

    scale: torch.Tensor
    alpha: float
    duo: bool
    error_rtn: float
    error: float


def search_scale(
    weights: Sequence[torch.Tensor],
    stats: ActivationStats,
    group_size: int,
    grid: int = 20,
    *,
    duo: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    applied: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ScaleChoice:
    """The per-channel scale that minimises the output error summed over ``weights``.

    Tried are ``s = a^alpha`` with ``a`` the mean ``|x|`` of a channel and ``alpha = i / grid``,
    i < grid (section 3.2, equation 5), and with ``duo`` also ``s = a^alpha / m^(1 - alpha)`` with
    ``m`` the mean weight magnitude of a channel within its group. Plain round-to-nearest, s = 1, is
    the first candidate and is kept on ties, so the result is never worse than that.

    Args:
        weights: ``[N_i, K]`` each, any float dtype, all fed by the input that ``stats`` saw.
        grid: number of exponents, at least 1.
        scale_dtype: what group scales are stored in.
        applied: maps a wanted scale, float32 ``[K]``, to the one that the network will really
            divide its activations by, e.g. after rounding in the op it is folded into. Default:
            rounding to ``scale_dtype``. Must leave ones unchanged and keep scales positive.

    Returns:
        The scale as applied, float32 ``[K]``: multiply the weights by it, divide the input by it.

    Raises:
        UserError: ``group_size`` does not fit, no calibration data came, values are not finite.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1, not {grid}")
    for weight in weights:
        _check_weight(weight, group_size)

    def round_scale(scale: torch.Tensor) -> torch.Tensor:
        return scale.to(scale_dtype).float()

    applied = applied or round_scale
    best: ScaleChoice | None = None
    error_rtn = 0.0
    for alpha, with_weights, wanted in _candidates(weights, stats, group_size, grid, duo):
        scale = applied(wanted)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("applied() must return positive, finite scales")
        error = sum(
            float(_row_errors(weight, stats, group_size, scale_dtype, scale).sum())
            for weight in weights
        )
        if best is None:
            if not bool((scale == 1).all()):
                raise ValueError("applied() must leave a scale of ones unchanged")
            error_rtn = error
        if best is None or error < best.error:
            best = ScaleChoice(scale, alpha, with_weights, error_rtn, error)
    assert best is not None
    return best


@torch.no_grad()
def search_clip(
    weight: torch.Tensor,
    stats: ActivationStats,
    group_size: int,
    *,
    scale: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """How far to shrink the range of every group of every row, float32 ``[N, K // group_size]``.

    The values are of :data:`SHRINKS`. Groups are settled from left to right, each by the exact
    output error of its row given the groups settled before and all later ones unclipped; 1 is kept
    on ties. So no row's error over the calibration data grows. (AWQ's own search rates each group
    by itself, on sampled tokens.)

    Args:
        weight: ``[N, K]``, any float dtype.
        scale: float32 ``[K]``, the per-channel scale the weight will be multiplied by; None for 1.

    Raises:
        UserError: as :func:`search_scale`.
    """
    _check_weight(weight, group_size)
    stats.mean_abs()  # refuses missing or broken data
    if scale is None:
        scale = torch.ones(weight.shape[1], device=weight.device)
    chunks = [
        _clip_rows(rows.float(), stats, group_size, scale, scale_dtype)
        for rows in weight.split(_chunk_rows(weight.shape[1]))
    ]
    return torch.cat(chunks)
