"""ONNX form of ``select_tokens``: two stable sorts of all segments at once, as rows of a matrix."""

from __future__ import annotations

from typing import Any

from ..onnx_support import Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str]:
    one, axis = b.constant([1]), b.constant([0])
    starts, lengths, keep, offsets = (
        b.unsqueeze(b.long(name), 1) for name in ("starts", "lengths", "keep", "offsets")
    )  # [R, 1]
    # One score behind the last, for slots past a segment's end (and for no scores at all).
    nothing = b.op("CastLike", b.constant([0.0], "float32"), "scores")
    scores = b.float(b.op("Concat", "scores", nothing, axis=0))
    count = b.size("scores", 0)
    flat = b.constant([0, 1])
    width = b.op("Max", b.reshape(b.op("ReduceMax", lengths, flat, keepdims=0), 1), one)
    slot = b.range(width)
    inside = b.op("Less", slot, lengths)  # [R, W]
    at = b.op("Where", inside, b.op("Add", starts, slot), count)
    segment = b.op("Gather", scores, at)
    missing = b.op("IsNaN", segment)
    # First by score, equal ones by index; then what is NaN, and behind it what is no score at all.
    rank = b.op("Where", missing, b.number(1.0), b.number(0.0))
    rank = b.op("Where", inside, rank, b.number(2.0))
    known = b.op("Where", missing, b.number(0.0), segment)
    order = b.ops("TopK", 2, known, width, axis=1, largest=1, sorted=1)[1]
    ranked = b.op("GatherElements", rank, order, axis=1)
    again = b.ops("TopK", 2, ranked, width, axis=1, largest=0, sorted=1)[1]
    order = b.op("GatherElements", order, again, axis=1)
    most = b.op("Max", b.reshape(b.op("ReduceMax", keep, flat, keepdims=0), 1), one)
    best = b.op("Slice", order, axis, most, one)  # [R, K]
    slot = b.range(most)
    real = b.op("Less", slot, keep)
    best = b.op("Where", real, best, width)
    best = b.ops("TopK", 2, best, most, axis=1, largest=0, sorted=1)[0]
    best = b.reshape(b.op("Add", best, starts), -1)
    # Slots that no segment fills go to one behind the last.
    to = b.op("Where", real, b.op("Add", offsets, slot), "total")
    longer = b.op("Expand", b.constant([-1]), b.op("Add", "total", one))
    out = b.op("ScatterElements", longer, b.reshape(to, -1), best, axis=0)
    return (b.op("Slice", out, axis, "total", axis),)


SELECT_TOKENS = OnnxOp(
    "SelectTokens",
    "Of every segment scores[starts[r] : starts[r] + lengths[r]] the keep[r] <= lengths[r] highest, "
    "equal ones by index, NaN below all: their indices into scores, ascending, at out[offsets[r] :], "
    "-1 in all other slots of out [total]; total is int64 [1].",
    (
        Port("scores", "T"),
        *(Port(name, "I") for name in ("starts", "lengths", "keep", "offsets")),
        Port("total", "L"),
    ),
    (Port("out", "L"),),
    {},
    _body,
)
