"""Bodies of the ops of the domain ``sparsevila``, on stock onnxruntime, against the references."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from sparsevila_compile.kernels.add_rms_norm.reference import add_rms_norm
from sparsevila_compile.kernels.attention.onnx import BLOCK
from sparsevila_compile.kernels.attention.reference import reference_lse as attention_lse
from sparsevila_compile.kernels.cached_attention.reference import reference_lse as cached_lse
from sparsevila_compile.kernels.column_reduce.reference import column_reduce
from sparsevila_compile.kernels.onnx_support import (
    CONTRIB,
    CONTRIB_VERSION,
    DOMAIN,
    DOMAIN_VERSION,
    IR_VERSION,
    OPSET,
)
from sparsevila_compile.kernels.retrieval_attention.reference import reference as retrieval
from sparsevila_compile.kernels.rotary.reference import rotary
from sparsevila_compile.kernels.select_tokens.reference import select_tokens
from sparsevila_compile.kernels.silu_mul.reference import silu_mul
from sparsevila_compile.kernels.w8a8_linear.reference import w8a8_linear
from sparsevila_compile.kernels.w8a8_linear.rounding import quantize_rows
from sparsevila_compile.onnx.canonical import ONNX_OPS
from sparsevila_compile.onnx.export import register_schemas
from sparsevila_compile.onnx.graph_writer import ONNX_TYPES
from tests.kernels.compare import assert_catches_broken, assert_close_to
from tests.onnx.graphs import read_on_both_sides, run_strictly
from tests.onnx.stock import session

BOUND = 5e-6
"""float32 sums in another order."""

OPS = {op.name: op for op in ONNX_OPS}


def model_of(
    name: str,
    inputs: dict[str, torch.Tensor | None],
    attributes: dict[str, Any],
    fused: bool = False,
) -> onnx.ModelProto:
    """One node of that op; sizes are symbolic, so nothing can be folded for these shapes."""
    op = OPS[name]
    given = [p.name if inputs.get(p.name) is not None else "" for p in op.inputs]
    assert set(inputs) <= {p.name for p in op.inputs}
    node, function = op.node(given, [p.name for p in op.outputs], attributes, fused)
    infos = [
        helper.make_tensor_value_info(k, ONNX_TYPES[t.dtype], [None] * t.dim())
        for k, t in inputs.items()
        if t is not None
    ]
    kinds = {"F": torch.float32, "L": torch.int64, "T": _type_of(op, inputs)}
    rank = next(t.dim() for t in inputs.values() if t is not None)  # of most outputs too
    ranks = {"lse": 3, "out": {"ColumnReduce": 3, "SelectTokens": 1}.get(name, rank)}
    outs = [
        helper.make_tensor_value_info(
            p.name, ONNX_TYPES[kinds[p.kind]], [None] * ranks.get(p.name, rank)
        )
        for p in op.outputs
    ]
    graph = helper.make_graph([node], name, infos, outs)
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, CONTRIB: CONTRIB_VERSION}
    assert any(o.domain == CONTRIB for o in function.opset_import) == fused
    return helper.make_model(
        graph,
        functions=[function],
        opset_imports=[helper.make_opsetid(d, v) for d, v in versions.items()],
        ir_version=IR_VERSION,
    )


def _type_of(op: Any, inputs: dict[str, torch.Tensor | None]) -> torch.dtype:
    held = next(inputs[p.name] for p in op.inputs if p.kind == "T")
    assert held is not None
    return held.dtype


def run(
    name: str, inputs: dict[str, torch.Tensor | None], fused: bool = False, **attributes: Any
) -> list[torch.Tensor]:
    model = model_of(name, inputs, attributes, fused)
    register_schemas()
    onnx.checker.check_model(model, full_check=not fused)  # it has no schemas of ONNX Runtime's ops
    feeds = {k: t.contiguous().numpy() for k, t in inputs.items() if t is not None}
    found = session(model).run(None, feeds)
    assert read_on_both_sides(model) == []
    if not fused:
        for mine, strict in zip(found, run_strictly(model, feeds), strict=True):
            bound = 1e-3 if mine.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(strict, mine, rtol=bound, atol=bound)
    return [torch.from_numpy(np.array(a)) for a in found]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_every_op_has_a_schema_that_can_be_registered() -> None:
    register_schemas()
    for op in ONNX_OPS:
        schema = onnx.defs.get_schema(op.name, DOMAIN_VERSION, DOMAIN)
        assert schema.since_version == DOMAIN_VERSION
        assert schema.doc == op.doc
        assert set(schema.attributes) == set(op.attributes)
        assert [i.name for i in schema.inputs] == [p.name for p in op.inputs]


def test_other_exporters_work_after_the_schemas_are_registered() -> None:
    """onnx's reference evaluator, which they import, refuses a name that two domains have."""
    code = "from sparsevila_compile.onnx.export import register_schemas; register_schemas()"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport onnx.reference"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_a_node_of_other_inputs_or_attributes_is_refused() -> None:
    model = model_of("SiluMul", {"gate": normal(2, 4), "up": normal(2, 4)}, {})
    model.graph.node[0].attribute.append(helper.make_attribute("scale", 1.0))
    register_schemas()
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute"):
        onnx.checker.check_model(model)
    with pytest.raises(ValueError, match="has attributes"):
        model_of("Rotary", {}, {})
    with pytest.raises(ValueError, match=r"SiluMul has no body with ops of com\.microsoft"):
        model_of("SiluMul", {"gate": normal(2, 4), "up": normal(2, 4)}, {}, fused=True)


