"""``silu_mul`` in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(gate: Tensor, up: Tensor) -> None:
    """Raise ValueError for wrong ranks, dtypes or widths. Reads no values, fixes no lengths."""
    if gate.dim() < 1 or not gate.is_floating_point():
        raise ValueError(
            f"silu_mul: gate is a floating [..., I], not {gate.dtype} {list(gate.shape)}"
        )
    if up.dim() != gate.dim() or up.shape[-1] != gate.shape[-1] or up.dtype != gate.dtype:
        raise ValueError(
            f"silu_mul: up is like gate, {gate.dtype} {list(gate.shape)}, "
            f"not {up.dtype} {list(up.shape)}"
        )


def check_values(gate: Tensor, up: Tensor) -> None:
    """As :func:`check_arguments`, and both have one shape (asked of real tensors only)."""
    check_arguments(gate, up)
    if up.shape != gate.shape:
        raise ValueError(f"silu_mul: up is {list(gate.shape)} as gate, not {list(up.shape)}")


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, the SwiGLU of Shazeer, arXiv 2002.05202.

    silu is computed in float32 and rounded to gate's dtype before the product, as models do.

    Args:
        gate, up: floating ``[..., I]`` of one shape and dtype, any strides (so halves of one
            merged projection serve as they are).

    Returns:
        ``[..., I]`` in gate's dtype, contiguous.

    Raises:
        ValueError: wrong ranks, dtypes or sizes.
    """
    check_values(gate, up)
    return (torch.nn.functional.silu(gate) * up).contiguous()
