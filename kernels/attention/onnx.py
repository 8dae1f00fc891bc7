"""ONNX form of ``attention`` and ``attention_lse``, and the softmax that all attention bodies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..onnx_support import HIDDEN, STEP, Body, OnnxOp, Port

BLOCK = 128
"""Rows that are scored at once, with all their heads and keys."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention: names of int64 ``[1]`` values, or numbers where they are fixed."""

    batch: str
    rows: str
    heads: str | int
    kv_heads: str | int
    dim: str | int


def attend(
    b: Body,
    sizes: Sizes,
    scale: str,
    q: str,
    k: str,
    v: str,
    bias: str,
    sees: str,
    lse: bool = False,
) -> tuple[str, ...]:
    """softmax(scale · q kᵀ + bias) v and, with ``lse``, the scores' log-sum-exp.

    q [B, Hq, M, D]; k, v [B, Hkv, N, D]; bias float32, broadcastable to [B, Hkv, Hq/Hkv, M, N], 0
    or HIDDEN; sees bool, broadcastable to [B, Hq, M, 1]: rows that see a key, the others are zero in
    both; scale float32. Returns [B, M, Hq, D] in q's type and float32 [B, Hq, M]. Scores
    are products in q's type, the softmax is float32.
    """
    batch, rows, heads, kv_heads = sizes.batch, sizes.rows, sizes.heads, sizes.kv_heads
    # Scaled first: half-precision products stay in range. Heads of a group become rows.
    scaled = b.op("Mul", q, b.op("CastLike", scale, q))
    grouped = b.reshape(scaled, batch, kv_heads, -1, sizes.dim)
    scores = b.float(b.op("MatMul", grouped, b.op("Transpose", k, perm=[0, 1, 3, 2])))
    if isinstance(heads, int) and isinstance(kv_heads, int):
        group: str | int = heads // kv_heads
    else:
        group = b.op("Div", b.shape(heads), b.shape(kv_heads))
    scores = b.reshape(scores, batch, kv_heads, group, rows, -1)
    scores = b.op("Add", scores, bias)
    weights = b.op("Softmax", scores, axis=-1)
    flat = b.reshape(weights, batch, kv_heads, b.op("Mul", b.shape(group), rows), -1)
    out = b.reshape(b.op("MatMul", b.op("CastLike", flat, v), v), batch, heads, rows, sizes.dim)
    out = b.op("Where", sees, out, b.op("CastLike", b.number(0.0), out))
    out = b.op("Transpose", out, perm=[0, 2, 1, 3])
    if not lse:
        return (out,)
    # The largest weight is exp(peak - lse): two reductions instead of another pass of exponentials.
    axes = b.constant([-1])
    peak = b.op("ReduceMax", scores, axes, keepdims=0)
    sums = b.op("Sub", peak, b.op("Log", b.op("ReduceMax", weights, axes, keepdims=0)))
    sums = b.op("Where", sees, b.reshape(sums, batch, heads, rows, 1), b.number(0.0))
    return out, b.op("Squeeze", sums, axes)


def bias_of(b: Body, visible: str) -> str:
    """What is added to scores: a sum runs several times faster than a selection over all heads."""
    return b.op("Where", visible, b.number(0.0), b.number(HIDDEN))


def segment_bounds(b: Body, cu_seqlens: str, rows: str) -> tuple[str, str]:
    """First and one-past-last row of each row's own segment, int64 [rows]; both 0 outside all."""
    bounds = b.long(cu_seqlens)
    last = b.op("Sub", b.size(bounds, 0), b.constant([1]))
    begun = b.op("LessOrEqual", b.unsqueeze(bounds, 0), b.unsqueeze(b.range(rows), 1))
    segment = b.op("ReduceSum", b.long(begun), b.constant([1]), keepdims=0)
    segment = b.op("Sub", segment, b.constant([1]))
    inside = b.op(
        "And",
        b.op("GreaterOrEqual", segment, b.constant([0])),
        b.op("Less", segment, last),
    )
    safe = b.op("Where", inside, segment, b.constant([0]))
    first = b.op("Gather", bounds, safe)
    end = b.op("Gather", bounds, b.op("Add", safe, b.op("Where", inside, *_one_or_none(b))))
    zero = b.constant([0])
    return b.op("Where", inside, first, zero), b.op("Where", inside, end, zero)


def _one_or_none(b: Body) -> tuple[str, str]:
    return b.constant([1]), b.constant([0])


def _body(
    b: Body, given: frozenset[str], chosen: dict[str, Any], lse: bool = False
) -> tuple[str, ...]:
    length = b.size("q", 2)
    key = b.range(length)
    if "cu_seqlens" in given:
        first, end = segment_bounds(b, "cu_seqlens", length)
    else:
        # Not Expand(length, length): one value as data and as shape makes the CUDA provider crash.
        first = b.op("Mul", key, b.constant([0]))
        end = b.op("Add", first, length)
    if chosen["causal"]:
        after = b.op("Add", key, b.constant([1]))
        end = b.op("Min", end, after)
        window = b.attribute("window", "value_int")
        near = b.op("Sub", after, window)
        bounded = b.op("Greater", window, b.constant(0))
        first = b.op("Where", bounded, b.op("Max", first, near), first)
    scale = b.attribute("scale")
    sizes = Sizes(b.size("q", 0), length, b.size("q", 1), b.size("k", 1), b.size("q", 3))
    return _in_blocks(b, sizes, scale, first, end, lse)


