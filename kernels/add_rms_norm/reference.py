"""``add_rms_norm`` in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    """Raise ValueError for wrong ranks, dtypes or widths. Reads no values, fixes no lengths."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"add_rms_norm: x is a floating [..., D], not {x.dtype} {list(x.shape)}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: weight is a {x.dtype} [{x.shape[-1]}], "
            f"not {weight.dtype} {list(weight.shape)}"
        )
    if residual is not None and (
        residual.dim() != x.dim() or residual.shape[-1] != x.shape[-1] or residual.dtype != x.dtype
    ):
        raise ValueError(
            f"add_rms_norm: residual is like x, {x.dtype} {list(x.shape)}, "
            f"not {residual.dtype} {list(residual.shape)}"
        )


def check_values(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    """As :func:`check_arguments`, and x and residual have one shape (asked of real tensors only)."""
    check_arguments(x, residual, weight)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: residual is {list(x.shape)} as x, not {list(residual.shape)}"
        )


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``h = residual + x`` and ``h / sqrt(mean(h²) + eps) · weight`` over the last dim.

    RMSNorm is from Zhang and Sennrich, arXiv 1910.07467. Values are rounded to x's dtype where
    models in that dtype round them: the sum, the normalised values, and their product with the
    weight. All else is float32.

    Args:
        x: floating ``[..., D]``, any strides.
        residual: like x, or None for no addition.
        weight: ``[D]``, x's dtype.
        eps: added to the mean.

    Returns:
        The normalised values and h, both ``[..., D]`` in x's dtype, contiguous. Without a residual
        h would be x itself, which an op may not return: then it is empty, ``[0]``.

    Raises:
        ValueError: wrong ranks, dtypes or sizes.
    """
    check_values(x, residual, weight)
    total = x if residual is None else residual + x
    wide = total.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (weight * (wide * scale).to(x.dtype)).contiguous()
    return normed, x.new_empty(0) if residual is None else total.contiguous()
