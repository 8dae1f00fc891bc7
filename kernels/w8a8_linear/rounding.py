"""Rounding rows to 8 bits: tokens when the op runs, output channels when a weight is stored.

A row is divided by one scale, so that its largest value becomes the largest 8-bit one. Rows of
weights and codes are padded with zeros to a multiple of :data:`ALIGNMENT` values, which the matrix
units' loads want: 3420, a width of Qwen2.5-VL's vision tower, becomes 3424.
"""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The 8-bit dtypes, and the largest value each takes; the smallest is its negative."""

ALIGNMENT = 16
"""Bytes that the length of a stored row is a multiple of."""

FLOOR = 1e-30
"""Rows whose largest value is smaller are rounded as if it were this: nothing is divided by zero."""


def padded(width: int) -> int:
    """Values a stored row of ``width`` takes."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row to 8 bits, to the nearest and halves to even.

    With ``largest`` of the dtype and ``a = max(max|x|, FLOOR)`` of a row, in float32: the scale is
    ``a / largest`` and the codes are ``x * (largest / a)``, rounded. ``codes * scale`` stands for x.

    Args:
        x: ``[..., K]``, any float dtype and strides.
        dtype: int8 or float8_e4m3fn.

    Returns:
        ``(codes, scales)``: dtype ``[..., padded(K)]``, contiguous, zeros behind the K-th value;
        float32 ``[...]``. A row with a value that is not finite has the scale NaN and zero codes.
    """
    largest = LARGEST[dtype]
    wide = x.float()
    if wide.shape[-1] == 0:
        amax = wide.new_zeros(wide.shape[:-1])
    else:
        amax = wide.abs().amax(-1)
    amax = amax.clamp(min=FLOOR)  # NaN stays
    finite = amax.isfinite()
    top = torch.full_like(amax, largest)
    y = torch.where(finite[..., None], wide * (top / amax)[..., None], 0.0)
    y = torch.nn.functional.pad(y, (0, padded(x.shape[-1]) - x.shape[-1]))
    codes = y.round().to(dtype) if dtype == torch.int8 else y.to(dtype)
    return codes.contiguous(), torch.where(finite, amax / top, torch.nan)


def dequantize_rows(codes: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """What ``(codes, scales)`` of :func:`quantize_rows` stand for, float32 ``[..., width]``."""
    return codes[..., :width].float() * scales[..., None]
