"""ONNX form of ``column_reduce``.

Rows that no batch row uses are left out before anything is multiplied: of a prompt's chunk, only
the question's rows have a weight.
"""

from __future__ import annotations

from typing import Any

from ..attention.onnx import segment_bounds
from ..onnx_support import HIDDEN, Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str]:
    batch, q_heads, rows, dim = (b.size("q", axis) for axis in range(4))
    kv_heads, length = b.size("k", 1), b.size("k", 2)
    row = b.range(rows)
    first, end = b.constant([0]), length
    if "cu_seqlens" in given:
        first, end = (b.unsqueeze(x, 1) for x in segment_bounds(b, "cu_seqlens", rows))  # [M, 1]
    if "row_weights" in given:
        weights = "row_weights"
    else:
        one = b.number(1.0)
        each = b.op("Div", one, b.float(b.op("Max", b.op("Sub", end, first), b.constant([1]))))
        if "cu_seqlens" not in given:
            each = b.op("Div", one, b.float(rows))
        weights = b.op("Expand", b.reshape(each, 1, -1), b.shape(batch, rows))
    weights = b.unsqueeze(weights, 1, 3)  # [B, 1, M, 1]
    q, lse = "q", "row_lse" if "row_lse" in given else ""
    if "row_weights" in given:
        some = b.op("ReduceMax", b.op("Abs", weights), b.constant([0, 1, 3]), keepdims=0)
        used = b.op("Greater", some, b.number(0.0))
        # At least one row is kept: tensors without rows are what runtimes test least.
        used = b.op("Or", used, b.op("Equal", row, b.constant([0])))
        row, weights = b.op("Compress", row, used, axis=0), b.op("Compress", weights, used, axis=2)
        q = b.op("Compress", q, used, axis=2)
        lse = b.op("Compress", lse, used, axis=2) if lse else ""
        rows = b.size(row, 0)
        if "cu_seqlens" in given:
            first, end = (b.op("Gather", x, row) for x in (first, end))

    key = b.range(length)
    ends = end  # broadcastable to [B, 1, M, N]
    if "k_lens" in given:
        ends = b.op("Min", b.unsqueeze(b.long("k_lens"), 1, 2, 3), length)
    if chosen["causal"]:
        own = b.op("Add", b.unsqueeze(b.long("q_start"), 1, 2, 3), b.unsqueeze(row, 1))
        ends = b.op("Min", ends, b.op("Add", own, b.constant([1])))
    visible = b.op("And", b.op("GreaterOrEqual", key, first), b.op("Less", key, ends))

    keys = "k"
    if "columns" in given:
        columns = b.long("columns")  # [B, V]
        last = b.op("Sub", length, b.constant([1]))
        safe = b.op("Min", b.op("Max", columns, b.constant([0])), last)
        exists = b.op(
            "And",
            b.op("GreaterOrEqual", columns, b.constant([0])),
            b.op("LessOrEqual", columns, last),
        )
        if lse:  # only the columns' scores are needed
            at = b.unsqueeze(columns, 1, 2)
            visible = b.op("And", b.op("GreaterOrEqual", at, first), b.op("Less", at, ends))
            keys = _gather_keys(b, safe)

    scaled = b.op("Mul", b.float(q), b.attribute("scale"))
    grouped = b.reshape(b.op("CastLike", scaled, q), batch, kv_heads, -1, dim)
    scores = b.float(b.op("MatMul", grouped, b.op("Transpose", keys, perm=[0, 1, 3, 2])))
    scores = b.reshape(scores, batch, q_heads, rows, b.size(keys, 2))
    zero = b.number(0.0)
    if lse:
        known = b.unsqueeze(lse, 3)
        finite = b.flip(b.op("Or", b.op("IsInf", known), b.op("IsNaN", known)))
        share = b.op("Exp", b.op("Sub", scores, known))
        # A NaN, of a key that holds anything or of a row without a weight, goes nowhere.
        visible = b.op("And", visible, finite)
    else:
        share = b.op("Softmax", b.op("Where", visible, scores, b.number(HIDDEN)), axis=-1)
    visible = b.op("And", visible, b.flip(b.op("Equal", weights, zero)))
    share = b.op("Where", visible, b.op("Mul", share, weights), zero)
    sums = b.op("ReduceSum", share, b.constant([2]), keepdims=0)  # [B, Hq, N or V]
    width = b.size(sums, 2)
    sizes: dict[str, str | int] = {"mean": 1, "kv": kv_heads, "none": q_heads}
    groups = sizes[chosen["heads"]]
    pooled = b.reshape(sums, batch, groups, -1, width)
    pooled = b.op("ReduceMean", pooled, b.constant([2]), keepdims=0)
    if "columns" in given:
        if not lse:
            at = b.op("Expand", b.unsqueeze(safe, 1), b.shape(batch, groups, b.size(safe, 1)))
            pooled = b.op("GatherElements", pooled, at, axis=2)
        pooled = b.op("Where", b.unsqueeze(exists, 1), pooled, zero)
    return (pooled,)


def _gather_keys(b: Body, columns: str) -> str:
    """k [B, Hkv, N, D] at columns [B, V], as rows of k seen as [B * Hkv * N, D]."""
    batch, kv_heads, length, dim = (b.size("k", axis) for axis in range(4))
    head = b.op("Mul", b.unsqueeze(b.range(batch), 1, 2), kv_heads)
    head = b.op("Add", head, b.unsqueeze(b.range(kv_heads), 0, 2))
    at = b.op("Add", b.op("Mul", head, length), b.unsqueeze(columns, 1))
    return b.op("Gather", b.reshape("k", -1, dim), at)


COLUMN_REDUCE = OnnxOp(
    "ColumnReduce",
    "With P = softmax(scale q kᵀ) over full rows of q [B, Hq, M, D] and k [B, Hkv, N, D], the mean "
    "over the heads of a group of the sums over i of row_weights[b, i] P[b, h, i, j], float32 "
    "[B, G, N], or [B, G, V] at columns [B, V] (negative: 0). row_weights [B, M] are 1/M, or 1 over "
    "the row's segment, where left out; rows of weight 0 are not used. cu_seqlens [n+1] bounds "
    "packed segments. causal: row i attends keys up to q_start[b] + i. Keys from k_lens[b] on do "
    "not exist. row_lse [B, Hq, M] is the log-sum-exp of each row's scores, where it is known. "
    "heads: mean (G is 1), kv (G is Hkv) or none (G is Hq).",
    (
        Port("q", "T"),
        Port("k", "T"),
        Port("row_weights", "F", optional=True),
        Port("cu_seqlens", "I", optional=True),
        Port("q_start", "I", optional=True),
        Port("k_lens", "I", optional=True),
        Port("columns", "I", optional=True),
        Port("row_lse", "F", optional=True),
    ),
    (Port("out", "F"),),
    {"scale": "float", "causal": "int", "heads": "string"},
    _body,
    ("causal", "heads"),
)
