"""ONNX form of ``select_tokens``, for all segments at once, as rows of a matrix.

The sort yields only the lowest score that is chosen. Which of the equal ones are chosen is counted:
ONNX says that TopK puts the lower index first, but onnxruntime's CUDA kernel for more than 256
elements does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..onnx_support import Body, OnnxOp, Port

LOWEST = float(np.finfo(np.float32).min)
"""Stands for -inf and NaN in the sort: onnxruntime's CUDA kernel pads rows with it."""


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str]:
    one, axis = b.constant([1]), b.constant([0])
    starts, lengths, keep, offsets = (
        b.unsqueeze(b.long(name), 1) for name in ("starts", "lengths", "keep", "offsets")
    )  # [R, 1]
    # One score behind the last, for slots past a segment's end (and for no scores at all).
    nothing = b.op("CastLike", b.constant([0.0], "float32"), "scores")
    scores = b.float(b.op("Concat", "scores", nothing, axis=0))
    count = b.size("scores", 0)
    width = _largest(b, "lengths")
    slot = b.range(width)
    inside = b.op("Less", slot, lengths)  # [R, W]
    index = b.op("Add", starts, slot)
    segment = b.op("Gather", scores, b.op("Where", inside, index, count))

    lowest, zero, last = b.number(LOWEST), b.constant(0), b.constant(1)
    missing = b.op("IsNaN", segment)
    known = b.op("And", inside, b.flip(missing))
    key = b.op("Max", b.op("Where", known, segment, lowest), lowest)
    most = _largest(b, "keep")
    sorted_keys = b.ops("TopK", 2, key, most, axis=1, largest=1, sorted=1)[0]
    place = b.op("Max", b.op("Sub", keep, one), axis)
    bar = b.op("GatherElements", sorted_keys, place, axis=1)  # [R, 1]
    above = b.op("Greater", key, bar)
    room = b.op("Sub", keep, _count(b, above))
    # Equal ones by index; at the lowest, -inf comes behind any number and NaN behind that.
    level = b.op("And", inside, b.op("Equal", key, bar))
    number = b.op("And", level, b.op("GreaterOrEqual", segment, lowest))
    infinite = b.op("And", level, b.op("Less", segment, lowest))
    levels = (number, infinite, b.op("And", level, missing))
    equal = b.op("Concat", *levels, axis=1)  # [R, 3W]
    turn = b.op("CumSum", b.long(equal), last)
    taken = b.op("And", equal, b.op("LessOrEqual", turn, room))
    parts = b.ops("Split", 3, taken, axis=1, num_outputs=3)
    picked = b.op("Or", b.op("Or", above, parts[0]), b.op("Or", parts[1], parts[2]))

    # A place of its own for each that is left out, too, behind the last slot.
    before = b.op("CumSum", b.long(picked), last, exclusive=1)
    to = b.reshape(b.op("Where", picked, b.op("Add", offsets, before), b.constant(-1)), -1)
    own = b.op("Add", b.range(b.size(to, 0)), "total")
    to = b.op("Where", b.op("Less", to, zero), own, to)
    longer = b.op("Expand", b.constant([-1]), b.op("Add", "total", b.size(to, 0)))
    out = b.op("ScatterElements", longer, to, b.reshape(index, -1), axis=0)
    return (b.op("Slice", out, axis, "total", axis),)


def _largest(b: Body, name: str) -> str:
    """The largest of an input's integers, at least 1, int64 [1]: also where there are none."""
    padded = b.op("Concat", b.constant([1]), b.long(name), axis=0)
    return b.op("ReduceMax", padded, b.constant([0]), keepdims=1)


def _count(b: Body, marks: str) -> str:
    """How many of each row are true, int64 [R, 1]."""
    return b.op("ReduceSum", b.long(marks), b.constant([1]), keepdims=1)


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
