"""``add_rms_norm`` in Triton: one program a row, which it holds in registers."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from ..dependent_launch import begin, launch_options, wait
from ..rows import flat_rows
from ..triton_support import Reason, check_launch, next_power_of_2, on_device, tl, triton
from .reference import check_values

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_WIDTH = 32768


def triton_supports(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Reason:
    """Why the kernel cannot take these arguments, or None."""
    if x.dtype not in _DTYPES:
        return f"needs half or float32, not {x.dtype}"
    if x.shape[-1] > _MAX_WIDTH:
        return f"holds a row of at most {_MAX_WIDTH} values, not {x.shape[-1]}"
    return None


@triton.jit
@no_type_check
def _add_rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    x_stride,
    residual_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    factor = tl.load(weight + d, mask=inside, other=0.0)
    wait(EARLY)
    value = tl.load(x + row * x_stride + d, mask=inside, other=0.0)
    if ADD:
        old = tl.load(residual + row * residual_stride + d, mask=inside, other=0.0)
        value = (value.to(tl.float32) + old.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * width + d, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    # Rounded before the weight is applied, as models do.
    rounded = (wide * scale).to(x.dtype.element_ty)
    result = rounded.to(tl.float32) * factor.to(tl.float32)
    tl.store(normed + row * width + d, result, mask=inside)


def warps(block: int) -> int:
    """Warps a program, so that a thread holds 16 values, or 32 of the widest rows."""
    return min(max(block // 512, 1), 16)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    check_values(x, residual, weight)
    check_launch("add_rms_norm", x)
    width = x.shape[-1]
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    if normed.numel():
        rows = flat_rows(x)
        added = rows if residual is None else flat_rows(residual)
        block = next_power_of_2(width)
        with on_device(x):
            _add_rms_norm[(rows.shape[0],)](
                rows,
                added,
                weight.contiguous(),
                normed,
                total,
                rows.stride(0),
                added.stride(0),
                width,
                eps,
                ADD=residual is not None,
                BLOCK=block,
                num_warps=warps(block),
                **launch_options(x.device),
            )
    return normed, total
