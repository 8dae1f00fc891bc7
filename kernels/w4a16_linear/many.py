"""When :mod:`.many_rows` takes a linear, and its launch."""

from __future__ import annotations

import torch

from ..gluon_support import copyable, descriptor, hopper_only
from . import many_schedule as schedule
from .many_rows import GROUP, many_rows
from .many_schedule import OUTPUTS, ROWS, add_parts, plan, written_out

_STAGES = 4


def multiplies(
    x: torch.Tensor, scales: torch.Tensor, group_size: int, multiprocessors: int
) -> bool:
    """Whether the kernel takes such a linear of many rows."""
    if (
        not schedule.FUSED
        or hopper_only(x.device) is not None
        or x.dtype not in (torch.bfloat16, torch.float16)
        or scales.dtype != x.dtype
        or group_size != GROUP
    ):
        return False
    rows, channels, outputs = x.shape[0], x.shape[1], scales.shape[0]
    planned = plan(rows, outputs, channels // GROUP, multiprocessors)
    return planned.cycles <= written_out(rows, outputs, channels, multiprocessors)


def multiply(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    multiprocessors: int,
) -> None:
    """Launch. The stored tensors contiguous, qweight at a multiple of 16 bytes."""
    if not copyable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    rows, (outputs, groups) = x.shape[0], scales.shape
    planned = plan(rows, outputs, groups, multiprocessors)
    dealt = (planned.whole, planned.shared)
    shape = (planned.wide, planned.columns, planned.beside)
    ends = (out if bias is None else bias, out)
    copied = copyable(out)
    parts = out
    if planned.shared:
        parts = torch.empty(
            (2 * planned.programs, OUTPUTS, ROWS), dtype=torch.float32, device=x.device
        )
    many_rows[(planned.programs,)](
        descriptor(x, (ROWS, 64)),
        descriptor(x, (planned.last, 64)),
        descriptor(qweight, (64, 8), plain=True),
        descriptor(out if copied else x, (ROWS, 64)),
        scales,
        zero_points,
        *ends,
        parts,
        rows,
        outputs,
        groups,
        *dealt,
        *shape,
        LAST=planned.last,
        STAGES=_STAGES,
        HAS_BIAS=bias is not None,
        COPIED=copied,
        num_warps=4,
    )
    if planned.shared:
        add_parts[(planned.shared, ROWS // 16)](
            parts,
            *ends,
            rows,
            outputs,
            groups,
            *dealt,
            planned.programs,
            *shape,
            ROWS=ROWS,
            HAS_BIAS=bias is not None,
            num_warps=4,
        )
