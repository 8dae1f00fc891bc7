"""Components of a program as ONNX models.

The graphs are those of the module artifact: one plain FX graph a component, translated node by node
by tables (:mod:`.aten`, :mod:`.canonical`), not traced again. A model holds no weights: its
initializers are external, named as in the checkpoint, so that all components share one copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import helper
from torch import fx

from sparsevila_compile import ops
from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import value
from sparsevila_compile.kernels.onnx_support import CONTRIB, CONTRIB_VERSION, IR_VERSION
from sparsevila_compile.kernels.onnx_support import DOMAIN as DOMAIN
from sparsevila_compile.kernels.onnx_support import DOMAIN_VERSION as DOMAIN_VERSION
from sparsevila_compile.kernels.onnx_support import OPSET as OPSET
from sparsevila_compile.onnx import aten_shapes as aten_shapes  # registers its converters
from sparsevila_compile.onnx.aten import CONVERTERS
from sparsevila_compile.onnx.canonical import EMITTED, HALVES, ONNX_OPS, PURE_W4A16
from sparsevila_compile.onnx.graph_writer import GraphWriter
from sparsevila_compile.onnx.weights import INT4_PARTS, PackedWeights, layouts, stored_dims
from sparsevila_compile.program import Component, Program

PRODUCER = "sparsevila-compile"

_SIZES = {
    "input_ids": ("batch", "length"),
    "inputs_embeds": ("batch", "length"),
    "logit_rows": ("batch", "rows"),
    "k_cache_0": ("batch", None, "capacity"),
    "score_columns": ("batch", "visual"),
    "scores": ("batch", None, "visual"),
    "columns": ("batch", "visual"),
    "slots": ("kept",),
    "fixed": ("batch", "fixed"),
    "segment_starts": ("segments",),
    "visual_slots": ("kept",),
    "cu_seqlens": ("bounds",),
    "cu_window_seqlens": ("window_bounds",),
    "window_index": ("merge_units",),
}
"""Names of symbolic sizes, by the input that has them first."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of the export.

    Attributes:
        dtype: float type of the emitted tensors; None: the program's. A program in one half type
            can be emitted in the other (values float16 cannot hold are refused); float32 stays.
        pure: only ops of ``ai.onnx``: no functions, no contrib ops.
        int8_activations: 4-bit linears may round their inputs to int8, block by block: on CPUs some
            five times faster for single tokens, for 0.7% of relative error a linear.
    """

    dtype: torch.dtype | None = None
    pure: bool = False
    int8_activations: bool = False


def _retype(program: Program, options: ExportOptions) -> dict[torch.dtype, torch.dtype]:
    wanted = options.dtype
    if wanted is None or wanted == program.dtype:
        return {}
    if wanted not in HALVES or program.dtype not in HALVES:
        has, wants = (str(d).removeprefix("torch.") for d in (program.dtype, wanted))
        raise UserError(
            f"emit.dtype: a program compiled in {has} cannot be emitted in {wants}; set model.dtype: {wants}"
        )
    return {program.dtype: wanted}


def emitted_as(node: fx.Node, options: ExportOptions) -> str:
    """The ONNX op that a canonical op's node becomes, as ``domain::Name``.

    Raises:
        UserError: ONNX cannot hold it.
    """
    if node.target is ops.W4A8_LINEAR or (
        node.target is ops.W8A8_LINEAR and value(node.args[1]).dtype != torch.int8  # type: ignore[arg-type]
    ):
        raise UserError(
            f"{node.name}: products in float8 have no ONNX form that runs; leave fp8_prefill out, "
            "and use scheme: w4a16 or w8a8"
        )
    if options.pure:
        return PURE_W4A16 if node.target is ops.W4A16_LINEAR else "ai.onnx"
    return EMITTED[node.target]


def check_supported(program: Program, options: ExportOptions) -> None:
    """Translate every component and keep nothing.

    Raises:
        UserError: an op, a type or an option that ONNX cannot hold.
    """
    for name in program.components:
        export_component(program, name, options)


def packed_weights(program: Program, options: ExportOptions) -> Mapping[str, torch.Tensor]:
    """Weights whose ONNX bytes differ from ``program.weights``, by name, each made on request."""
    emitted = _retype(program, options).get(program.dtype, program.dtype)
    return PackedWeights(program, layouts(program, emitted, options.pure))


def export_component(program: Program, name: str, options: ExportOptions) -> onnx.ModelProto:
    """One component as a model whose weights are external initializers without a place yet.

    Inputs and outputs have the component's names. Caches that it writes come out again, as
    ``k_cache_i_out`` and ``v_cache_i_out`` of the same shape: bound to the buffers of the inputs,
    they are written in place.

    Raises:
        UserError: something in the component has no ONNX form; the options do not fit.
    """
    register_schemas()
    if options.pure and options.int8_activations:
        raise UserError("emit: int8_activations has no form in pure ai.onnx; leave one of them out")
    component = program.component(name)
    retype = _retype(program, options)
    found = layouts(program, retype.get(program.dtype, program.dtype), options.pure)
    g = GraphWriter(name, retype, options.pure, options.int8_activations)
    g.transposed = {weight for weight, layout in found.items() if layout.transposed}
    for node in component.graph.nodes:
        _translate(g, node, program, found)
    outputs = _outputs(g, component)
    sizes: dict[str, str] = {}
    inputs = [_info(g, n, str(n.target), sizes) for n in _placeholders(component)]
    results = [_info(g, n, o, sizes) for n, o in zip(component.results(), outputs, strict=True)]
    caches = [
        _info(g, n, f"{n.target}_out", sizes)
        for n in _placeholders(component)
        if g.values[n] == f"{n.target}_out"
    ]
    graph = helper.make_graph(
        g.nodes, name, inputs, [*results, *caches], list(g.initializers.values())
    )
    domains = {n.domain for n in g.nodes}
    domains |= {o.domain for f in g.functions.values() for o in f.opset_import}
    versions = {"": OPSET, DOMAIN: DOMAIN_VERSION, CONTRIB: CONTRIB_VERSION}
    model = helper.make_model(
        graph,
        functions=list(g.functions.values()),
        opset_imports=[helper.make_opsetid(d, versions[d]) for d in sorted(domains | {""})],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    return _inlined(model) if options.pure else model


def _placeholders(component: Component) -> list[fx.Node]:
    return [n for n in component.graph.nodes if n.op == "placeholder"]


def _translate(g: GraphWriter, node: fx.Node, program: Program, found: dict[str, Any]) -> None:
    if node.op == "placeholder":
        g.values[node] = str(node.target)
    elif node.op == "get_attr":
        users = ((u, i) for u in node.users for i, arg in enumerate(u.args) if arg is node)
        if all(u.target is ops.W4A16_LINEAR and i in INT4_PARTS for u, i in users):
            return  # its linear declares it, in the layout that it reads
        held, layout = program.weights[str(node.target)], found[str(node.target)]
        code = g.type_code(held.dtype)
        g.values[node] = g.weight(str(node.target), stored_dims(held, layout), code)
    elif node.op == "call_function":
        convert = CONVERTERS.get(node.target)
        if convert is None:
            raise g.refuse(node, f"no form for the op {node.target}")
        first = len(g.nodes)
        g.values[node] = convert(g, node)
        for i, made in enumerate(g.nodes[first:]):
            made.name = node.name if first + i + 1 == len(g.nodes) else f"{node.name}.{i}"


def _outputs(g: GraphWriter, component: Component) -> list[str]:
    """Values renamed to the names of the outputs they are."""
    for name, node in zip(component.outputs, component.results(), strict=True):
        if name in {n.target for n in _placeholders(component)}:
            raise GraphError(f"{component.name}: {name} is an input and an output")
        g.nodes.append(
            helper.make_node("Identity", [g.tensor(node)], [name], name=f"output.{name}")
        )
    return list(component.outputs)


def _info(g: GraphWriter, node: fx.Node, name: str, sizes: dict[str, str]) -> onnx.ValueInfoProto:
    """A tensor's type and shape; ``sizes`` names each symbol as the first input that has it does."""
    held: torch.Tensor = value(node)
    shape: list[int | str | None] = []
    known = _SIZES.get(name, ())
    for axis, size in enumerate(held.shape):
        if isinstance(size, int):
            shape.append(size)
            continue
        symbol = str(size)
        if symbol not in sizes:
            if not symbol.isidentifier():  # the size of an output: an expression
                shape.append(None)
                continue
            given = known[axis] if axis < len(known) else None
            label = given or f"{name}_{axis}"
            taken = set(sizes.values())
            sizes[symbol] = label if label not in taken else f"{name}_{label}"
        shape.append(sizes[symbol])
    return helper.make_tensor_value_info(name, g.type_code(held.dtype), shape)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import inliner

    inlined: onnx.ModelProto = inliner.inline_local_functions(model)
    kept = [o for o in inlined.opset_import if o.domain == ""]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined


_registered = False


def register_schemas() -> None:
    """Make the domain known to onnx's checker and shape inference, in this process."""
    global _registered
    if not _registered:
        _registered = True
        # Imported later, it would refuse a name of ours that ai.onnx has too; onnxscript imports it.
        importlib.import_module("onnx.reference")
        for op in ONNX_OPS:
            onnx.defs.register_schema(op.schema())