# ------------------------------------------------------------------ attention

ATTENTION_CASES: dict[str, tuple[int, int, int, torch.Tensor | None, bool, int]] = {
    # batch, query heads, KV heads, cu_seqlens, causal, window
    "plain": (2, 4, 4, None, False, 0),
    "grouped": (2, 6, 2, None, False, 0),
    "causal": (2, 4, 2, None, True, 0),
    "window": (1, 4, 2, None, True, 5),
    "packed": (1, 4, 2, ints(0, 3, 11, 19), False, 0),
    "packed, rows outside, empty": (1, 4, 2, ints(2, 7, 7, 15, dtype=torch.int64), False, 0),
    "packed causal": (1, 2, 2, ints(0, 9, 19), True, 4),
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case: str) -> None:
    batch, heads, kv_heads, cu_seqlens, causal, window = ATTENTION_CASES[case]
    q, k, v = (normal(batch, h, 19, 8, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    ref, ref_lse = attention_lse(q, k, v, cu_seqlens, 0.7, causal, window)
    inputs = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    attributes = {"scale": 0.7, "causal": int(causal), "window": window}
    out, lse = run("AttentionLse", inputs, **attributes)
    outside = cu_seqlens is not None and "outside" in case
    if outside:
        assert_close_to(out, ref, BOUND, case)
    else:
        assert_catches_broken(out, ref, BOUND)
    assert_close_to(lse, ref_lse, BOUND, case, rows=False)
    assert torch.equal(run("Attention", inputs, **attributes)[0], out)


def test_attention_in_several_blocks() -> None:
    q, k, v = (normal(2, h, 2 * BLOCK + 20, 8, seed=i) for i, h in enumerate((4, 2, 2)))
    ref, ref_lse = attention_lse(q, k, v, None, 0.7, False, 0)
    out, lse = run("AttentionLse", {"q": q, "k": k, "v": v}, scale=0.7, causal=0, window=0)
    assert_catches_broken(out, ref, BOUND)
    assert_close_to(lse, ref_lse, BOUND, "lse")


@pytest.mark.parametrize("window", [0, 40])
def test_cached_attention_in_several_blocks(window: int) -> None:
    """Rows that end in different blocks; one whose last tokens do not fit."""
    length = 2 * BLOCK + 20
    lens, new = ints(0, 30, 60, 7), ints(length, BLOCK + 3, length, 0)
    _cached(length, window, 2, length + 31, lens, new)


def test_packed_attention_in_several_blocks() -> None:
    """Segments within a block, over several, over a block's end, and rows outside all of them."""
    cu_seqlens = ints(3, 40, 40, 300, 301, 600)
    q, k, v = (normal(1, h, 610, 8, seed=i) for i, h in enumerate((4, 2, 2)))
    assert 2 * BLOCK < 610
    ref, ref_lse = attention_lse(q, k, v, cu_seqlens, 0.7, False, 0)
    inputs = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    out, lse = run("AttentionLse", inputs, scale=0.7, causal=0, window=0)
    assert ref[0, :3].abs().sum() == ref[0, 600:].abs().sum() == 0
    assert_close_to(out, ref, BOUND, "out")
    assert_close_to(lse, ref_lse, BOUND, "lse")
    assert_catches_broken(out[:, 3:600], ref[:, 3:600], BOUND)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_attention(length: int, window: int, kv_heads: int) -> None:
    _cached(length, window, kv_heads, 13, ints(0, 5, 2, 9), ints(length, max(1, length - 3), 0, 1))


@pytest.mark.parametrize("window", [0, 2])
def test_cached_attention_drops_what_does_not_fit(window: int) -> None:
    """Rows whose padding, whose tokens, and whose every token would land behind the cache."""
    _cached(4, window, 2, 9, ints(7, 7, 9, 5, 11), ints(1, 4, 3, 4, 2))


def _cached(
    length: int, window: int, kv_heads: int, capacity: int, lens: torch.Tensor, new: torch.Tensor
) -> None:
    batch, heads = len(lens), 4
    q = normal(batch, heads, length, 8)
    k, v = (normal(batch, kv_heads, length, 8, seed=s) for s in (1, 2))
    caches = [normal(batch, kv_heads, capacity, 8, seed=s) for s in (3, 4)]
    names = ("q", "k", "v", "k_cache", "v_cache", "cache_lens", "new_lens")
    inputs = dict(zip(names, (q, k, v, *(c.clone() for c in caches), lens, new), strict=True))
    fixed = {"num_heads": heads, "kv_num_heads": kv_heads, "head_size": 8}
    attributes = {"scale": 0.6, "window": window, "windowed": int(window > 0), **fixed}
    out, lse, *found = run("CachedAttentionLse", inputs, **attributes)
    plain, *again = run("CachedAttention", inputs, **attributes)
    ref, ref_lse = cached_lse(q, k, v, *caches, lens, new, 0.6, window)
    assert_close_to(out, ref, BOUND, "out")
    assert_close_to(lse, ref_lse, BOUND, "lse", rows=False)
    assert_close_to(
        plain, ref, BOUND, "without sums"
    )  # a decode step has a branch of its own there
    assert ref[new == 0].abs().sum() == 0
    for got, also, cache in zip(found, again, caches, strict=True):
        assert got.shape == cache.shape
        for b, held in enumerate((lens + new).clamp(max=capacity).tolist()):
            assert torch.equal(got[b, :, :held], cache[b, :, :held])
        assert torch.equal(got, also)
    if length > 1 and capacity > 9:
        assert_catches_broken(out[:2, :4], ref[:2, :4], BOUND)


STEPS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    # lengths of the rows in a cache of 9, and how many of their one token are real
    "ragged": (ints(0, 5, 2, 8), ints(1, 1, 1, 1)),
    "a row pauses": (ints(0, 5, 2, 8), ints(1, 0, 1, 1)),
    "a row is full": (ints(0, 5, 9, 8), ints(1, 1, 1, 1)),
}


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("case", STEPS)
def test_a_decode_step(case: str, window: int) -> None:
    _cached(1, window, 2, 9, *STEPS[case])


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("case", STEPS)
def test_cached_attention_in_half_precision_by_grouped_query_attention(
    case: str, length: int
) -> None:
    """A plain decode step is one op of ONNX Runtime; paused and full rows go the other way."""
    lens, new = STEPS[case]
    q = normal(4, 4, length, 16).half()
    k, v = (normal(4, 2, length, 16, seed=s).half() for s in (1, 2))
    caches = [normal(4, 2, 9, 16, seed=s).half() for s in (3, 4)]
    names = ("q", "k", "v", "k_cache", "v_cache", "cache_lens", "new_lens")
    inputs = dict(zip(names, (q, k, v, *(c.clone() for c in caches), lens, new), strict=True))
    attributes = {"scale": 0.3, "window": 0, "windowed": 0}
    fixed = {"num_heads": 4, "kv_num_heads": 2, "head_size": 16}
    out, *found = run("CachedAttention", inputs, fused=True, **attributes, **fixed)
    wide = [x.float() for x in (q, k, v, *caches)]
    ref, _ = cached_lse(*wide, lens, new, 0.3, 0)
    assert_close_to(out.float(), ref, 2e-3, case)
    assert_catches_broken(out[:1, :1].float(), ref[:1, :1], 2e-3)
    for got, cache in zip(found, wide[3:], strict=True):
        for b, held in enumerate((lens + new).clamp(max=9).tolist()):
            assert torch.equal(got[b, :, :held].float(), cache[b, :, :held])


def test_a_decode_step_writes_caches_in_place() -> None:
    """Outputs bound to the memory of the inputs: what is not written stays as it is, NaN included."""
    lens, new = STEPS["ragged"]
    for fused, dtype in ((False, torch.float32), (True, torch.float16)):
        q, k, v = (normal(4, h, 1, 16, seed=h).to(dtype) for h in (4, 2, 2))
        caches = [normal(4, 2, 9, 16, seed=s).to(dtype).numpy() for s in (3, 4)]
        inputs = {"q": q, "k": k, "v": v, "cache_lens": lens, "new_lens": new}
        inputs |= {
            n: torch.from_numpy(c) for n, c in zip(("k_cache", "v_cache"), caches, strict=True)
        }
        before = [c.copy() for c in caches]
        fixed = {"num_heads": 4, "kv_num_heads": 2, "head_size": 16}
        attributes = {"scale": 0.3, "window": 0, "windowed": 0, **fixed}
        opened = session(model_of("CachedAttention", inputs, attributes, fused))
        binding = opened.io_binding()
        for name in ("q", "k", "v", "cache_lens", "new_lens"):
            binding.bind_cpu_input(name, inputs[name].numpy())
        binding.bind_output("out")
        for name, held in zip(("k_cache", "v_cache"), caches, strict=True):
            where = ("cpu", 0, held.dtype, held.shape, held.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(f"{name}_out", *where)
        opened.run_with_iobinding(binding)
        for held, was, token in zip(caches, before, (k, v), strict=True):
            for b, place in enumerate(lens.tolist()):
                assert (held[b, :, place] == token[b, :, 0].numpy()).all()
                held[b, :, place] = was[b, :, place]
            assert (held == was).all()


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kv_heads, index_heads", [(1, 1), (2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_retrieval_attention(
    length: int, kv_heads: int, index_heads: int, dtype: torch.dtype
) -> None:
    batch, heads, capacity = 3, 4, 21
    q = normal(batch, heads, length, 8)
    k, v = (normal(batch, kv_heads, length, 8, seed=s) for s in (1, 2))
    caches = [normal(batch, kv_heads, capacity, 8, seed=s) for s in (3, 4)]
    lens, new, tail = ints(15, 11, 6), ints(length, 1, 0), ints(12, 11, 0)
    index = torch.full((batch, index_heads, 6), -1, dtype=dtype)
    for h in range(index_heads):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(h))
        index[0, h] = order[:6]
        index[1, h, :4] = order[order < 11][:4]
    given = (q, k, v, *(c.clone() for c in caches), lens, new, index, tail)
    names = ("q", "k", "v", "k_cache", "v_cache", "cache_lens", "new_lens", "index", "tail_start")
    inputs = dict(zip(names, given, strict=True))
    fixed = {"num_heads": heads, "kv_num_heads": kv_heads, "head_size": 8}
    attributes = {"scale": 0.6, "per_head": int(index_heads > 1), **fixed}
    out, *found = run("RetrievalAttention", inputs, **attributes)
    ref = retrieval(q, k, v, *caches, lens, new, index, tail, 0.6)
    assert_close_to(out, ref, BOUND, "out")
    assert_catches_broken(out[:1], ref[:1], BOUND)
    for got, cache in zip(found, caches, strict=True):
        for b, held in enumerate((lens + new).tolist()):
            assert torch.equal(got[b, :, :held], cache[b, :, :held])
    empty = {**inputs, "index": index[:, :, :0]}
    none = run("RetrievalAttention", empty, **attributes)[0]
    ref = retrieval(q, k, v, *caches, lens, new, index[:, :, :0], tail, 0.6)
    assert_close_to(none, ref, BOUND, "nothing named")


