"""``w8a8_linear`` on torch's own 8-bit matrix products."""

from __future__ import annotations

import torch

from ..registry import Reason
from .reference import check_args, rescaled
from .rounding import quantize_rows


def cpu_only(device: torch.device) -> Reason:
    """``supported``."""
    return None if device.type == "cpu" else f"is for CPUs, this is {device.type}"


def int8_only(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Reason:
    """``supports_args``: torch's float8 product on CPUs is slower than converting the weight."""
    return None if weight.dtype == torch.int8 else f"the weight is {weight.dtype}"


def w8a8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As the reference; products of int8 are summed in int32, exactly.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_args(x, weight, scales, bias)
    codes, token_scales = quantize_rows(x, weight.dtype)
    sums = torch.ops.aten._int_mm.default(codes.flatten(0, -2), weight.T)
    return rescaled(sums.view(*x.shape[:-1], weight.shape[0]), token_scales, scales, bias, x.dtype)
