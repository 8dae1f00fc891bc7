"""How ``quantize_linear`` stores a linear: what each scheme searches, keeps and calls.

The parts of a stored linear replace its weight under names of their own: ``x.weight`` becomes
``x.qweight``, ``x.scales`` and, for w4a16, ``x.zero_points``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsevila_compile.awq import ActivationStats, Quantized, quantize_awq, quantize_groupwise
from sparsevila_compile.kernels.w4a16_linear.packing import pack_int4
from sparsevila_compile.kernels.w8a8_linear.rounding import padded
from sparsevila_compile.ops import W4A16_LINEAR, W8A8_LINEAR
from sparsevila_compile.smoothquant import Rows, quantize_smooth, quantize_weight

Parts = dict[str, torch.Tensor]
"""A stored linear by the names of its parts, in the order in which the op takes them."""

Applied = Callable[[torch.Tensor], torch.Tensor]
"""The scale that the input will really be divided by, from the one that is wanted."""


@dataclass
class Searched:
    """What a scheme found for linears that share an input.

    Attributes:
        stored: for each weight.
        scale: float32 ``[K]``, what the input is to be divided by; None for 1.
        errors: of the group's output, relative to its power: ``rtn`` and what the method reaches.
        reason: why there is no scale, where a scheme must say so.
    """

    stored: list[Parts]
    scale: torch.Tensor | None
    errors: dict[str, float]
    reason: str | None = None


def named(weight: str, parts: Parts) -> Parts:
    """Parts by the names that replace the weight's."""
    stem = weight.removesuffix(".weight")
    return {f"{stem}.{part}": tensor for part, tensor in parts.items()}


class Scheme(ABC):
    """One way to store linears.

    Attributes:
        op: the canonical op that takes the parts.
        explicit: whether a scale that folds nowhere may be a multiplication of its own.
    """

    op: Any
    explicit: bool

    @abstractmethod
    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Parts:
        """Shapes alone, on meta, for planning; ``dtype`` is the model's."""

    @abstractmethod
    def rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> Parts:
        """A weight ``[N, K]`` rounded to nearest, without calibration.

        Raises:
            UserError: the weight cannot be stored.
        """

    @abstractmethod
    def searched(
        self,
        weights: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        dtype: torch.dtype,
        applied: Applied | None,
    ) -> Searched:
        """Weights that share the input ``values``, a tensor ``[..., K]`` for each sample.

        Raises:
            UserError: weights or values are broken.
        """

    @abstractmethod
    def arguments(self, parts: Sequence[Any], bias: Any) -> tuple[Any, ...]:
        """What the op takes behind x."""


class W4A16(Scheme):
    """4-bit groupwise weights, searched by AWQ (arXiv 2306.00978)."""

    op = W4A16_LINEAR
    explicit = True

    def __init__(self, group_size: int, clip: bool) -> None:
        self.group_size, self.clip = group_size, clip

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Parts:
        groups = width // self.group_size
        return {
            "qweight": torch.empty((rows, width // 8), dtype=torch.int32, device="meta"),
            "scales": torch.empty((rows, groups), dtype=dtype, device="meta"),
            "zero_points": torch.empty((rows, groups), dtype=torch.uint8, device="meta"),
        }

    def rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> Parts:
        return self._packed(quantize_groupwise(weight, self.group_size, scale_dtype=dtype))

    def searched(
        self,
        weights: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        dtype: torch.dtype,
        applied: Applied | None,
    ) -> Searched:
        stats = ActivationStats(weights[0].shape[1], weights[0].device)
        for x in values:
            stats.update(x)
        result = quantize_awq(
            weights, stats, self.group_size, clip=self.clip, scale_dtype=dtype, applied=applied
        )
        power = result.output_power or 1.0
        errors = {
            "rtn": result.error_rtn / power,
            "awq": result.error_awq / power,
            "clipped": result.clipped,
        }
        scaled = not bool((result.scale == 1).all())
        stored = [self._packed(q) for q in result.quantized]
        result.quantized.clear()  # one byte a code; packed they take half
        return Searched(stored, result.scale if scaled else None, errors)

    def arguments(self, parts: Sequence[Any], bias: Any) -> tuple[Any, ...]:
        return (*parts, bias, self.group_size)

    @staticmethod
    def parts(qweight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor) -> Parts:
        """A linear's parts by name, from tensors in the layout of ``w4a16_linear``."""
        return {"qweight": qweight, "scales": scales, "zero_points": zero_points}

    @classmethod
    def _packed(cls, quantized: Quantized) -> Parts:
        return cls.parts(pack_int4(quantized.codes), quantized.scales, quantized.zero_points)


class W8A8(Scheme):
    """8-bit weights, a scale a row, and tokens rounded as they come; SmoothQuant searches."""

    op = W8A8_LINEAR
    explicit = False  # another pass over the tokens costs about what 8 bits win

    def __init__(self, code: torch.dtype, alpha: float) -> None:
        self.code, self.alpha = code, alpha

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Parts:
        return {
            "qweight": torch.empty((rows, padded(width)), dtype=self.code, device="meta"),
            "scales": torch.empty(rows, dtype=torch.float32, device="meta"),
        }

    def rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> Parts:
        return self._parts(quantize_weight(weight, self.code))

    def searched(
        self,
        weights: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        dtype: torch.dtype,
        applied: Applied | None,
    ) -> Searched:
        result = quantize_smooth(weights, values, self.code, self.alpha, applied)
        power = result.output_power or 1.0
        errors = {"rtn": result.error_plain / power, "smoothquant": result.error / power}
        reason = None
        if not result.smooth:
            reason = "nowhere to fold" if applied is None else "smoothing gains nothing"
        stored = [self._parts(rows) for rows in result.rows]
        return Searched(stored, result.scale if result.smooth else None, errors, reason)

    def arguments(self, parts: Sequence[Any], bias: Any) -> tuple[Any, ...]:
        return (*parts, bias)

    @staticmethod
    def _parts(rows: Rows) -> Parts:
        return {"qweight": rows[0], "scales": rows[1]}
