"""``w8a8_linear`` on torch's own 8-bit matrix products: int8 on CPUs, float8 on GPUs."""

from __future__ import annotations

import torch

from ..registry import Reason
from ..triton_support import needs_cuda
from .reference import check_args, rescaled
from .rounding import ALIGNMENT, quantize_rows
from .triton import float8_missing, round_rows
from .triton import w8a8_linear as triton_linear

MIN_ROWS = 64
"""Rows below which cuBLAS has no float8 product for some widths with a bias (18,944 is one)."""


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


def float8_cuda(device: torch.device) -> Reason:
    """``supported`` of :func:`float8_linear`."""
    return needs_cuda(device) or float8_missing(device)


def float8_shapes(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> Reason:
    """``supports_args`` of :func:`float8_linear`: what cuBLAS takes, and takes well."""
    if weight.dtype != torch.float8_e4m3fn:
        return f"the weight is {weight.dtype}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}"
    if bias is not None and bias.dtype != x.dtype:
        return f"bias is {bias.dtype}, x is {x.dtype}"
    outputs, width = weight.shape
    if outputs % ALIGNMENT:
        return f"{outputs} outputs are not a multiple of {ALIGNMENT}"
    return f"is slow with a width of {width}, no multiple of 128" if width % 128 else None


def float8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As the reference: tokens are rounded by a Triton kernel, the product is cuBLAS's.

    Below :data:`MIN_ROWS` rows the product is Triton's, too. Sums have the matrix units' precision, as in :func:`.triton.w8a8_linear`.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_args(x, weight, scales, bias)
    flat = x.flatten(0, -2)
    if not len(flat):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    if len(flat) < MIN_ROWS:
        return triton_linear(x, weight, scales, bias)
    codes, token_scales = round_rows(flat, weight.dtype)
    out: torch.Tensor = torch.ops.aten._scaled_mm.default(
        codes,
        weight.contiguous().T,
        token_scales[:, None],
        scales[None],
        bias,
        None,
        x.dtype,
        True,
    )
    return out.view(*x.shape[:-1], weight.shape[0])
