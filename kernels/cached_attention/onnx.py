"""ONNX form of ``cached_attention`` and ``cached_attention_lse``, and of the write to the cache.

An ONNX op changes no input: the caches come out again, of the same shape. A runtime that gives an
output the buffer of its input (onnxruntime's I/O binding) writes the new tokens in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..attention.onnx import BLOCK, Sizes, attend, bias_of, blocks_of, joined
from ..onnx_support import STEP, Body, OnnxOp, Port

SIZES = (Port("length", "L", optional=True), Port("capacity", "L", optional=True))
"""S and L as int64 [1]. Given where several layers have them in common: their index arithmetic then
has the same inputs in all, and a runtime does it once."""

CACHES = (Port("k_cache_out", "T"), Port("v_cache_out", "T"))


HEADS = {"num_heads": "int", "kv_num_heads": "int", "head_size": "int"}
"""Attributes Hq, Hkv and D."""


def sizes_of(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[Sizes, str]:
    """The attention's sizes, and L."""
    length = "length" if "length" in given else b.size("q", 2)
    capacity = "capacity" if "capacity" in given else b.size("k_cache", 2)
    heads = (chosen[name] for name in HEADS)
    return Sizes(b.size("cache_lens", 0), length, *heads), capacity


def append(
    b: Body, sizes: Sizes, capacity: str, news: tuple[str, str], caches: tuple[str, str]
) -> tuple[str, ...]:
    """The caches [B, Hkv, L, D] with the new keys and values [B, Hkv, S, D] at cache_lens and after.

    Padding tokens are written too, to positions that hold nothing. A token at or past L is dropped:
    it is replaced by what position L - 1 holds afterwards, and written there once more.
    """
    count = sizes.rows
    last = b.op("Sub", capacity, b.constant([1]))
    start = b.unsqueeze(b.long("cache_lens"), 1)  # [B, 1]
    room = b.op("Sub", last, start)  # [B, 1], index of the last token that fits; negative: none
    source = b.op("Min", b.unsqueeze(b.range(count), 0), b.op("Max", room, b.constant([0])))
    position = b.op("Min", b.op("Add", start, source), last)  # [B, S]
    whole = b.shape(sizes.batch, sizes.kv_heads, count)
    row = b.unsqueeze(b.range(sizes.batch), 1, 2)
    head = b.unsqueeze(b.range(b.shape(sizes.kv_heads)), 0, 2)
    fits = b.unsqueeze(b.op("GreaterOrEqual", room, b.constant([0])), 2, 3)

    def places(at: str) -> str:
        parts = (b.op("Expand", x, whole) for x in (row, head, b.unsqueeze(at, 1)))
        return b.op("Concat", *(b.unsqueeze(x, 3) for x in parts), axis=3)

    sources, positions = places(source), places(position)

    def written(new: str, cache: str) -> str:
        held = b.slice(cache, 2, -1, 2**62)
        tokens = b.op("Where", fits, b.op("GatherND", new, sources), held)
        return b.op("ScatterND", cache, positions, tokens)

    return tuple(written(new, cache) for new, cache in zip(news, caches, strict=True))


def _body(
    b: Body, given: frozenset[str], chosen: dict[str, Any], lse: bool = False
) -> tuple[str, ...]:
    sizes, capacity = sizes_of(b, given, chosen)
    caches = append(b, sizes, capacity, ("k", "v"), ("k_cache", "v_cache"))
    row = b.range(sizes.rows)
    start = b.unsqueeze(b.long("cache_lens"), 1)
    query = b.op("Add", start, row)  # [B, S]
    key = b.range(capacity)
    visible = b.op("LessOrEqual", key, b.unsqueeze(query, 2))  # [B, S, L]
    real = b.op("Less", row, b.unsqueeze(b.long("new_lens"), 1))  # [B, S]
    if chosen["windowed"]:
        first = b.op("Sub", query, b.attribute("window", "value_int"))
        visible = b.op("And", visible, b.op("Greater", key, b.unsqueeze(first, 2)))
        # A full cache may have nothing left within the window.
        last = b.op("Sub", capacity, b.constant([1]))
        real = b.op("And", real, b.op("Less", first, last))
    sees = b.unsqueeze(real, 1, 3)
    bias, scale = bias_of(b, b.unsqueeze(visible, 1, 2)), b.attribute("scale")
    k, v = caches
    few, many = Body(prefix="few_"), Body(prefix="many_")
    names = ["attended", "sums"][: 1 + lse]
    few.call(attend(few, sizes, scale, "q", k, v, bias, sees, lse), names)
    many.call(_in_blocks(many, sizes, scale, k, v, bias, sees, capacity, lse), names)
    short = b.op("LessOrEqual", sizes.rows, b.constant([BLOCK]))
    return (*b.either(b.op("Squeeze", short, b.constant([0])), few, many, names), *caches)


