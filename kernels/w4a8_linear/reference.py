"""What ``w4a8_linear`` means: ``w4a16_linear`` for few rows, weights and tokens in float8 for many."""

from __future__ import annotations

import torch

from ..w4a16_linear.packing import MAX_CODE, dequantize
from ..w4a16_linear.reference import check_args, w4a16_linear
from ..w8a8_linear.reference import w8a8_linear
from ..w8a8_linear.rounding import FLOOR, LARGEST

CODE = torch.float8_e4m3fn


def to_float8(
    qweight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored weight in float8, with one scale for each output channel.

    A channel's scale lets the largest value that its groups could hold become the largest float8.

    Returns:
        ``(codes, channel_scales)``: float8_e4m3fn ``[N, K]``, float32 ``[N]``; ``codes *
        channel_scales[:, None]`` stands for the weight.
    """
    reach = torch.maximum(zero_points, MAX_CODE - zero_points).float()
    top = (scales.float().abs() * reach).amax(1).clamp(min=FLOOR)
    largest = torch.full_like(top, LARGEST[CODE])
    weight = dequantize(qweight, scales, zero_points, group_size)
    return (weight * (largest / top)[:, None]).to(CODE), top / largest


def w4a8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    min_rows: int,
) -> torch.Tensor:
    """``x @ weight.T + bias`` with the 4-bit weight of ``w4a16_linear``.

    Fewer than ``min_rows`` rows (of all leading dimensions together): exactly ``w4a16_linear``.
    From there on, the weight is rounded to float8 by :func:`to_float8` and every token by
    ``w8a8_linear``'s rule (QServe, arXiv 2405.04532, sec. 5, has W4A8 with int8): a prompt's
    products then run at the float8 rate.

    Args:
        x, qweight, scales, zero_points, bias, group_size: as ``w4a16_linear``.
        min_rows: rows from which float8 is used.

    Returns:
        ``[..., N]`` in x's dtype, contiguous.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_args(x, qweight, scales, zero_points, bias, group_size)
    if x.numel() // x.shape[-1] < min_rows:
        return w4a16_linear(x, qweight, scales, zero_points, bias, group_size)
    codes, channel_scales = to_float8(qweight, scales, zero_points, group_size)
    return w8a8_linear(x, codes, channel_scales, bias)