# -------------------------------------------------------------- column_reduce

ROWS, KEYS = 9, 17


def _reduce_arguments(case: set[str]) -> dict[str, torch.Tensor | None]:
    batch = 1 if "packed" in case else 2
    rows = KEYS if "packed" in case else ROWS
    q, k = normal(batch, 4, rows, 8), normal(batch, 2, KEYS, 8, seed=1)
    found: dict[str, torch.Tensor | None] = {"q": q, "k": k}
    if "weights" in case:
        weights = normal(batch, rows, seed=2).abs()
        weights[:, ::2] = 0
        weights[0, 4] = 0.5
        found["row_weights"] = weights
    if "packed" in case:
        found["cu_seqlens"] = ints(0, 4, 4, 11, 17)
    if "causal" in case:
        found["q_start"] = ints(3, 8)[:batch]
    if "k_lens" in case:
        found["k_lens"] = ints(13, 17)[:batch]
    if "columns" in case:
        found["columns"] = ints(3, 0, -1, 16, 5, 5, 2, 9, -1, 1).view(2, 5)[:batch]
    return found


CASES = [
    set(),
    {"weights"},
    {"packed"},
    {"packed", "weights"},
    {"causal", "weights", "columns"},
    {"causal", "k_lens"},
    {"k_lens", "columns"},
]


