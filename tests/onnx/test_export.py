"""Exported components of the tiny models: checked by onnx, and run by stock onnxruntime beside torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.kernels.onnx_support import DOMAIN, OPSET
from sparsevila_compile.manager import run_passes
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.onnx.export import (
    ExportOptions,
    check_supported,
    emitted_as,
    export_component,
    packed_weights,
)
from sparsevila_compile.onnx.lowering import LowerToOnnx
from sparsevila_compile.onnx.weights import pack_pairs
from sparsevila_compile.ops import W4A8_LINEAR, W4A16_LINEAR
from sparsevila_compile.pass_base import Context
from sparsevila_compile.program import Program
from sparsevila_compile.trace import trace
from tests import tiny
from tests.kernels.compare import assert_close_to, relative_error
from tests.onnx.stock import Shadow, raw, saved, session
from tests.tiny import Image, Row, Video, words

BOUND = 5e-5
FUSE: tuple[tiny.Spec, ...] = (
    "merge_linears",
    "fuse_rms_norm",
    "fuse_rotary",
    "fuse_silu_mul",
    "trim_last_layer",
)
SPARSE: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.5}),
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.3, "when": "always"}),
)
BY_HEAD: tuple[tiny.Spec, ...] = (
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.3, "when": "always", "share": "kv_head"}),
)


def rounded(scheme: str, **options: Any) -> tiny.Spec:
    return ("quantize_linear", {"scheme": scheme, "method": "rtn", **options})


INT4 = rounded("w4a16", group_size=32)

MODELS: dict[str, tuple[str, tuple[tiny.Spec, ...], bool]] = {
    # the tiny model, its passes, and whether only ops of ai.onnx are used
    "llava sparse, fused": ("llava", SPARSE + FUSE, False),
    "llava sparse, fused, pure": ("llava", SPARSE + FUSE, True),
    "siglip": ("llava_siglip", SPARSE + FUSE, False),
    "tied, dense": ("llava_tied", tiny.DENSE, False),
    "windowed": ("llava_windowed", tiny.DENSE, False),
    "qwen sparse, fused": ("qwen", (*SPARSE, *FUSE, "conv_to_linear"), False),
    "qwen windowed by head": ("qwen_windowed", BY_HEAD, False),
    "int4": ("llava", (*SPARSE, INT4, *FUSE), False),
    "int4, pure": ("qwen", (*SPARSE, INT4), True),
    "w8a8": ("llava", (*SPARSE, rounded("w8a8"), *FUSE), False),
}


def shadowed(model: CompiledModel, folder: Path, pure: bool, chunk: int = 5120) -> Shadow:
    program = model.program
    options = ExportOptions(pure=pure)
    paths = {name: saved(program, name, options, folder) for name in program.components}
    for path in paths.values():
        onnx.checker.check_model(str(path), full_check=True)
        domains = {o.domain for o in onnx.load(path, load_external_data=False).opset_import}
        assert not pure or domains == {""}
    return Shadow(model.engine.runner, program, paths, BOUND, chunk)


def dialogue(name: str, ask: Callable[..., Any]) -> None:
    """Two turns of two rows of different lengths, pictures in both turns."""
    rows: list[Row] = [
        [*words(3), Image(1), *words(8, 1)],
        [*words(5, 2), Image(2, (6, 8)), Image(3), *words(2, 3)],
    ]
    if name == "qwen":
        rows[1] = [*rows[1], Video(4, (2, 4, 4)), *words(2, 8)]
    answers = ask(rows)
    ask([tiny.continued(r, a, Image(5), *words(4, 9)) for r, a in zip(rows, answers, strict=True)])


@pytest.mark.parametrize("case", MODELS)
def test_components_answer_as_torch(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, specs, pure = MODELS[case]
    model = tiny.compiled(name, *specs)
    shadow = shadowed(model, tmp_path, pure)
    monkeypatch.setattr(model.engine, "runner", shadow)
    dialogue(name, partial(_ask, model, name, model.conversation(2)))
    sparse = "decode" in model.program.components
    expected = {"embed", "vision", *(("turn", "retrieve", "decode") if sparse else ("language",))}
    assert set(shadow.calls) == expected
    assert shadow.calls["decode" if sparse else "language"] >= 6


def _ask(model: CompiledModel, name: str, conversation: Any, rows: list[Row]) -> list[list[int]]:
    prompt = tiny.inputs(name, rows)
    out = model.generate(conversation=conversation, **prompt, **tiny.greedy(4))
    return tiny.answers_of(prompt, out)


def test_prefill_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of six tokens: rows end in different ones, and questions span several."""
    name = "llava"
    monkeypatch.setattr("sparsevila_compile.engine._MIN_CHUNK", 1)
    model = tiny.compiled(name, *SPARSE, *FUSE)
    shadow = shadowed(model, tmp_path, False, chunk=12)
    monkeypatch.setattr(model.engine, "runner", shadow)
    dialogue(name, partial(_ask, model, name, model.conversation(2)))
    assert shadow.calls["language"] >= 3
    assert shadow.calls["turn"] >= 4


