"""``silu_mul`` in Triton: one program a stretch of a row."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from ..dependent_launch import begin, launch_options, wait
from ..rows import flat_rows
from ..triton_support import Reason, cdiv, check_launch, on_device, tl, triton
from .reference import check_values

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_supports(gate: Tensor, up: Tensor) -> Reason:
    """Why the kernel cannot take these arguments, or None."""
    if gate.dtype not in _DTYPES:
        return f"needs half or float32, not {gate.dtype}"
    return None


@triton.jit
@no_type_check
def _silu_mul(
    gate, up, out, gate_stride, up_stride, width, blocks, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    begin(EARLY)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    wait(EARLY)
    g = tl.load(gate + row * gate_stride + d, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + d, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    # Rounded before the product, as models do.
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype.element_ty)
    tl.store(out + row * width + d, active.to(tl.float32) * u.to(tl.float32), mask=inside)


def launch(gate: Tensor, up: Tensor, out: Tensor, block: int, num_warps: int) -> None:
    """Run the kernel with that block size; ``out`` is contiguous."""
    gates, ups = flat_rows(gate), flat_rows(up)
    rows, width = gates.shape
    blocks = cdiv(width, block)
    with on_device(gate):
        _silu_mul[(rows * blocks,)](
            gates,
            ups,
            out,
            gates.stride(0),
            ups.stride(0),
            width,
            blocks,
            BLOCK=block,
            num_warps=num_warps,
            **launch_options(gate.device),
        )


def silu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference."""
    check_values(gate, up)
    check_launch("silu_mul", gate)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        launch(gate, up, out, 1024, 4)
    return out
