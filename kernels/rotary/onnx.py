"""ONNX form of ``rotary``."""

from __future__ import annotations

from typing import Any

from ..onnx_support import Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str, str]:
    cos, sin = b.unsqueeze("cos", 2), b.unsqueeze("sin", 2)

    def rotated(x: str) -> str:
        # Products and sum in the wider type, which is float32 unless all are of one type.
        wide = x if chosen["same_type"] else b.float(x)
        low, high = b.ops("Split", 2, wide, axis=3, num_outputs=2)
        turned = b.op("Concat", b.op("Neg", high), low, axis=3)
        out = b.op("Add", b.op("Mul", wide, cos), b.op("Mul", turned, sin))
        out = out if chosen["same_type"] else b.op("CastLike", out, x)
        return b.op("Transpose", out, perm=[0, 2, 1, 3])

    if not chosen["same_type"]:
        cos, sin = b.float(cos), b.float(sin)
    return rotated("q"), rotated("k")


ROTARY = OnnxOp(
    "Rotary",
    "x cos + rotate(x) sin with rotate([a, b]) = [-b, a] over halves of the last dim, for "
    "q [B, S, Hq, D] and k [B, S, Hk, D]; cos and sin [B, S, D]; outputs [B, H, S, D]. "
    "same_type: cos and sin have q's type; else all is computed in float32.",
    (Port("q", "T"), Port("k", "T"), Port("cos", "C"), Port("sin", "C")),
    (Port("q_out", "T"), Port("k_out", "T")),
    {"same_type": "int"},
    _body,
    ("same_type",),
)