def test_the_shadow_sees_a_wrong_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on: one weight off by a thousandth is found."""
    model = tiny.compiled("llava", *SPARSE)
    shadow = shadowed(model, tmp_path, False)
    weights = dict(model.program.weights)
    name = next(n for n in weights if n.endswith("layers.1.self_attn.v_proj.weight"))
    weights[name] = weights[name] * 1.001
    other = model.program.snapshot()
    other.weights = weights
    shadow.sessions["turn"] = session(saved(other, "turn", ExportOptions(), tmp_path))
    monkeypatch.setattr(model.engine, "runner", shadow)
    with pytest.raises(AssertionError, match=r"turn: .* relative error"):
        dialogue("llava", partial(_ask, model, "llava", model.conversation(2)))


# --------------------------------------------------------------------- models


def test_models_name_what_they_hold() -> None:
    program = tiny.traced("llava")
    tiny.run(program, *SPARSE, INT4, *FUSE)
    model = export_component(program, "decode", ExportOptions())
    kinds = {(n.domain, n.op_type) for n in model.graph.node}
    assert ("com.microsoft", "MatMulNBits") in kinds
    assert {t for d, t in kinds if d == DOMAIN} == {
        "AddRmsNorm",
        "RetrievalAttention",
        "Rotary",
        "SiluMul",
    }
    assert {f.name for f in model.functions} == {t for d, t in kinds if d == DOMAIN}
    opsets = {o.domain: o.version for o in model.opset_import}
    assert opsets == {"": OPSET, DOMAIN: 1, "com.microsoft": 1}
    for node in program.component("decode").graph.nodes:
        if str(node.target).startswith("sparsevila."):
            domain, _, kind = emitted_as(node, ExportOptions()).partition("::")
            assert (domain, kind) in kinds
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in model.graph.input
    }
    assert shapes["inputs_embeds"] == ["batch", "length", 64]
    assert shapes["k_cache_1"] == shapes["v_cache_0"] == ["batch", 2, "capacity", 16]
    assert list(shapes) == list(program.component("decode").inputs)
    outputs = [o.name for o in model.graph.output]
    caches = [f"{kind}_cache_{i}_out" for i in (0, 1) for kind in "kv"]
    assert outputs == ["logits", *caches]


FUSING: tuple[tiny.Spec, ...] = ("insert_kv_cache", "fuse_rms_norm", "fuse_rotary")


def _fused(program: Program) -> tuple[onnx.ModelProto, set[str]]:
    run_passes(program, tiny.make_passes(*FUSING), Context(), lowering=LowerToOnnx.of())
    model = export_component(program, "language", ExportOptions())
    return model, {n.op_type for n in model.graph.node if n.overload.endswith("fused")}


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_ops_of_onnx_runtime_stand_in_where_they_compute_the_same(name: str) -> None:
    program = tiny.traced(name)
    model, fused = _fused(program)
    assert fused == {"AddRmsNorm", "Rotary"}
    theirs = {n.op_type for f in model.functions for n in f.node if n.domain == "com.microsoft"}
    assert theirs == {"SkipSimplifiedLayerNormalization", "RotaryEmbedding"}
    assert "com.microsoft" in {o.domain for o in model.opset_import}
    pure = export_component(program, "language", ExportOptions(pure=True))
    assert {o.domain for o in pure.opset_import} == {""}


def test_tables_whose_halves_may_differ_rotate_by_the_body() -> None:
    program = tiny.traced("llava")
    graph = program.component("language").graph
    [table] = [n for n in graph.nodes if n.target is torch.ops.aten.cat.default and _turns(n)]
    low, high = table.args[0]  # type: ignore[misc]
    assert low is high
    with graph.inserting_before(table):
        other = graph.call_function(torch.ops.aten.mul.Tensor, (high, 2.0))
    other.meta = dict(high.meta)  # type: ignore[union-attr]
    table.args = ([low, other], *table.args[1:])
    assert _fused(program)[1] == {"AddRmsNorm"}


def _turns(node: torch.fx.Node) -> bool:
    return any(user.target is torch.ops.aten.cos.default for user in node.users)


def test_weights_are_shared_and_outside(tmp_path: Path) -> None:
    """No model holds a weight, and what two components share has one layout."""
    program = tiny.traced("llava_tied")
    tiny.run(program, *SPARSE, INT4)
    options = ExportOptions()
    seen: dict[str, tuple[int, list[int]]] = {}
    packed = packed_weights(program, options)
    for name in program.components:
        model = export_component(program, name, options)
        for proto in model.graph.initializer:
            assert proto.data_location == onnx.TensorProto.EXTERNAL
            layout = (proto.data_type, list(proto.dims))
            assert seen.setdefault(proto.name, layout) == layout
        assert model.ByteSize() < 60_000
    assert set(seen) == set(program.weights)
    assert set(packed) < set(seen)
    (tied,) = program.component("embed").weight_names()
    assert tied in program.component("decode").weight_names()
    assert tied not in packed
    for key in packed:
        values = 2 if seen[key][0] == onnx.TensorProto.UINT4 else 1
        elements = torch.Size(seen[key][1]).numel()
        assert len(raw(packed[key])) * values == elements * packed[key].element_size()


def test_four_bit_values_are_packed_as_they_are_read() -> None:
    g = torch.Generator().manual_seed(1)
    values = torch.randint(0, 16, (5, 7), generator=g, dtype=torch.uint8)
    rows = pack_pairs(values, rows=True)
    assert rows.shape == (5, 4)
    assert int(rows[2, 1]) == int(values[2, 2]) + 16 * int(values[2, 3])
    assert int(rows[4, 3]) == int(values[4, 6])
    flat = pack_pairs(values, rows=False)
    assert flat.shape == (18,)
    assert int(flat[3]) == int(values[0, 6]) + 16 * int(values[1, 0])
    both = torch.stack((flat & 15, flat >> 4), 1).flatten()[:35]
    assert torch.equal(both.view(5, 7), values)


def test_int8_activations_are_an_option(tmp_path: Path) -> None:
    """They change what a 4-bit linear computes, by less than a hundredth of it, and nothing else."""
    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache", INT4)
    feeds = {k: v.numpy() for k, v in one_call(program, torch.float32).items()}
    results = []
    for options in (ExportOptions(), ExportOptions(int8_activations=True)):
        runs = session(saved(program, "language", options, tmp_path))
        results.append(torch.from_numpy(runs.run(["logits"], feeds)[0]))
    exact, rounded_inputs = results
    assert 1e-4 < relative_error(rounded_inputs, exact) < 0.1
    with pytest.raises(UserError, match="int8_activations has no form in pure"):
        check_supported(program, ExportOptions(pure=True, int8_activations=True))


# --------------------------------------------------------------- other dtypes


def one_call(program: Program, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of ``language``: two rows, one with tokens in the cache."""
    g = torch.Generator().manual_seed(4)
    caches = [n for n in program.component("language").inputs if "_cache_" in n]
    return {
        "inputs_embeds": torch.randn((2, 5, 64), generator=g).to(dtype),
        "position_ids": torch.arange(5).expand(2, 5) + torch.tensor([[0], [7]]),
        "logit_rows": torch.tensor([[4], [2]]),
        "cache_lens": torch.tensor([0, 7], dtype=torch.int32),
        "new_lens": torch.tensor([5, 3], dtype=torch.int32),
        **{n: torch.randn((2, 2, 16, 16), generator=g).to(dtype) for n in caches},
    }


