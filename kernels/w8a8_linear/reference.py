"""What ``w8a8_linear`` means: round the tokens, multiply codes, rescale in float32, round once."""

from __future__ import annotations

import torch

from .rounding import LARGEST, padded, quantize_rows

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_args(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise ValueError unless the arguments fit one another. Reads no values."""
    if weight.ndim != 2 or weight.dtype not in LARGEST:
        raise ValueError(
            f"weight must be an int8 or float8_e4m3fn [N, K], not {weight.dtype} "
            f"{list(weight.shape)}"
        )
    rows = weight.shape[0]
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    if x.ndim < 1 or padded(x.shape[-1]) != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] with K padded to 16 equal to the weight's {weight.shape[1]}, "
            f"not {list(x.shape)}"
        )
    if list(scales.shape) != [rows] or scales.dtype != torch.float32:
        raise ValueError(
            f"scales must be a float32 [{rows}], not {scales.dtype} {list(scales.shape)}"
        )
    if bias is not None and (list(bias.shape) != [rows] or not bias.is_floating_point()):
        raise ValueError(f"bias must be a float [{rows}], not {bias.dtype} {list(bias.shape)}")


def rescaled(
    sums: torch.Tensor,
    token_scales: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums of products of codes, ``[..., N]``, as the outputs they stand for, in ``dtype``."""
    out = sums.float() * token_scales[..., None] * scales
    return (out if bias is None else out + bias.float()).to(dtype)


def w8a8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``q(x) @ (weight * scales[:, None]).T + bias`` with every token of x rounded to 8 bits.

    Tokens are rounded dynamically and each for itself, by :func:`.rounding.quantize_rows`, to the
    dtype of the weight (ZeroQuant, arXiv 2206.01861, sec. 4.1; SmoothQuant, arXiv 2211.10438,
    table 2, O1). A token with a value that is not finite comes out as NaN.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32; any strides. No rows is allowed.
        weight: int8 or float8_e4m3fn ``[N, K']``, K' = K rounded up to a multiple of 16; what is
            stored behind the K-th column must be finite and is not used.
        scales: float32 ``[N]``, one for each output channel.
        bias: float ``[N]`` or None; added in float32.

    Returns:
        ``[..., N]`` in x's dtype, contiguous. Products are summed in float32 here; an
        implementation may sum int8 products in int32, which is exact, and float8 products as the
        matrix units do.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_args(x, weight, scales, bias)
    codes, token_scales = quantize_rows(x, weight.dtype)
    return rescaled(codes.float() @ weight.float().T, token_scales, scales, bias, x.dtype)
