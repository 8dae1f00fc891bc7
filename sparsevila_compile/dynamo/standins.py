"""Tensors that stand in for what the engine keeps: caches and pictures.

transformers' loop carries the KV cache and the visual tokens from call to call and looks at their
shapes only. So it gets tensors of the right shape, dtype and device that take one element of
memory: a storage of one NaN, strides 0. What they stand for hangs on the storage, so it lives
exactly as long as somebody holds such a tensor, or a view of it: when a ``DynamicCache`` goes, its
conversation's caches go. Used as numbers they are NaN, never plausible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_RECORD = "sparsevila_record"


def stand_in(
    record: Any, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Tensors of these shapes over one storage that carries ``record``."""
    storage = torch.full((1,), float("nan"), dtype=dtype, device=device).untyped_storage()
    setattr(storage, _RECORD, record)
    return [
        torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, (0,) * len(shape))  # type: ignore[call-overload]
        for shape in shapes
    ]


def record_of(tensor: torch.Tensor) -> Any:
    """What a tensor stands for, or None."""
    return getattr(tensor.untyped_storage(), _RECORD, None)


def emptied(tensor: torch.Tensor) -> int:
    """Replace a tensor's values by one NaN (integers: 0) of the same shape; returns the bytes held."""
    held = tensor.untyped_storage().nbytes()
    value = float("nan") if tensor.is_floating_point() else 0
    one = torch.full((1,), value, dtype=tensor.dtype, device=tensor.device)
    tensor.data = one.expand(tensor.shape)
    return held
