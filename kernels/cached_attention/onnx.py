"""ONNX form of ``cached_attention`` and ``cached_attention_lse``, and of the write to the cache.

An ONNX op changes no input: the caches come out again, of the same shape. A runtime that gives an
output the buffer of its input (onnxruntime's I/O binding) writes the new tokens in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onnx import TensorProto

from ..attention.onnx import BLOCK, Sizes, attend, bias_of, blocks_of, joined
from ..onnx_support import CONTRIB, FUSED, STEP, Body, OnnxOp, Port

SIZES = (Port("length", "L", optional=True), Port("capacity", "L", optional=True))
"""S and L as int64 [1]. Given where several layers have them in common: their index arithmetic then
has the same inputs in all, and a runtime does it once."""

CACHES = (Port("k_cache_out", "T"), Port("v_cache_out", "T"))


_INT32 = TensorProto.INT32

HEADS = {"num_heads": "int", "kv_num_heads": "int", "head_size": "int"}
"""Attributes Hq, Hkv and D."""


def sizes_of(b: Body, given: frozenset[str], chosen: dict[str, Any]) -> tuple[Sizes, str]:
    """The attention's sizes, and L."""
    length = "length" if "length" in given else b.size("q", 2)
    capacity = "capacity" if "capacity" in given else b.size("k_cache", 2)
    heads = (chosen[name] for name in HEADS)
    return Sizes(b.size("cache_lens", 0), length, *heads), capacity


class Append:
    """The write of new keys and values [B, Hkv, S, D] to caches [B, Hkv, L, D] at cache_lens and after.

    Padding tokens are written too, to positions that hold nothing. A token at or past L is dropped:
    it is replaced by what position L - 1 holds afterwards, and written there once more.
    """

    def __init__(self, b: Body, sizes: Sizes, capacity: str) -> None:
        count = sizes.rows
        last = b.op("Sub", capacity, b.constant([1]))
        start = b.unsqueeze(b.long("cache_lens"), 1)  # [B, 1]
        room = b.op("Sub", last, start)  # [B, 1], index of the last token that fits; negative: none
        source = b.op("Min", b.unsqueeze(b.range(count), 0), b.op("Max", room, b.constant([0])))
        position = b.op("Min", b.op("Add", start, source), last)  # [B, S]
        whole = b.shape(sizes.batch, sizes.kv_heads, count)
        row = b.unsqueeze(b.range(sizes.batch), 1, 2)
        head = b.unsqueeze(b.range(b.shape(sizes.kv_heads)), 0, 2)
        self._fits = b.unsqueeze(b.op("GreaterOrEqual", room, b.constant([0])), 2, 3)

        def places(at: str) -> str:
            parts = (b.op("Expand", x, whole) for x in (row, head, b.unsqueeze(at, 1)))
            return b.op("Concat", *(b.unsqueeze(x, 3) for x in parts), axis=3)

        self._sources, self._positions = places(source), places(position)

    def all(self, b: Body, news: tuple[str, str], caches: tuple[str, str]) -> tuple[str, str]:
        """The caches after the write, whatever fits."""

        def written(new: str, cache: str) -> str:
            held = b.slice(cache, 2, -1, 2**62)
            tokens = b.op("Where", self._fits, b.op("GatherND", new, self._sources), held)
            return b.op("ScatterND", cache, self._positions, tokens)

        return written(news[0], caches[0]), written(news[1], caches[1])

    def fitting(self, b: Body, news: tuple[str, str], caches: tuple[str, str]) -> tuple[str, str]:
        """The caches after the write, where every token fits."""
        k, v = (b.op("ScatterND", c, self._positions, n) for n, c in zip(news, caches, strict=True))
        return k, v


NEWS, HELD = ("k", "v"), ("k_cache", "v_cache")
STEP_RESULTS = ("attended", "k_kept", "v_kept")
"""Names within the branches for plain decode steps and for anything else."""


def is_step(b: Body, sizes: Sizes, capacity: str) -> str:
    """Whether this is a plain decode step, bool []: each row has one token, and room for it."""
    one = b.constant([1])
    latest = b.op("ReduceMax", b.long("cache_lens"), b.constant([0]), keepdims=1)
    fewest = b.op("ReduceMin", b.long("new_lens"), b.constant([0]), keepdims=1)
    single, fits = b.op("Equal", sizes.rows, one), b.op("Less", latest, capacity)
    real = b.op("GreaterOrEqual", fewest, one)
    return b.op("Squeeze", b.op("And", single, b.op("And", fits, real)), b.constant([0]))


