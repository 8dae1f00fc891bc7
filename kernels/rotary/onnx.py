"""ONNX form of ``rotary``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..onnx_support import CONTRIB, FUSED, Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> Sequence[str]:
    same = chosen["same_type"]
    heads = [chosen["num_heads"], chosen["kv_num_heads"]]
    if chosen[FUSED]:  # the caller knows that the halves of each row of the tables are alike
        x = b.op("Transpose", b.op("Concat", "q", "k", axis=2), perm=[0, 2, 1, 3])
        # A token's row of the tables, all batches' one after the other: those are its "positions".
        batch, length = b.size("cos", 0), b.size("cos", 1)
        places = b.reshape(b.range(b.op("Mul", batch, length)), batch, length)
        tables = []
        for table in ("cos", "sin"):
            half = b.ops("Split", 2, table, axis=2, num_outputs=2)[0]
            tables.append(b.reshape(half, -1, b.size(half, -1)))
        out = b.op("RotaryEmbedding", x, places, *tables, domain=CONTRIB)
        return b.ops("Split", 2, out, b.constant(heads), axis=1)
    cos, sin = (b.unsqueeze(x if same else b.float(x), 2) for x in ("cos", "sin"))
    # The signs go with sin, which all layers share; q and k are turned together.
    low, high = b.ops("Split", 2, sin, axis=3, num_outputs=2)
    sin = b.op("Concat", b.op("Neg", low), high, axis=3)
    x = b.op("Concat", "q", "k", axis=2)
    wide = x if same else b.float(x)
    low, high = b.ops("Split", 2, wide, axis=3, num_outputs=2)
    turned = b.op("Concat", high, low, axis=3)
    out = b.op("Add", b.op("Mul", wide, cos), b.op("Mul", turned, sin))
    out = out if same else b.op("CastLike", out, "q")
    out = b.op("Transpose", out, perm=[0, 2, 1, 3])
    return b.ops("Split", 2, out, b.constant(heads), axis=1)


_ATTRIBUTES = {"same_type": "int", "num_heads": "int", "kv_num_heads": "int"}

ROTARY = OnnxOp(
    "Rotary",
    "x cos + rotate(x) sin with rotate([a, b]) = [-b, a] over halves of the last dim, for "
    "q [B, S, Hq, D] and k [B, S, Hk, D]; cos and sin [B, S, D]; outputs [B, H, S, D]. "
    "same_type: cos and sin have q's type; else all is computed in float32. num_heads, kv_num_heads: Hq and Hk.",
    (Port("q", "T"), Port("k", "T"), Port("cos", "C"), Port("sin", "C")),
    (Port("q_out", "T"), Port("k_out", "T")),
    _ATTRIBUTES,
    _body,
    tuple(_ATTRIBUTES),
    fusable=True,
)
