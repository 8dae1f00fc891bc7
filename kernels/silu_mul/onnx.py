"""ONNX form of ``silu_mul``."""

from __future__ import annotations

from typing import Any

from ..onnx_support import Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str]:
    wide = b.float("gate")
    silu = b.op("CastLike", b.op("Mul", wide, b.op("Sigmoid", wide)), "gate")
    return (b.op("Mul", silu, "up"),)


SILU_MUL = OnnxOp(
    "SiluMul",
    "silu(gate) · up, silu in float32 and rounded to gate's type; both [..., I].",
    (Port("gate", "T"), Port("up", "T")),
    (Port("out", "T"),),
    {},
    _body,
)
