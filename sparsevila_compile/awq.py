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
from math import isfinite
from typing import NamedTuple

import torch

from .errors import UserError
from .kernels.w4a16_linear.packing import GROUP_SIZES, MAX_CODE, dequantize_codes

CHUNK_ELEMENTS = 2**24
"""Values of a weight (or of activations) worked on at once; bounds the temporary memory."""

SHRINKS = tuple(1 - 0.05 * i for i in range(11))
"""Shares of a group's range tried when clipping; the first, 1, is no clipping."""


class Quantized(NamedTuple):
    """A weight ``[N, K]`` in 4 bits, ``(code - zero_point) * scale``.

    codes uint8 ``[N, K]``, 0..15; scales ``[N, K // group_size]`` in their storage dtype;
    zero_points uint8 ``[N, K // group_size]``, 0..15.
    """

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
        for rows in torch.split(x.reshape(-1, channels), _chunk_rows(self.gram)):
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


def check_finite(weight: torch.Tensor) -> None:
    """Raise UserError unless all values of a weight are finite."""
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):  # NaN propagates; no temporaries
        raise UserError("a weight to be quantized has inf or NaN values; check the checkpoint")


@torch.no_grad()
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
    """What :func:`search_scale` found; ``error`` is the chosen scale's, without clipping."""

    scale: torch.Tensor
    alpha: float
    duo: bool
    error_rtn: float
    error: float


@torch.no_grad()
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
    best: ScaleChoice | None = None
    error_rtn = 0.0
    for alpha, with_weights, wanted in _candidates(weights, stats, group_size, grid, duo):
        scale = applied(wanted) if applied else wanted.to(scale_dtype).float()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("applied() must return positive, finite scales")
        error = 0.0
        for rows in (chunk for weight in weights for chunk in _chunks(weight)):
            delta = _delta(rows, group_size, scale_dtype, scale)
            error += float(stats.squared_norm(delta).sum())
        if best is None:
            if not bool((scale == 1).all()):
                raise ValueError("applied() must leave a scale of ones unchanged")
            if not isfinite(error):
                raise UserError(
                    f"AWQ: the output error is not finite; weights (scales in {scale_dtype}) or "
                    "activations are too large; run the model in bfloat16 or float32"
                )
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

    The values are of :data:`SHRINKS`. First each group gets the one that is best for its own share
    of the output, as AWQ does (on sampled tokens). Groups fed by correlated channels then add up or
    cancel, so one sweep over the groups settles each anew by the exact error of its row, given all
    the others. Rows that are not better for it in the end are left unclipped: no row's error over
    the calibration data grows.

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
    return torch.cat(
        [_clip_rows(rows, stats, group_size, scale_dtype, scale) for rows in _chunks(weight)]
    )


@dataclass(frozen=True)
class AwqResult:
    """Weights quantized for one input; each stands for its weight times ``scale``.

    ``error_rtn`` (round-to-nearest) and ``error_awq`` (what is returned) are the mean over
    calibration tokens of the squared output error, summed over all outputs of all weights;
    ``output_power`` is the same of the exact output. ``clipped`` is the share of groups whose range
    was shrunk.
    """

    choice: ScaleChoice
    quantized: list[Quantized]
    error_awq: float
    output_power: float
    clipped: float

    @property
    def scale(self) -> torch.Tensor:
        """Float32 ``[K]``: what the input has to be divided by."""
        return self.choice.scale

    @property
    def error_rtn(self) -> float:
        return self.choice.error_rtn