def attend_one(b: Body, sizes: Sizes, scale: str, k: str, v: str, bias: str) -> str:
    """softmax(scale · q kᵀ + bias) v for one query a row, all of which see a key.

    q [B, Hq, 1, D]; k, v [B, Hkv, N, D]; bias float32, broadcastable to [B, Hkv, Hq/Hkv, N].
    Returns [B, 1, Hq, D]. As :func:`attend`, in fewer nodes: their number is what a step of a small
    model costs.
    """
    heads, kv_heads = sizes.heads, sizes.kv_heads
    grouped = b.op("Reshape", "q", b.constant([0, kv_heads, -1, sizes.dim]))
    scaled = b.op("Mul", grouped, b.op("CastLike", scale, grouped))
    scores = b.float(b.op("MatMul", scaled, b.op("Transpose", k, perm=[0, 1, 3, 2])))
    weights = b.op("Softmax", b.op("Add", scores, bias), axis=-1)
    out = b.op("MatMul", b.op("CastLike", weights, v), v)
    return b.op("Reshape", out, b.constant([0, 1, heads, sizes.dim]))


def step_or_not(b: Body, sizes: Sizes, capacity: str, step: Body, general: Body) -> tuple[str, ...]:
    """The values STEP_RESULTS, which both bodies write: those of ``step`` in a plain decode step."""
    return tuple(b.either(is_step(b, sizes, capacity), step, general, STEP_RESULTS))


def _body(
    b: Body, given: frozenset[str], chosen: dict[str, Any], lse: bool = False
) -> tuple[str, ...]:
    sizes, capacity = sizes_of(b, given, chosen)
    append = Append(b, sizes, capacity)
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
    bias, scale = bias_of(b, b.unsqueeze(visible, 1)), b.attribute("scale")  # [B, 1, S, L]
    grouped = b.unsqueeze(bias, 2)
    parts = ["some_rows", "sums"][: 1 + lse]

    def attended(c: Body, k: str, v: str) -> list[str]:
        """Of any number of queries."""
        few, many = Body(prefix="few_"), Body(prefix="many_")
        few.call(attend(few, sizes, scale, "q", k, v, grouped, sees, lse), parts)
        many.call(_in_blocks(many, sizes, scale, k, v, grouped, sees, capacity, lse), parts)
        short = c.op("LessOrEqual", sizes.rows, c.constant([BLOCK]))
        return c.either(c.op("Squeeze", short, c.constant([0])), few, many, parts)

    if lse:  # of prompts, not of decode steps
        caches = append.all(b, NEWS, HELD)
        return *attended(b, *caches), *caches
    step, general = Body(prefix="step_"), Body(prefix="general_")
    if chosen[FUSED]:
        made = _grouped_query(step, sizes, b.cast("cache_lens", _INT32), b.cast(capacity, _INT32))
    else:
        caches = append.fitting(step, NEWS, HELD)
        made = (attend_one(step, sizes, scale, *caches, bias), *caches)
    step.call(made, STEP_RESULTS)
    caches = append.all(general, NEWS, HELD)
    general.call((*attended(general, *caches), *caches), STEP_RESULTS)
    return step_or_not(b, sizes, capacity, step, general)


def _grouped_query(b: Body, sizes: Sizes, held: str, capacity: str) -> tuple[str, str, str]:
    """A plain decode step as ONNX Runtime's own op, which writes the new tokens itself.

    held int32 [B]: index of each row's last token; capacity int32 [1], for the longest it may be.
    """
    q, k, v = (
        b.op("Reshape", x, b.constant([0, 1, n * sizes.dim]))  # type: ignore[operator]
        for x, n in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads))
    )
    heads = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads}
    inputs = (q, k, v, *HELD, held, capacity)
    out, *caches = b.ops("GroupQueryAttention", 3, *inputs, domain=CONTRIB, **heads)
    b.refer("scale", "scale")
    return b.op("Reshape", out, b.constant([0, 1, sizes.heads, sizes.dim])), caches[0], caches[1]


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
    fusable=True,
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
