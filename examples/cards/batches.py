"""A dataclass of tensors that share their first dimension."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor


class Batch:
    """Base of dataclasses whose fields are tensors [n, ...] or such dataclasses themselves."""

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(next(iter(self._fields().values())))

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(**{k: v[rows] for k, v in self._fields().items()})

    def to(self, device: torch.device) -> Self:
        return type(self)(**{k: v.to(device) for k, v in self._fields().items()})

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        joined = {}
        for name, first in parts[0]._fields().items():
            values = [getattr(p, name) for p in parts]
            joined[name] = torch.cat(values) if isinstance(first, Tensor) else first.cat(values)
        return cls(**joined)
