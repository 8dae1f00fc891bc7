"""ONNX form of ``w8a8_linear`` with int8 codes."""

from __future__ import annotations

from typing import Any

import torch

from ..onnx_support import Body, OnnxOp, Port
from .rounding import FLOOR, LARGEST


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str]:
    wide = b.float("x")
    largest = b.number(LARGEST[torch.int8])
    top = b.op("ReduceMax", b.op("Abs", wide), b.constant([-1]), keepdims=1)
    top = b.op("Max", top, b.number(FLOOR))
    # Maxima may pass over a NaN; a sum does not.
    zeros = b.op("Mul", wide, b.number(0.0))
    finite = b.flip(b.op("IsNaN", b.op("ReduceSum", zeros, b.constant([-1]), keepdims=1)))
    codes = b.op("Mul", wide, b.op("Div", largest, top))
    codes = b.op("Round", b.op("Where", finite, codes, b.number(0.0)))
    # Stored rows are padded: a row of the weight is one input channel here.
    more = b.op("Sub", b.size("weight", 0), b.size(wide, -1))
    pads = b.op("Concat", b.constant([0]), more, axis=0)
    codes = b.op("Pad", codes, pads, "", b.constant([-1]))
    sums = b.float(b.op("MatMulInteger", b.cast(codes, 3), "weight"))
    scale = b.op("Where", finite, b.op("Div", top, largest), b.number(float("nan")))
    out = b.op("Mul", b.op("Mul", sums, scale), "scales")
    if "bias" in given:
        out = b.op("Add", out, b.float("bias"))
    return (b.op("CastLike", out, "x"),)


W8A8_LINEAR = OnnxOp(
    "W8A8Linear",
    "x [..., K] is rounded to int8 row by row, a row's largest value to 127, and multiplied with "
    "int8 weight [K', N], K' >= K, whose rows from K on are not used; the int32 sums are rescaled "
    "by the row's scale and scales [N], and bias [N] is added.",
    (Port("x", "T"), Port("weight", "Q"), Port("scales", "F"), Port("bias", "C", optional=True)),
    (Port("out", "T"),),
    {},
    _body,
)
