"""Cases of ``w8a8_linear``, and 8-bit rounding by definition."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sparsevila_compile.kernels.w8a8_linear.rounding import (
    FLOOR,
    LARGEST,
    dequantize_rows,
    quantize_rows,
)
from tests.kernels.compare import bound_from

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn
CODES = (torch.int8, FLOAT8)

FLOAT8_SUM = 6e-3
"""What the matrix units' sums of float8 products may err on a GPU (measured: 3.8e-3 at K = 18944);
rounding to float8 costs ten times that."""


@cache
def values_of(code: torch.dtype) -> list[float]:
    """All values of an 8-bit dtype that codes may take, ascending."""
    if code == torch.int8:
        return [float(i) for i in range(-127, 128)]
    table = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
    return sorted(set(table[table.isfinite()].tolist()))


def nearest(y: float, code: torch.dtype) -> float:
    """The nearest value; of two equally near, the one whose last bit is zero."""
    values = values_of(code)
    at = bisect_left(values, y)
    near = values[max(at - 1, 0) : at + 1]
    best = min(abs(v - y) for v in near)
    tied = [v for v in near if abs(v - y) == best]
    even = [v for v in tied if int(torch.tensor(v).to(code).view(torch.int8)) % 2 == 0]
    return (even if len(tied) > 1 else tied)[0]


def rounded(x: torch.Tensor, code: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 code values [M, K] and scales [M] of finite rows, value by value."""
    scales, rows = [], []
    for row in x.float().cpu():
        amax = row.abs().max().clamp(min=FLOOR)
        largest = torch.tensor(LARGEST[code])
        scales.append(float(amax / largest))
        rows.append([nearest(float(v), code) for v in row * (largest / amax)])
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(scales, dtype=torch.float64)


def rows_of_all_sizes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Tokens that differ by a factor of 100, some channels 30 times the others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.logspace(-1, 1, shape[-2])[:, None]
    x[..., :: max(shape[-1] // 3, 1)] *= 30
    return x.to(dtype)


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    x: torch.Tensor
    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    @property
    def args(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.scales, self.bias

    def exact(self) -> torch.Tensor:
        """float64: with the codes of :func:`quantize_rows`, which the tests above check."""
        codes, scales = quantize_rows(self.x, self.weight.dtype)
        out = codes.double() @ self.weight.double().T * scales.double()[..., None]
        out = out * self.scales.double()
        return out if self.bias is None else out + self.bias.double()

    def bound(self) -> float:
        """What the same linear errs in x's dtype, from the same codes."""
        codes, scales = quantize_rows(self.x, self.weight.dtype)
        width = self.x.shape[-1]
        x = dequantize_rows(codes, scales, width).to(self.x.dtype)
        weight = dequantize_rows(self.weight, self.scales, width).to(self.x.dtype)
        bias = None if self.bias is None else self.bias.to(self.x.dtype)
        low = torch.nn.functional.linear(x, weight, bias)
        bound = bound_from(low, self.exact())
        summed_by_units = self.x.is_cuda and self.weight.dtype == FLOAT8
        return max(bound, FLOAT8_SUM) if summed_by_units else bound


def make_case(
    shape: tuple[int, ...],
    outputs: int,
    code: torch.dtype,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(outputs, shape[-1], generator=g) * torch.logspace(-1, 0, outputs)[:, None]
    codes, scales = quantize_rows(weight, code)
    stored = torch.randn(outputs, generator=g).to(dtype) if bias else None
    x = rows_of_all_sizes(shape, dtype, seed)
    return Case(
        x.to(device),
        codes.to(device),
        scales.to(device),
        None if stored is None else stored.to(device),
    )