def _between(b: Body, key: str, first: str, end: str) -> tuple[str, str]:
    """Bias [M, N] and whether a row sees a key [M, 1], for keys from first to end of each row [M]."""
    visible = b.op(
        "And",
        b.op("GreaterOrEqual", b.unsqueeze(key, 0), b.unsqueeze(first, 1)),
        b.op("Less", b.unsqueeze(key, 0), b.unsqueeze(end, 1)),
    )
    return bias_of(b, visible), b.unsqueeze(b.op("Less", first, end), 1)


def _in_blocks(
    b: Body, sizes: Sizes, scale: str, first: str, end: str, lse: bool
) -> tuple[str, ...]:
    """Attention, BLOCK rows at a time, each with the keys of its own segments only.

    Scores of a block stay in the processor's caches; those of all rows take many times as long.
    Windows of an encoder are far shorter than the sequence: of all pairs of rows, few are scored.
    """
    count, block = blocks_of(b, sizes.rows)
    last = b.op("Sub", sizes.rows, b.constant([1]))

    c = Body(prefix="block_")
    begin = c.op("Mul", block, STEP)
    # The last block is filled up with its last row: results of all blocks have one shape.
    rows = c.op("Min", c.op("Add", c.range(block), begin), last)
    starts, ends = c.op("Gather", first, rows), c.op("Gather", end, rows)
    # A row outside all segments starts at 0 and would have all keys scored.
    starts = c.op("Where", c.op("Less", starts, ends), starts, last)
    low = c.op("ReduceMin", starts, c.constant([0]), keepdims=1)
    high = c.op("ReduceMax", ends, c.constant([0]), keepdims=1)
    high = c.op("Max", high, c.op("Add", low, c.constant([1])))
    key = c.op("Add", c.range(c.op("Sub", high, low)), low)
    bias, sees = _between(c, key, starts, ends)
    q = c.op("Gather", "q", rows, axis=2)
    k, v = (c.slice(x, 2, low, high) for x in ("k", "v"))
    within = replace(sizes, rows=block)
    made = b.loop(count, c, attend(c, within, scale, q, k, v, bias, sees, lse))

    return joined(b, sizes, made)


def blocks_of(b: Body, rows: str) -> tuple[str, str]:
    """How many blocks of at most BLOCK rows there are, and how many rows each has: alike in all."""
    one = b.constant([1])
    count = b.op("Div", b.op("Add", rows, b.constant([BLOCK - 1])), b.constant([BLOCK]))
    count = b.op("Max", count, one)
    each = b.op("Div", b.op("Sub", b.op("Add", rows, count), one), count)
    return count, b.op("Max", each, one)


def joined(b: Body, sizes: Sizes, made: Sequence[str]) -> tuple[str, ...]:
    """Results of :func:`attend` for blocks of rows, along a new first axis, as those of all rows."""
    out = b.op("Transpose", made[0], perm=[1, 0, 2, 3, 4])  # [B, blocks, rows, Hq, D]
    out = b.reshape(out, sizes.batch, -1, sizes.heads, sizes.dim)
    out = b.slice(out, 1, 0, sizes.rows)
    if len(made) == 1:
        return (out,)
    sums = b.op("Transpose", made[1], perm=[1, 2, 0, 3])  # [B, Hq, blocks, rows]
    return out, b.slice(b.reshape(sums, sizes.batch, sizes.heads, -1), 2, 0, sizes.rows)


def _with_lse(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str, ...]:
    return _body(b, given, chosen, lse=True)


_INPUTS = (Port("q", "T"), Port("k", "T"), Port("v", "T"), Port("cu_seqlens", "I", optional=True))
_ATTRIBUTES = {"scale": "float", "causal": "int", "window": "int"}
_DOC = (
    "Attention of q [B, Hq, S, D] over k and v [B, Hkv, S, D]; out [B, S, Hq, D]. cu_seqlens [n+1] "
    "bounds packed segments (B is 1). causal: key j is visible to query i only if j <= i, and with "
    "window > 0 only if i - j < window. A row that sees no key is zero."
)

ATTENTION = OnnxOp("Attention", _DOC, _INPUTS, (Port("out", "T"),), _ATTRIBUTES, _body, ("causal",))
ATTENTION_LSE = OnnxOp(
    "AttentionLse",
    _DOC + " lse [B, Hq, S] is the log-sum-exp of each row's scores, 0 where it sees none.",
    _INPUTS,
    (Port("out", "T"), Port("lse", "F")),
    _ATTRIBUTES,
    _with_lse,
    ("causal",),
)
