"""Stock int4 and 8-bit linears, and the choice between them by measurement.

Int4 weights keep one layout, that of the kernel which decode uses; prefill dequantises that layout
into a scratch buffer by a fused elementwise kernel (``torch.compile``) and calls cuBLAS.
"""

from __future__ import annotations

import ast
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.stock.elementwise import EIGHT_BIT, Operand, Product

GROUP = 128
INNER = 8  # k tiles that tinygemm keeps together
GEMLITE_TUNED = Path(__file__).with_name("gemlite_h200.json")


@dataclass
class Int4:
    """``W[n, k] = (q - zero) * scale`` by groups of 128 along K.

    ``q [N, K]`` uint8 below 16, ``scale [N, K / 128]`` bf16, ``zero [N, K / 128]`` bf16 integers.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def random(k: int, n: int, device: torch.device) -> Int4:
        """Weights whose products keep the scale of their inputs (standard deviation K^-1/2)."""
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        spread = 0.75 + 0.5 * torch.rand(n, k // GROUP, device=device)
        zero = torch.randint(6, 10, (n, k // GROUP), device=device).bfloat16()
        return Int4(q, (spread / (4.7 * math.sqrt(k))).bfloat16(), zero)

    def dense(self) -> Tensor:
        """``[N, K]`` float32."""
        grouped = self.q.unflatten(1, (-1, GROUP)).float() - self.zero.float()[..., None]
        return (grouped * self.scale.float()[..., None]).flatten(1)


class DecodeLinear(Protocol):
    """A linear without bias: ``few`` for a decode step, ``dense`` for prefill's weight."""

    def few(self, x: Tensor) -> Tensor:
        """``[M, K]`` bf16 to ``[M, N]`` bf16."""

    def dense(self, out: Tensor) -> Tensor:
        """The weight ``[N, K]`` bf16: written to ``out``, or itself where it is kept so."""

    def bytes(self) -> int: ...


