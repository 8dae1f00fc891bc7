"""ONNX form of ``retrieval_attention``: rows of the cache are gathered, then attended densely.

The bytes read are those of the chosen positions, so a step gets cheaper as fewer are chosen.
"""

from __future__ import annotations

from typing import Any

from ..attention.onnx import attend
from ..cached_attention.onnx import CACHES, DOC_WRITE, INPUTS, append
from ..onnx_support import Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str, ...]:
    caches = append(b, ("k", "v"), ("k_cache", "v_cache"), "cache_lens")
    batch, kv_heads, capacity, dim = (b.size("k_cache", axis) for axis in range(4))
    length = b.size("q", 2)
    row = b.range(length)
    start = b.unsqueeze(b.long("cache_lens"), 1)  # [B, 1]
    tail = b.unsqueeze(b.long("tail_start"), 1)
    # The longest tail of the batch: shorter ones see less of theirs.
    ends = b.op("Add", start, length)
    longest = b.op("ReduceMax", b.op("Sub", ends, tail), b.constant([0, 1]), keepdims=0)
    longest = b.op("Max", b.op("Min", b.reshape(longest, 1), capacity), b.constant([1]))
    position = b.op("Add", tail, b.range(longest))  # [B, T]

    named = b.long("index")  # [B, Hi, I]
    heads = b.size(named, 1)
    tails = b.op("Expand", b.unsqueeze(position, 1), b.shape(batch, heads, longest))
    keys = b.op("Concat", named, tails, axis=2)  # [B, Hi, N]
    last = b.op("Sub", capacity, b.constant([1]))
    safe = b.op("Min", b.op("Max", keys, b.constant([0])), last)
    # One row of the cache seen as [B * Hkv * L, D] is one key of one head.
    head = b.op(
        "Add",
        b.op("Mul", b.reshape(b.range(batch), -1, 1, 1), kv_heads),
        b.reshape(b.range(kv_heads), 1, -1, 1),
    )
    rows = b.op("Add", b.op("Mul", head, capacity), safe)  # [B, Hkv, N]
    k, v = (b.op("Gather", b.reshape(cache, -1, dim), rows) for cache in caches)

    query = b.unsqueeze(b.op("Add", start, row), 2)  # [B, S, 1]
    in_tail = b.op(
        "And",
        b.op("LessOrEqual", b.unsqueeze(position, 1), query),
        b.unsqueeze(b.op("Less", position, capacity), 1),
    )  # [B, S, T]
    in_tail = b.op("Expand", b.unsqueeze(in_tail, 1), b.shape(batch, heads, length, longest))
    there = b.unsqueeze(b.op("GreaterOrEqual", named, b.constant([0])), 2)  # [B, Hi, 1, I]
    there = b.op("Expand", there, b.shape(batch, heads, length, b.size(named, 2)))
    visible = b.op("Concat", there, in_tail, axis=3)  # [B, Hi, S, N]
    real = b.op("Less", row, b.unsqueeze(b.long("new_lens"), 1))
    sees = b.unsqueeze(real, 1, 3)
    visible = b.unsqueeze(visible, 2)
    return attend(b, "q", k, v, visible, sees, b.attribute("scale")) + caches


RETRIEVAL_ATTENTION = OnnxOp(
    "RetrievalAttention",
    DOC_WRITE + "Query i of q [B, Hq, S, D], if i < new_lens[b], attends the positions index[b, h] "
    "(index [B, 1 or Hkv, I]; negative: absent; all below tail_start[b]) and tail_start[b] .. "
    "cache_lens[b] + i. out [B, S, Hq, D]; rows i >= new_lens[b] are zero.",
    (*INPUTS, Port("index", "I"), Port("tail_start", "I")),
    (Port("out", "T"), *CACHES),
    {"scale": "float"},
    _body,
)
