"""Tensors seen as rows of values that lie side by side, as kernels over the last dim take them."""

from __future__ import annotations

from torch import Tensor


def flat_rows(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[N, D]`` whose last dim has stride 1: a view where strides allow."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