def test_a_bfloat16_program_is_emitted_in_float16(tmp_path: Path) -> None:
    """The one half type that onnxruntime runs on a CPU; it errs less than bfloat16 does."""
    rounded_model = tiny.build("llava").to(torch.bfloat16)
    program, exact = trace(rounded_model), trace(rounded_model.float())
    for each in (exact, program):
        tiny.run(each, *tiny.DENSE)
    options = ExportOptions(dtype=torch.float16)
    model = export_component(program, "language", options)
    types = {t.data_type for t in model.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 not in types
    runs = session(saved(program, "language", options, tmp_path))
    feeds = one_call(program, torch.float16)
    out = runs.run(["logits"], {k: v.numpy() for k, v in feeds.items()})[0]
    assert out.dtype == "float16"

    def torchs(of: Program, dtype: torch.dtype) -> torch.Tensor:
        inputs = one_call(of, dtype)
        component = of.component("language")
        with torch.inference_mode():
            (logits,) = component.module(of.weights)(*(inputs[n] for n in component.inputs))
        return logits.float()

    ref = torchs(exact, torch.float32)
    bound = relative_error(torchs(program, torch.bfloat16), ref)
    assert 1e-3 < bound < 0.1
    assert_close_to(torch.from_numpy(out).float(), ref, bound, "float16", rows=False)


def test_a_bfloat16_program_is_valid_onnx(tmp_path: Path) -> None:
    """Only its types are checked: onnxruntime multiplies bfloat16 on GPUs alone."""
    program = trace(tiny.build("llava").to(torch.bfloat16))
    tiny.run(program, *SPARSE, INT4, *FUSE)
    for name in program.components:
        path = saved(program, name, ExportOptions(), tmp_path)
        onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(tmp_path / "vision.onnx")
    assert onnx.TensorProto.BFLOAT16 in {t.data_type for t in model.graph.initializer}


def test_a_value_that_float16_cannot_hold_is_named() -> None:
    program = trace(tiny.build("llava").to(torch.bfloat16))
    name = next(n for n in program.weights if n.endswith("mlp.down_proj.weight"))
    program.weights[name] = program.weights[name].clone()
    program.weights[name][1, 2] = 1e30
    packed = packed_weights(program, ExportOptions(dtype=torch.float16))
    with pytest.raises(UserError, match=f"{name}: has values that float16 cannot hold"):
        packed[name]


def test_a_float32_program_is_not_emitted_in_half() -> None:
    program = tiny.traced("llava")
    tiny.run(program, *tiny.DENSE)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(UserError, match=r"emit\.dtype: .* set model\.dtype"):
            export_component(program, "language", ExportOptions(dtype=dtype))
    export_component(program, "language", ExportOptions(dtype=torch.float32))


def test_float8_is_refused() -> None:
    program = tiny.traced("llava")
    tiny.run(program, "insert_kv_cache", INT4)
    edit = Editor(program.component("language"))
    node = next(n for n in program.component("language").graph.nodes if n.target is W4A16_LINEAR)
    arguments = (*node.args[:6], 512)
    new = edit.call(W4A8_LINEAR, *arguments, before=node, origin=node)
    edit.replace(node, new)
    with pytest.raises(UserError, match="float8"):
        emitted_as(new, ExportOptions())
    with pytest.raises(UserError, match=r"^language/.*: ONNX export: fp8_prefill .* leave it out$"):
        check_supported(program, ExportOptions())