@torch.no_grad()
def quantize_awq(
    weights: Sequence[torch.Tensor],
    stats: ActivationStats,
    group_size: int,
    clip: bool | Sequence[bool] = True,
    *,
    grid: int = 20,
    duo: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    applied: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> AwqResult:
    """Quantize weights that share one input: search the scale, then clip, then round.

    ``clip`` may say per weight whether its ranges may be shrunk (AWQ leaves query and key
    projections alone, whose outputs are multiplied with each other). Other arguments and errors are
    those of :func:`search_scale`. ``error_awq <= choice.error <= error_rtn`` always.
    """
    clips = [clip] * len(weights) if isinstance(clip, bool) else list(clip)
    if not weights or len(clips) != len(weights):
        raise ValueError(f"{len(weights)} weights but {len(clips)} values of clip")
    choice = search_scale(
        weights, stats, group_size, grid, duo=duo, scale_dtype=scale_dtype, applied=applied
    )
    quantized: list[Quantized] = []
    error = power = 0.0
    clipped = groups = 0
    for weight, may_clip in zip(weights, clips, strict=True):
        parts = []
        for rows in _chunks(weight):
            shrink = rows.new_ones(rows.shape[0], rows.shape[1] // group_size)
            if may_clip:
                shrink = _clip_rows(rows, stats, group_size, scale_dtype, choice.scale)
            clipped += int((shrink < 1).sum())
            groups += shrink.numel()
            part = _quantize(rows * choice.scale, group_size, scale_dtype, shrink)
            parts.append(part)
            delta = part.dequantize().div_(choice.scale).sub_(rows)
            error += float(stats.squared_norm(delta).sum())
            power += float(stats.squared_norm(rows).sum())
        codes, scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
        quantized.append(Quantized(codes, scales, zero_points))
    return AwqResult(choice, quantized, error, power, clipped / groups)


def _check_weight(weight: torch.Tensor, group_size: int) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float [N, K], not {weight.dtype} {list(weight.shape)}")
    check_width(weight.shape[1], group_size)
    check_finite(weight)


def _chunk_rows(matrix: torch.Tensor) -> int:
    """Rows worked on at once; clipping tries all shrinks of a group side by side."""
    return max(1, CHUNK_ELEMENTS // max(matrix.shape[1], len(SHRINKS) * max(GROUP_SIZES)))


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a matrix in float32, at most CHUNK_ELEMENTS values (or one row) at a time."""
    for rows in torch.split(weight, _chunk_rows(weight)):
        yield rows.float()


def _quantize(
    weight: torch.Tensor,
    group_size: int,
    scale_dtype: torch.dtype,
    shrink: torch.Tensor | float = 1.0,
) -> Quantized:
    """:func:`quantize_groupwise` of a float32 weight, unchecked."""
    grouped = weight.reshape(weight.shape[0], -1, group_size)
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    stored = ((high - low) * shrink / MAX_CODE).to(scale_dtype)
    stored = torch.where(stored > 0, stored, torch.ones_like(stored))
    step = stored.float()
    zero_points = (-low * shrink / step).round_().clamp_(0, MAX_CODE)
    codes = (grouped / step[..., None]).round_().add_(zero_points[..., None]).clamp_(0, MAX_CODE)
    return Quantized(codes.to(torch.uint8).flatten(1), stored, zero_points.to(torch.uint8))


def _delta(
    rows: torch.Tensor,
    group_size: int,
    scale_dtype: torch.dtype,
    scale: torch.Tensor,
    shrink: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """How far the stored weight of float32 rows is from them, as their input sees it."""
    quantized = _quantize(rows * scale, group_size, scale_dtype, shrink)
    return quantized.dequantize().div_(scale).sub_(rows)


def _candidates(
    weights: Sequence[torch.Tensor], stats: ActivationStats, group_size: int, grid: int, duo: bool
) -> Iterator[tuple[float, bool, torch.Tensor]]:
    """``(alpha, duo, scale)`` in the order tried; ones come first."""
    activation = stats.mean_abs()
    # The floor, relative to the mean, keeps a channel that is never active from a scale of zero.
    activation = (activation / activation.mean().clamp(min=1e-30)).clamp_(min=1e-4)
    magnitude = _weight_magnitude(weights, group_size).clamp_(min=1e-4) if duo else None
    for i in range(grid):
        alpha = i / grid
        scale = activation**alpha
        yield alpha, False, _centered(scale)
        if magnitude is not None:
            yield alpha, True, _centered(scale / magnitude ** (1 - alpha))


def _centered(scale: torch.Tensor) -> torch.Tensor:
    """Divided by the geometric mean of its extremes: a common factor changes no code."""
    low, high = scale.aminmax()
    return scale / (low * high).sqrt()


def _weight_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean over all rows of ``|w|`` relative to the largest of its group, float32 ``[K]``."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for rows in (chunk for weight in weights for chunk in _chunks(weight)):
        grouped = rows.abs().reshape(rows.shape[0], -1, group_size)
        relative = grouped / grouped.amax(-1, keepdim=True).clamp_(min=1e-30)
        total += relative.sum(0, dtype=torch.float64).flatten()
    return (total / sum(weight.shape[0] for weight in weights)).float()


def _clip_rows(
    rows: torch.Tensor,
    stats: ActivationStats,
    group_size: int,
    scale_dtype: torch.dtype,
    scale: torch.Tensor,
) -> torch.Tensor:
    """:func:`search_clip` for a chunk of float32 rows."""
    count, channels = rows.shape
    groups = channels // group_size
    # [groups, group_size, group_size]: the second moment of each group's own channels.
    blocks = stats.gram.view(groups, group_size, groups, group_size).diagonal(0, 0, 2)
    blocks = blocks.permute(2, 0, 1)
    ratios = torch.tensor(SHRINKS, device=rows.device)
    shrink, best = rows.new_ones(count, groups), rows.new_full((count, groups), float("inf"))
    for ratio in SHRINKS:
        delta = _delta(rows, group_size, scale_dtype, scale, ratio)
        own = delta.view(count, groups, group_size).transpose(0, 1)
        error = torch.bmm(own, blocks).mul_(own).sum(-1).T
        shrink = torch.where(error < best, ratio, shrink)
        best = torch.minimum(error, best)

    # A group's move by m changes its row's error by m C m^T + 2 m (delta C)^T.
    delta = _delta(rows, group_size, scale_dtype, scale, shrink)
    pull = torch.mm(delta, stats.gram)
    for group in range(groups):
        own_channels = slice(group * group_size, (group + 1) * group_size)
        tried = [
            _delta(rows[:, own_channels], group_size, scale_dtype, scale[own_channels], ratio)
            for ratio in SHRINKS
        ]
        moves = torch.stack(tried).sub_(delta[:, own_channels])
        change = (moves @ blocks[group]).add_(pull[:, own_channels], alpha=2).mul_(moves).sum(-1)
        gain, pick = change.min(0)
        move = moves.gather(0, pick[None, :, None].expand(1, count, group_size))[0]
        move = torch.where(gain[:, None] < 0, move, 0.0)
        shrink[:, group] = torch.where(gain < 0, ratios[pick], shrink[:, group])
        pull.addmm_(move, stats.gram[own_channels])

    clipped = stats.squared_norm(_delta(rows, group_size, scale_dtype, scale, shrink))
    plain = stats.squared_norm(_delta(rows, group_size, scale_dtype, scale))
    return torch.where((clipped < plain)[:, None], shrink, 1.0)
