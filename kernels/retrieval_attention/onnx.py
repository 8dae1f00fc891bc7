"""ONNX form of ``retrieval_attention``: rows of the cache are gathered, then attended densely.

The bytes read are those of the chosen positions, so a step gets cheaper as fewer are chosen.
"""

from __future__ import annotations

from typing import Any

from ..attention.onnx import attend, bias_of
from ..cached_attention.onnx import (
    CACHES,
    DOC_WRITE,
    HEADS,
    HELD,
    INPUTS,
    NEWS,
    SIZES,
    STEP_RESULTS,
    Append,
    attend_one,
    sizes_of,
    step_or_not,
)
from ..onnx_support import Body, OnnxOp, Port


def _body(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str, ...]:
    sizes, capacity = sizes_of(b, given, chosen)
    append = Append(b, sizes, capacity)
    length, groups = sizes.rows, sizes.kv_heads if chosen["per_head"] else 1
    row = b.range(length)
    start = b.unsqueeze(b.long("cache_lens"), 1)  # [B, 1]
    tail = b.unsqueeze(b.long("tail_start"), 1)
    # The longest tail of the batch: shorter ones see less of theirs.
    ends = b.op("Add", start, length)
    longest = b.op("ReduceMax", b.op("Sub", ends, tail), b.constant([0]), keepdims=0)
    longest = b.op("Max", b.op("Min", longest, capacity), b.constant([1]))
    position = b.op("Add", tail, b.range(longest))  # [B, T]

    # What differs between layers is kept short: the index, its bias, and the rows it names.
    named = b.long("index")  # [B, Hi, I]
    tails = b.op("Expand", b.unsqueeze(position, 1), b.shape(1, groups, 1))
    keys = b.op("Concat", named, tails, axis=2)  # [B, Hi, N]
    last = b.op("Sub", capacity, b.constant([1]))
    safe = b.op("Min", b.op("Max", keys, b.constant([0])), last)
    # One row of the cache seen as [B * Hkv * L, D] is one key of one head.
    heads = b.shape(sizes.kv_heads)
    head = b.op("Mul", b.unsqueeze(b.range(sizes.batch), 1, 2), heads)
    head = b.op("Add", head, b.unsqueeze(b.range(heads), 0, 2))
    rows = b.op("Add", b.op("Mul", head, capacity), safe)  # [B, Hkv, N]

    query = b.unsqueeze(b.op("Add", start, row), 2)  # [B, S, 1]
    in_tail = b.op(
        "And",
        b.op("LessOrEqual", b.unsqueeze(position, 1), query),
        b.unsqueeze(b.op("Less", position, capacity), 1),
    )  # [B, S, T]
    tail_bias = bias_of(b, b.unsqueeze(in_tail, 1))
    tail_bias = b.op("Expand", tail_bias, b.shape(1, groups, 1, 1))  # [B, Hi, S, T]
    named_bias = b.unsqueeze(bias_of(b, b.op("GreaterOrEqual", named, b.constant([0]))), 2)
    scale = b.attribute("scale")

    def gathered(c: Body, caches: tuple[str, str]) -> list[str]:
        return [c.op("Gather", c.reshape(x, -1, sizes.dim), rows) for x in caches]

    step, general = Body(prefix="step_"), Body(prefix="general_")
    caches = append.fitting(step, NEWS, HELD)
    k, v = gathered(step, caches)
    bias = step.op("Concat", named_bias, tail_bias, axis=3)
    step.call((attend_one(step, sizes, scale, k, v, bias), *caches), STEP_RESULTS)

    caches = append.all(general, NEWS, HELD)
    k, v = gathered(general, caches)
    wide = general.op("Expand", named_bias, general.shape(1, 1, length, 1))
    bias = general.op("Concat", wide, tail_bias, axis=3)  # [B, Hi, S, N]
    real = general.op("Less", row, general.unsqueeze(general.long("new_lens"), 1))
    sees = general.unsqueeze(real, 1, 3)
    made = attend(general, sizes, scale, "q", k, v, general.unsqueeze(bias, 2), sees)
    general.call((*made, *caches), STEP_RESULTS)
    return step_or_not(b, sizes, capacity, step, general)


RETRIEVAL_ATTENTION = OnnxOp(
    "RetrievalAttention",
    DOC_WRITE + "Query i of q [B, Hq, S, D], if i < new_lens[b], attends the positions index[b, h] "
    "(index [B, 1, I], or [B, Hkv, I] with per_head; negative: absent; all below tail_start[b]) and tail_start[b] .. "
    "cache_lens[b] + i. out [B, S, Hq, D]; rows i >= new_lens[b] are zero.",
    (*INPUTS, Port("index", "I"), Port("tail_start", "I"), *SIZES),
    (Port("out", "T"), *CACHES),
    {"scale": "float", "per_head": "int", **HEADS},
    _body,
    ("per_head", *HEADS),
)
