"""What ``w4a16_linear`` means: dequantize, multiply in float32, round once."""

from __future__ import annotations

import torch

from .packing import CODES_PER_WORD, check_layout, dequantize

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_args(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> None:
    """Raise ValueError unless the arguments fit one another. Reads no values."""
    check_layout(qweight, scales, zero_points, group_size)
    check_input(x, qweight.shape[1] * CODES_PER_WORD, qweight.shape[0], bias)


def check_input(x: torch.Tensor, channels: int, rows: int, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless x is ``[..., channels]`` and the bias, if any, ``[rows]``."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != channels:
        raise ValueError(f"x must be [..., {channels}] to fit qweight, not {list(x.shape)}")
    if bias is not None and (list(bias.shape) != [rows] or not bias.is_floating_point()):
        raise ValueError(f"bias must be a float [{rows}], not {bias.dtype} {list(bias.shape)}")


def w4a16_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias`` with ``weight = (code - zero_point) * scale``.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32; any strides. No rows is allowed.
        qweight: int32 ``[N, K // 8]``, laid out as :mod:`.packing` says.
        scales: ``[N, K // group_size]``, any float dtype; used in float32.
        zero_points: uint8 ``[N, K // group_size]``, 0..15.
        bias: float ``[N]`` or None; added in float32.
        group_size: 32, 64 or 128; divides K.

    Returns:
        ``[..., N]`` in x's dtype, contiguous; products are summed in float32 and rounded once.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_args(x, qweight, scales, zero_points, bias, group_size)
    weight = dequantize(qweight, scales, zero_points, group_size)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(
        x.dtype
    )
