"""``rotary`` in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError for wrong ranks, dtypes or widths. Reads no values, fixes no lengths."""
    if q.dim() != 4 or not q.is_floating_point() or q.shape[3] % 2:
        raise ValueError(
            f"rotary: q is a floating [B, S, Hq, D], D even, not {q.dtype} {list(q.shape)}"
        )
    if k.dim() != 4 or k.dtype != q.dtype or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"rotary: k is a {q.dtype} [B, S, Hk, {q.shape[3]}], not {k.dtype} {list(k.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 3 or not table.is_floating_point() or table.shape[2] != q.shape[3]:
            raise ValueError(
                f"rotary: {name} is a floating [B, S, {q.shape[3]}], "
                f"not {table.dtype} {list(table.shape)}"
            )
    if cos.dtype != sin.dtype:
        raise ValueError(f"rotary: cos is {cos.dtype} and sin is {sin.dtype}")


def check_values(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As :func:`check_arguments`, and all have one B and S (asked of real tensors only)."""
    check_arguments(q, k, cos, sin)
    for name, other in (("k", k), ("cos", cos), ("sin", sin)):
        if other.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"rotary: {name} is [{q.shape[0]}, {q.shape[1]}, ...] as q, not {list(other.shape)}"
            )


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x · cos + rotate(x) · sin`` with ``rotate([a, b]) = [-b, a]`` over halves of the last dim.

    RoPE is from Su et al., arXiv 2104.09864; the tables say how positions turn into angles, so
    this serves one-dimensional and multimodal (time, height, width) positions alike. Products and
    sum are rounded to the wider of the dtypes of x and cos, as models do.

    Args:
        q: floating ``[B, S, Hq, D]``, D even, any strides: a projection seen as heads.
        k: ``[B, S, Hk, D]``, q's dtype.
        cos, sin: floating ``[B, S, D]``, of one dtype.

    Returns:
        The rotated q ``[B, Hq, S, D]`` and k ``[B, Hk, S, D]``, q's dtype, contiguous.

    Raises:
        ValueError: wrong ranks, dtypes or sizes.
    """
    check_values(q, k, cos, sin)
    wide = torch.promote_types(q.dtype, cos.dtype)
    c, s = cos[:, :, None], sin[:, :, None]
    half = q.shape[3] // 2

    def rotated(x: Tensor) -> Tensor:
        x = x.to(wide)
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * c + turned * s).to(q.dtype).transpose(1, 2).contiguous()

    return rotated(q), rotated(k)