@pytest.mark.parametrize("heads", ["mean", "kv", "none"])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "+".join(sorted(c)) or "plain")
def test_column_reduce(case: set[str], with_lse: bool, heads: str) -> None:
    inputs = _reduce_arguments(case)
    causal = "causal" in case
    names = ("q", "k", "row_weights", "cu_seqlens", "q_start", "k_lens", "columns", "row_lse")
    if with_lse:
        inputs["row_lse"] = _lse(inputs, causal)
    arguments = [inputs.get(n) for n in names]
    ref = column_reduce(*arguments, 0.8, causal, heads)  # type: ignore[arg-type]
    (out,) = run("ColumnReduce", inputs, scale=0.8, causal=int(causal), heads=heads)
    assert_close_to(out, ref, BOUND, str(case))
    assert ref.max() > 0.02
    if "columns" not in case:
        assert_catches_broken(out[:, :, :13], ref[:, :, :13], BOUND)


@pytest.mark.parametrize("with_lse", [False, True])
def test_column_reduce_in_several_blocks(with_lse: bool) -> None:
    rows = 2 * BLOCK + 30
    cu_seqlens = ints(0, 40, 40, 200, 201, rows - 5)
    q, k = normal(1, 4, rows, 8), normal(1, 2, rows, 8, seed=1)
    lse = attention_lse(q, k, k, cu_seqlens, 0.8, False, 0)[1] if with_lse else None
    inputs = {"q": q, "k": k, "cu_seqlens": cu_seqlens, "row_lse": lse}
    (out,) = run("ColumnReduce", inputs, scale=0.8, causal=0, heads="kv")
    ref = column_reduce(q, k, None, cu_seqlens, None, None, None, lse, 0.8, False, "kv")
    assert_catches_broken(out, ref, BOUND)
    for first, end in ((0, 40), (40, 200), (201, rows - 5)):
        assert ref[0, :, first:end].sum(1).tolist() == pytest.approx([1, 1], rel=1e-4)


