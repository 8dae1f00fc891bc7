"""ONNX form of ``add_rms_norm``."""

from __future__ import annotations

from typing import Any

from onnx import helper

from ..onnx_support import CONTRIB, FUSED, Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str, str]:
    if "residual" in given and chosen[FUSED]:
        kind, inputs = "SkipSimplifiedLayerNormalization", ("x", "residual", "weight")
        normed, total = b.name(), b.name()
        outputs = [normed, "", "", total]
        b.nodes.append(helper.make_node(kind, inputs, outputs, domain=CONTRIB))
        b.refer("epsilon", "eps")
        return normed, total
    total = b.op("Add", "residual", "x") if "residual" in given else "x"
    wide = b.float(total)
    # The order of onnxruntime's own fusion to SimplifiedLayerNormalization.
    square = b.op("Pow", wide, b.number(2.0))
    mean = b.op("ReduceMean", square, b.constant([-1]), keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.attribute("eps")))
    normed = b.op("CastLike", b.op("Div", wide, root), "x")
    return b.op("Mul", normed, "weight"), total


ADD_RMS_NORM = OnnxOp(
    "AddRmsNorm",
    "total = residual + x (x where there is no residual), and total / sqrt(mean(total²) + eps) · "
    "weight over the last dim, normalised in float32; x [..., D], weight [D].",
    (Port("x", "T"), Port("residual", "T", optional=True), Port("weight", "T")),
    (Port("normed", "T"), Port("total", "T")),
    {"eps": "float"},
    _body,
    fusable=True,
)