class Bf16Linear:
    """The weight kept in bf16: no int4 at all."""

    def __init__(self, weights: Int4) -> None:
        self.weight = weights.dense().bfloat16()

    def few(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def dense(self, out: Tensor) -> Tensor:
        return self.weight

    def bytes(self) -> int:
        return self.weight.nbytes


class PlainInt4Linear:
    """Two weights a byte, dequantised for every product: for machines without the int4 kernels."""

    def __init__(self, weights: Int4) -> None:
        self.packed = weights.q[:, ::2] << 4 | weights.q[:, 1::2]
        self.scale, self.zero = weights.scale, weights.zero

    def few(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.packed.shape[0], x.shape[1])
        return F.linear(x, self.dense(out))

    def dense(self, out: Tensor) -> Tensor:
        q = torch.stack((self.packed >> 4, self.packed & 15), -1).flatten(1)
        return out.copy_(Int4(q, self.scale, self.zero).dense())

    def bytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes


def unpack_tinygemm(packed: Tensor) -> Tensor:
    """The layout of torch's int4 kernel back to ``[N, K]``, 0 to 15.

    ``packed [N/8, K/128, 32, 4]`` int32: lane ``t`` holds row ``t // 4``; a word holds eight
    weights of two k tiles of 16, at ``k = 8 h + 2 (t % 4) + b`` of each, low and high halves of
    the word holding ``b = 0`` and ``b = 1``.
    """
    n8, k_outer, _, words = packed.shape
    shifts = torch.arange(8, device=packed.device)
    shifts = ((shifts // 2) * 4 + (shifts % 2) * 16).int()
    nibbles = (packed[..., None] >> shifts) & 15
    shaped = nibbles.view(n8, k_outer, 8, 4, words, 2, 2, 2)  # r, c, word, tile, h, b
    return shaped.permute(0, 2, 1, 4, 5, 6, 3, 7).reshape(n8 * 8, -1)


def _tinygemm_dense(packed: Tensor, scales: Tensor, out: Tensor) -> None:
    q = unpack_tinygemm(packed).unflatten(1, (-1, GROUP)).float() - 8
    scale, zero = (t.t()[..., None].float() for t in scales.unbind(-1))
    out.copy_((q * scale + zero).flatten(1))


def _gemlite_dense(packed: Tensor, scales: Tensor, zeros: Tensor, out: Tensor) -> None:
    shifts = torch.arange(0, 32, 4, device=packed.device).int()
    q = ((packed.t()[..., None] >> shifts) & 15).flatten(1)
    grouped = q.unflatten(1, (-1, GROUP)).float() * scales.t()[..., None].float()
    out.copy_((grouped + zeros.t()[..., None].float()).flatten(1))


_fused_tinygemm_dense = torch.compile(_tinygemm_dense, fullgraph=True, dynamic=False)
_fused_gemlite_dense = torch.compile(_gemlite_dense, fullgraph=True, dynamic=False)


class TinygemmLinear:
    """``torch._weight_int4pack_mm``."""

    def __init__(self, weights: Int4) -> None:
        pairs = weights.q[:, ::2] << 4 | weights.q[:, 1::2]
        self.packed = torch._convert_weight_to_int4pack(pairs, INNER)
        # Its weight is (q - 8) * scale + zero.
        shifted = (8 - weights.zero.float()) * weights.scale.float()
        both = torch.stack((weights.scale, shifted.bfloat16()), -1)
        self.scales = both.transpose(0, 1).contiguous()

    def few(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, self.packed, GROUP, self.scales)

    def dense(self, out: Tensor) -> Tensor:
        _fused_tinygemm_dense(self.packed, self.scales, out)
        return out

    def bytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes


class GemliteLinear:
    """GemLite 0.6, int32 packing, its own kernel choice for the number of rows."""

    def __init__(self, weights: Int4) -> None:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

        n, k = weights.q.shape
        self.linear = GemLiteLinear(4, GROUP, k, n, input_dtype=DType.BF16, output_dtype=DType.BF16)
        self.linear.pack(weights.q, weights.scale, weights.zero)

    def few(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]

    def dense(self, out: Tensor) -> Tensor:
        linear = self.linear
        _fused_gemlite_dense(linear.W_q.data, linear.scales.data, linear.zeros.data, out)
        return out

    def bytes(self) -> int:
        linear = self.linear
        return sum(int(t.nbytes) for t in (linear.W_q, linear.scales, linear.zeros))


KINDS: dict[str, Callable[[Int4], DecodeLinear]] = {
    "torch _weight_int4pack_mm": TinygemmLinear,
    "gemlite": GemliteLinear,
    "bf16 cuBLAS (weights kept in bf16)": Bf16Linear,
}
PLAIN = "int4 dequantised for every product"


def gemlite_runs(notes: list[str]) -> bool:
    """Whether GemLite can be imported; says so in ``notes``. Its saved tunings are loaded."""
    try:
        import gemlite
        from gemlite.core import GemLiteLinear
    except ImportError:
        notes.append("gemlite is not installed: not a candidate")
        return False
    notes.append(f"gemlite {getattr(gemlite, '__version__', 'of unknown version')} is installed")
    if GEMLITE_TUNED.exists():
        GemLiteLinear.load_config(str(GEMLITE_TUNED))
    return True


def gemlite_tuned(k: int, n: int, rows: int) -> bool:
    """Whether a tuning for these sizes is saved; without, GemLite searches for a minute a size."""
    if not GEMLITE_TUNED.exists():
        return False
    saved = json.loads(GEMLITE_TUNED.read_text())
    keys = [ast.literal_eval(key) for kernel in saved.values() for key in kernel]
    return any(key[:4] == (rows, n, k, GROUP) for key in keys)


def choose(
    sizes: dict[str, tuple[int, int]],
    rows: int,
    device: torch.device,
    notes: list[str],
    *,
    tune_gemlite: bool = False,
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """The fastest kind for each linear at ``rows`` rows, and every kind's microseconds.

    ``tune_gemlite``: let GemLite search where no tuning of it is saved, instead of leaving it out.
    Each candidate must first agree with the float32 product to 2 %, or it is left out and said so.
    Weights rotate over more than 200 MB.
    """
    if device.type != "cuda":
        notes.append("no GPU: int4 weights are dequantised for every product")
        return dict.fromkeys(sizes, PLAIN), {}
    from benchmarks.timing import relative_error, time_graph

    with_gemlite = gemlite_runs(notes)
    chosen: dict[str, str] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, (k, n) in sizes.items():
        figures[name] = {}
        copies = [Int4.random(k, n, device) for _ in range(max(2, math.ceil(4e8 / (k * n))))]
        x = torch.randn(rows, k, device=device).bfloat16()
        wanted = x.float() @ copies[0].dense().t()
        for kind in KINDS:
            if kind == "gemlite" and not with_gemlite:
                continue
            if kind == "gemlite" and not (tune_gemlite or gemlite_tuned(k, n, rows)):
                notes.append(
                    f"gemlite left out at {k}x{n}, {rows} rows: no tuning is saved (tune_gemlite searches)"
                )
                continue
            linears: list[DecodeLinear] = []
            try:
                linears = [KINDS[kind](c) for c in copies]
                error = relative_error(linears[0].few(x), wanted)
                if not error < 0.02:
                    raise ArithmeticError(f"relative error {error:.3g}")
                figures[name][kind] = time_graph(
                    [functools.partial(linear.few, x) for linear in linears]
                ).median
            except Exception as problem:
                notes.append(f"{kind} left out at {k}x{n}, {rows} rows: {str(problem)[:120]}")
            linears = []
        chosen[name] = min(figures[name], key=lambda kind: figures[name][kind])
    return chosen, figures


def build(kind: str, weights: Int4) -> DecodeLinear:
    """The linear of a kind that :func:`choose` named."""
    return PlainInt4Linear(weights) if kind == PLAIN else KINDS[kind](weights)


class Linear:
    """A linear of a tower in bf16, int8 or fp8, from a bf16 weight ``[N, K]``.

    Eight bits: one scale for each output channel of the weight, one for each row of the input.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, kind: str, *, add_bias: bool = False
    ) -> None:
        """``add_bias``: in the product itself where it can be (bf16, fp8); else left to add."""
        self.kind, self.bias = kind, bias
        self.inside = bias if add_bias and kind != "int8" else None
        self.weight, self.scale = weight, None
        if kind != "bf16":
            dtype, most = EIGHT_BIT[kind]
            scale = weight.float().abs().amax(1).clamp_min(1e-8) / most
            scaled = weight.float() / scale[:, None]
            self.weight = (scaled.round() if kind == "int8" else scaled).to(dtype)
            self.scale = scale

    def __call__(self, x: Operand) -> Product:
        if self.kind == "bf16":
            return Product(F.linear(x.value, self.weight, self.inside), bias=self._outside())
        assert self.scale is not None
        assert x.scale is not None
        if self.kind == "int8":
            return Product(torch._int_mm(x.value, self.weight.t()), x.scale, self.scale, self.bias)
        out = torch._scaled_mm(
            x.value,
            self.weight.t(),
            scale_a=x.scale,
            scale_b=self.scale[None],
            bias=self.inside,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return Product(out, bias=self._outside())

    def _outside(self) -> Tensor | None:
        return self.bias if self.inside is None else None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.scale, self.bias) if t is not None]