def _lse(inputs: dict[str, Any], causal: bool) -> torch.Tensor:
    """By definition, one row at a time."""
    q, k = inputs["q"], inputs["k"]
    rows, keys = q.shape[2], k.shape[2]
    lse = torch.empty(q.shape[:3])
    for b in range(q.shape[0]):
        for i in range(rows):
            first, end = 0, keys
            if (bounds := inputs.get("cu_seqlens")) is not None:
                s = max(j for j in range(len(bounds) - 1) if bounds[j] <= i)
                first, end = int(bounds[s]), int(bounds[s + 1])
            if inputs.get("k_lens") is not None:
                end = min(end, int(inputs["k_lens"][b]))
            if causal:
                end = min(end, int(inputs["q_start"][b]) + i + 1)
            for h in range(q.shape[1]):
                scores = 0.8 * k[b, h // 2, first:end] @ q[b, h, i]
                lse[b, h, i] = scores.logsumexp(0)
    return lse


def test_column_reduce_never_reads_unused_rows() -> None:
    inputs = _reduce_arguments({"weights", "columns"})
    inputs["row_lse"] = _lse(inputs, False)
    clean = run("ColumnReduce", inputs, scale=0.8, causal=0, heads="mean")[0]
    assert clean.max() > 0.02
    for name in ("q", "row_lse"):
        dirty = inputs[name].clone()  # type: ignore[union-attr]
        unused = inputs["row_weights"] == 0
        assert unused.any()
        dirty.movedim(1, -1 if name == "row_lse" else 2)[unused] = float("nan")
        got = run("ColumnReduce", {**inputs, name: dirty}, scale=0.8, causal=0, heads="mean")[0]
        assert torch.equal(got, clean), name
    nothing = {**inputs, "row_weights": torch.zeros(2, ROWS)}
    assert run("ColumnReduce", nothing, scale=0.8, causal=0, heads="mean")[0].abs().sum() == 0


# -------------------------------------------------------------- select_tokens


def _select(
    scores: torch.Tensor, segments: list[tuple[int, int, int, int]], total: int
) -> torch.Tensor:
    columns = [torch.tensor(c, dtype=torch.int64) for c in zip(*segments, strict=True)]
    names = ("starts", "lengths", "keep", "offsets")
    inputs: dict[str, torch.Tensor | None] = dict(zip(names, columns, strict=True))
    out = run("SelectTokens", {"scores": scores, **inputs, "total": torch.tensor([total])})[0]
    ref = select_tokens(scores, *columns, total)
    assert out.tolist() == ref.tolist()
    return out


def test_select_tokens() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([1.0, 3, 3, -inf, nan, 2, 0.0, -0.0, 5, 5, 5, nan, nan, -1, inf])
    assert _select(scores, [(0, 8, 3, 0)], 3).tolist() == [1, 2, 5]
    # NaN is behind -inf; equal scores by index; ragged, empty, apart, overlapping
    segments = [(0, 6, 6, 0), (8, 0, 0, 6), (6, 2, 1, 6), (8, 7, 4, 9), (2, 4, 3, 14)]
    assert _select(scores, segments, 19).tolist()[6:9] == [6, -1, -1]
    assert _select(scores, [(2, 3, 2, 1)], 5).tolist() == [-1, 2, 3, -1, -1]
    assert _select(scores, [(0, 3, 0, 0), (3, 2, 0, 0)], 2).tolist() == [-1, -1]
    assert _select(scores[:0], [(0, 0, 0, 0)], 0).tolist() == []


def test_select_tokens_of_many_equal_scores() -> None:
    g = torch.Generator().manual_seed(5)
    scores = torch.randint(0, 9, (4000,), generator=g).float()
    lengths = [1000, 777, 0, 1500, 723]
    segments, start, offset = [], 0, 0
    for n in lengths:
        segments.append((start, n, n // 3, offset))
        start, offset = start + n, offset + n // 3
    out = _select(scores, segments, offset)
    assert (out >= 0).all()


def test_select_tokens_of_special_scores() -> None:
    """The least number, -inf and NaN are three ranks; rows of more and less than CUDA's 256."""
    g = torch.Generator().manual_seed(7)
    least = torch.finfo(torch.float32).min
    kinds = torch.tensor([least, -torch.inf, torch.nan, torch.inf, 0.0, -0.0, -1.0])
    for weights in ([1.0] * 7, [5.0, 5, 5, 0, 0, 0, 0.01], [0.0, 1, 1, 0, 0, 0, 0]):
        drawn = torch.multinomial(torch.tensor(weights), 700, replacement=True, generator=g)
        segments, start, offset = [], 0, 0
        for n, keep in ((300, 170), (40, 0), (300, 300), (0, 0), (59, 58), (1, 1)):
            segments.append((start, n, keep, offset))
            start, offset = start + n, offset + keep
        assert start == len(drawn)
        assert (_select(kinds[drawn], segments, offset) >= 0).all()


def test_select_tokens_of_no_segments() -> None:
    none = torch.empty(0, dtype=torch.int64)
    inputs = dict.fromkeys(("starts", "lengths", "keep", "offsets"), none)
    given = {"scores": normal(3), **inputs, "total": torch.tensor([2])}
    assert run("SelectTokens", given)[0].tolist() == [-1, -1]


# ------------------------------------------------------- elementwise, linears


def test_rotary() -> None:
    q, k = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=1)
    angles = normal(2, 5, 8, seed=2)
    inputs: dict[str, torch.Tensor | None] = {
        "q": q,
        "k": k,
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    fixed = {"num_heads": 4, "kv_num_heads": 2}
    for out, ref in zip(
        run("Rotary", inputs, same_type=1, **fixed),
        rotary(q, k, angles.cos(), angles.sin()),
        strict=True,
    ):
        assert_catches_broken(out, ref, BOUND)
    half = angles[..., :4].repeat(1, 1, 2)
    alike = {**inputs, "cos": half.cos(), "sin": half.sin()}
    for out, ref in zip(
        run("Rotary", alike, fused=True, same_type=1, **fixed),
        rotary(q, k, half.cos(), half.sin()),
        strict=True,
    ):
        assert_catches_broken(out, ref, BOUND)
    halves = run("Rotary", {**inputs, "q": q.half(), "k": k.half()}, same_type=0, **fixed)
    for out, ref in zip(
        halves, rotary(q.half(), k.half(), angles.cos(), angles.sin()), strict=True
    ):
        assert out.dtype == torch.float16
        assert_close_to(out, ref, 1e-3, "half")


def test_silu_mul() -> None:
    gate, up = normal(2, 3, 8) * 4, normal(2, 3, 8, seed=1)
    (out,) = run("SiluMul", {"gate": gate, "up": up})
    assert_catches_broken(out, silu_mul(gate, up), BOUND)


@pytest.mark.parametrize("with_residual, fused", [(False, False), (True, False), (True, True)])
def test_add_rms_norm(with_residual: bool, fused: bool) -> None:
    x, weight = normal(2, 3, 8), normal(8, seed=1)
    residual = normal(2, 3, 8, seed=2) if with_residual else None
    inputs = {"x": x, "residual": residual, "weight": weight}
    normed, total = run("AddRmsNorm", inputs, fused=fused, eps=1e-2)
    ref, ref_total = add_rms_norm(x, residual, weight, 1e-2)
    assert_catches_broken(normed, ref, BOUND)
    assert_close_to(total, ref_total if with_residual else x, BOUND, "total")


@pytest.mark.parametrize("width", [16, 21])
@pytest.mark.parametrize("with_bias", [False, True])
def test_w8a8_linear(width: int, with_bias: bool) -> None:
    x, dense = normal(2, 5, width), normal(7, width, seed=1)
    x[0, 1] = 0
    weight, scales = quantize_rows(dense, torch.int8)
    weight[:, width:] = 77  # what is stored behind the last channel is not used
    bias = normal(7, seed=2) if with_bias else None
    inputs = {"x": x, "weight": weight.t(), "scales": scales, "bias": bias}
    (out,) = run("W8A8Linear", inputs)
    ref = w8a8_linear(x, weight, scales, bias)
    if with_bias:
        assert_catches_broken(out, ref, BOUND)
    assert_close_to(out, ref, BOUND, "w8a8")
    x[1, 2, 3], x[1, 3, 0] = float("nan"), float("inf")
    (out,) = run("W8A8Linear", {**inputs, "x": x})
    expected = w8a8_linear(x, weight, scales, bias)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected.isnan().any(-1).sum() == 2
