"""ONNX form of ``attention`` and ``attention_lse``, and the softmax that all attention bodies share."""

from __future__ import annotations

from typing import Any

from ..onnx_support import HIDDEN, Body, OnnxOp, Port


def attend(
    b: Body, q: str, k: str, v: str, visible: str, sees: str, scale: str, lse: bool = False
) -> tuple[str, ...]:
    """softmax(scale · q kᵀ) v over the visible keys and, with ``lse``, the scores' log-sum-exp.

    q [B, Hq, M, D]; k, v [B, Hkv, N, D]; visible bool, broadcastable to [B, Hkv, Hq/Hkv, M, N];
    sees bool, broadcastable to [B, Hq, M, 1]: rows that see a key, the others are zero in both;
    scale float32. Returns [B, M, Hq, D] in q's type and float32 [B, Hq, M]. Scores are products in
    q's type, the softmax is float32.
    """
    batch, heads, rows, dim = (b.size(q, axis) for axis in range(4))
    kv_heads, keys = b.size(k, 1), b.size(k, 2)
    # Scaled first: half-precision products stay in range. Heads of a group become rows.
    scaled = b.op("Mul", q, b.op("CastLike", scale, q))
    grouped = b.reshape(scaled, batch, kv_heads, -1, dim)
    scores = b.float(b.op("MatMul", grouped, b.op("Transpose", k, perm=[0, 1, 3, 2])))
    scores = b.reshape(scores, batch, kv_heads, -1, rows, keys)
    # A sum runs several times faster than a selection over all heads.
    scores = b.op("Add", scores, b.op("Where", visible, b.number(0.0), b.number(HIDDEN)))
    weights = b.op("Softmax", scores, axis=-1)
    flat = b.op("CastLike", b.reshape(weights, batch, kv_heads, -1, keys), v)
    out = b.reshape(b.op("MatMul", flat, v), batch, heads, rows, dim)
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
        first, end = b.op("Mul", key, b.constant([0])), b.op("Expand", length, length)
    if chosen["causal"]:
        after = b.op("Add", key, b.constant([1]))
        end = b.op("Min", end, after)
        window = b.attribute("window", "value_int")
        near = b.op("Sub", after, window)
        bounded = b.op("Greater", window, b.constant(0))
        first = b.op("Where", bounded, b.op("Max", first, near), first)
    visible = b.op(
        "And",
        b.op("GreaterOrEqual", b.unsqueeze(key, 0), b.unsqueeze(first, 1)),
        b.op("Less", b.unsqueeze(key, 0), b.unsqueeze(end, 1)),
    )
    sees = b.unsqueeze(b.op("Less", first, end), 1)
    return attend(b, "q", "k", "v", visible, sees, b.attribute("scale"), lse)


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
