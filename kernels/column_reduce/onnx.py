"""ONNX form of ``column_reduce``.

Rows that no batch row uses are left out before anything is multiplied: of a prompt's chunk, only
the question's rows have a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..attention.onnx import blocks_of, segment_bounds
from ..onnx_support import HIDDEN, STEP, Body, OnnxOp, Port


@dataclass(frozen=True)
class _Rows:
    """Some rows of the attention: int64 [M], [B, Hq, M, D], [B, 1, M, 1] and, or "", [B, Hq, M].

    ``first`` and ``end`` bound the keys of each row's segment, [M, 1], or of all rows, [1].
    """

    index: str
    q: str
    weights: str
    lse: str
    first: str
    end: str

    def picked(self, b: Body, at: str, packed: bool) -> _Rows:
        """The rows ``at`` [m]."""
        return _Rows(
            b.op("Gather", self.index, at),
            b.op("Gather", self.q, at, axis=2),
            b.op("Gather", self.weights, at, axis=2),
            b.op("Gather", self.lse, at, axis=2) if self.lse else "",
            b.op("Gather", self.first, at) if packed else self.first,
            b.op("Gather", self.end, at) if packed else self.end,
        )


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str]:
    batch, q_heads, kv_heads = b.size("q", 0), b.size("q", 1), b.size("k", 1)
    length = b.size("k", 2)
    rows = _used_rows(b, given)
    scale = b.attribute("scale")
    zero = b.number(0.0)
    if "columns" in given:
        columns = b.long("columns")  # [B, V]
        last = b.op("Sub", length, b.constant([1]))
        safe = b.op("Min", b.op("Max", columns, b.constant([0])), last)
        inside = b.op("LessOrEqual", columns, last)
        exists = b.op("And", b.op("GreaterOrEqual", columns, b.constant([0])), inside)
        if rows.lse:  # only the columns' scores are needed
            keys, at = _gather_keys(b, safe), b.unsqueeze(columns, 1, 2)
        else:
            keys, at = "k", b.range(length)
        sums = _sums(b, given, chosen, rows, scale, keys, at)
    else:
        sums = _sums_in_blocks(b, given, chosen, rows, scale)
    width = b.size(sums, 2)
    sizes: dict[str, str | int] = {"mean": 1, "kv": kv_heads, "none": q_heads}
    groups = sizes[chosen["heads"]]
    pooled = b.reshape(sums, batch, groups, -1, width)
    pooled = b.op("ReduceMean", pooled, b.constant([2]), keepdims=0)
    if "columns" in given:
        if not rows.lse:
            at = b.op("Expand", b.unsqueeze(safe, 1), b.shape(batch, groups, b.size(safe, 1)))
            pooled = b.op("GatherElements", pooled, at, axis=2)
        pooled = b.op("Where", b.unsqueeze(exists, 1), pooled, zero)
    return (pooled,)


def _used_rows(b: Body, given: frozenset[str]) -> _Rows:
    batch, rows = b.size("q", 0), b.size("q", 2)
    row = b.range(rows)
    first, end = b.constant([0]), b.size("k", 2)
    packed = "cu_seqlens" in given
    if packed:
        first, end = (b.unsqueeze(x, 1) for x in segment_bounds(b, "cu_seqlens", rows))
    lse = "row_lse" if "row_lse" in given else ""
    if "row_weights" not in given:
        count = b.op("Max", b.op("Sub", end, first), b.constant([1])) if packed else rows
        each = b.reshape(b.op("Reciprocal", b.float(count)), 1, -1)
        weights = b.unsqueeze(b.op("Expand", each, b.shape(batch, rows)), 1, 3)
        return _Rows(row, "q", weights, lse, first, end)
    weights = b.unsqueeze("row_weights", 1, 3)
    some = b.op("ReduceMax", b.op("Abs", weights), b.constant([0, 1, 3]), keepdims=0)
    used = b.op("Greater", some, b.number(0.0))
    # At least one row is kept: tensors without rows are what runtimes test least.
    used = b.op("Or", used, b.op("Equal", row, b.constant([0])))
    at = b.op("Compress", row, used, axis=0)
    return _Rows(row, "q", weights, lse, first, end).picked(b, at, packed)


def _sums_in_blocks(
    b: Body, given: frozenset[str], chosen: dict[str, Any], rows: _Rows, scale: str
) -> str:
    """As :func:`_sums` over all keys, BLOCK rows at a time: scores of all would not fit in memory."""
    count = b.size(rows.index, 0)
    blocks, block = blocks_of(b, count)
    last, key = b.op("Sub", count, b.constant([1])), b.range(b.size("k", 2))
    c = Body(prefix="block_")
    index = c.op("Add", c.range(block), c.op("Mul", block, STEP))
    at, there = c.op("Min", index, last), c.op("LessOrEqual", index, last)
    part = rows.picked(c, at, "cu_seqlens" in given)
    # The last block is filled up with the last row, which counts once.
    weights = c.op("Where", c.unsqueeze(there, 1), part.weights, c.number(0.0))
    part = replace(part, weights=weights)
    (parts,) = b.loop(blocks, c, [_sums(c, given, chosen, part, scale, "k", key)])
    return b.op("ReduceSum", parts, b.constant([0]), keepdims=0)


def _sums(
    b: Body,
    given: frozenset[str],
    chosen: dict[str, Any],
    rows: _Rows,
    scale: str,
    keys: str,
    at: str,
) -> str:
    """Weighted column sums of some rows, by head, float32 [B, Hq, N].

    keys [B, Hkv, N, D] lie at the positions ``at``, [N] or [B, 1, 1, N].
    """
    batch, q_heads, dim = b.size("q", 0), b.size("q", 1), b.size("q", 3)
    kv_heads = b.size("k", 1)
    ends = rows.end  # broadcastable to [B, 1, M, N]
    if "k_lens" in given:
        ends = b.op("Min", b.unsqueeze(b.long("k_lens"), 1, 2, 3), b.size("k", 2))
    if chosen["causal"]:
        own = b.op("Add", b.unsqueeze(b.long("q_start"), 1, 2, 3), b.unsqueeze(rows.index, 1))
        ends = b.op("Min", ends, b.op("Add", own, b.constant([1])))
    visible = b.op("And", b.op("GreaterOrEqual", at, rows.first), b.op("Less", at, ends))
    scaled = b.op("Mul", b.float(rows.q), scale)
    grouped = b.reshape(b.op("CastLike", scaled, "q"), batch, kv_heads, -1, dim)
    scores = b.float(b.op("MatMul", grouped, b.op("Transpose", keys, perm=[0, 1, 3, 2])))
    scores = b.reshape(scores, batch, q_heads, b.size(rows.index, 0), b.size(keys, 2))
    if rows.lse:
        known = b.unsqueeze(rows.lse, 3)
        finite = b.flip(b.op("Or", b.op("IsInf", known), b.op("IsNaN", known)))
        share = b.op("Exp", b.op("Sub", scores, known))
        # A NaN, of a key that holds anything or of a row without a weight, goes nowhere.
        visible = b.op("And", visible, finite)
    else:
        hidden = b.op("Where", visible, scores, b.number(HIDDEN))
        share = b.op("Softmax", hidden, axis=-1)
    zero = b.number(0.0)
    visible = b.op("And", visible, b.flip(b.op("Equal", rows.weights, zero)))
    share = b.op("Where", visible, b.op("Mul", share, rows.weights), zero)
    return b.op("ReduceSum", share, b.constant([2]), keepdims=0)


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