def _in_blocks(
    b: Body,
    sizes: Sizes,
    scale: str,
    k: str,
    v: str,
    bias: str,
    sees: str,
    capacity: str,
    lse: bool,
) -> tuple[str, ...]:
    """BLOCK queries at a time, each with the keys up to its last: no row sees any behind."""
    count, block = blocks_of(b, sizes.rows)
    last = b.op("Sub", sizes.rows, b.constant([1]))
    furthest = b.op("ReduceMax", b.long("cache_lens"), b.constant([0]), keepdims=1)
    c = Body(prefix="block_")
    begin = c.op("Mul", block, STEP)
    # The last block is filled up with the last row: results of all blocks have one shape.
    rows = c.op("Min", c.op("Add", c.range(block), begin), last)
    end = c.op("Add", c.op("Add", furthest, begin), block)
    end = c.op("Min", end, capacity)
    part = c.slice(c.op("Gather", bias, rows, axis=3), 4, 0, end)
    made = attend(
        c,
        replace(sizes, rows=block),
        scale,
        c.op("Gather", "q", rows, axis=2),
        c.slice(k, 2, 0, end),
        c.slice(v, 2, 0, end),
        part,
        c.op("Gather", sees, rows, axis=2),
        lse,
    )
    return joined(b, sizes, b.loop(count, c, made))


def _with_lse(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[str, ...]:
    return _body(b, given, chosen, lse=True)


INPUTS = (
    *(Port(name, "T") for name in ("q", "k", "v", "k_cache", "v_cache")),
    Port("cache_lens", "I"),
    Port("new_lens", "I"),
)
_ATTRIBUTES = {"scale": "float", "window": "int", "windowed": "int", **HEADS}
DOC_WRITE = (
    "Token i of k and v [B, Hkv, S, D] is written to position cache_lens[b] + i of the caches "
    "[B, Hkv, L, D], whose values must be finite everywhere; those at or past L are dropped. "
    "Positions from cache_lens[b] + new_lens[b] on hold nothing. length and capacity are S and L, "
    "int64 [1], given where layers share them. num_heads, kv_num_heads and head_size are Hq, Hkv and D. "
)
_DOC = DOC_WRITE + (
    "Query i of q [B, Hq, S, D], if i < new_lens[b], attends the positions up to its own, "
    "p = cache_lens[b] + i, and with window > 0 (then windowed is 1) only those j with "
    "p - j < window. out [B, S, Hq, D]; rows i >= new_lens[b] are zero."
)

CACHED_ATTENTION = OnnxOp(
    "CachedAttention",
    _DOC,
    (*INPUTS, *SIZES),
    (Port("out", "T"), *CACHES),
    _ATTRIBUTES,
    _body,
    ("windowed", *HEADS),
)
CACHED_ATTENTION_LSE = OnnxOp(
    "CachedAttentionLse",
    _DOC + " lse [B, Hq, S] is the log-sum-exp of each row's scores, 0 where out is zero.",
    (*INPUTS, *SIZES),
    (Port("out", "T"), Port("lse", "F"), *CACHES),
    _ATTRIBUTES,
    _with_lse,
    ("windowed", *HEADS),
)
