"""What ``awq_linear`` means: ``w4a16_linear`` on repacked tensors."""

from __future__ import annotations

import torch

from ..w4a16_linear.reference import check_input
from ..w4a16_linear.reference import w4a16_linear as w4a16_reference
from .layout import check_layout, repack


def check_args(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> None:
    """Raise ValueError unless the arguments fit one another. Reads no values."""
    check_layout(qweight, qzeros, scales, group_size)
    check_input(x, qweight.shape[0], scales.shape[1], bias)


def awq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias`` with a weight in the layout of AWQ checkpoints.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32; any strides.
        qweight: int32 ``[K, N // 8]``, laid out as :mod:`.layout` says.
        qzeros: int32 ``[K // group_size, N // 8]``, packed alike.
        scales: ``[K // group_size, N]``, any float dtype; used in float32.
        bias: float ``[N]`` or None; added in float32.
        group_size: 32, 64 or 128; divides K.

    Returns:
        ``[..., N]`` in x's dtype, contiguous; products are summed in float32 and rounded once.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_args(x, qweight, qzeros, scales, bias, group_size)
    return w4a16_reference(x, *repack(qweight, qzeros, scales, group_size), bias, group_size)
