"""What the ONNX forms of the ops share: a writer of nodes, and how an op of this domain is declared.

Each op's ``onnx.py`` declares one :class:`OnnxOp`: its schema, and a body of standard ``ai.onnx``
nodes that any runtime can run. Where a body depends on which optional inputs are given, or on an
attribute, it is written once for each case as an *overload* of one function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "sparsevila"
DOMAIN_VERSION = 1
OPSET = 21
"""Version of ``ai.onnx`` that graphs and bodies are written in."""

CONTRIB, CONTRIB_VERSION = "com.microsoft", 1
"""ONNX Runtime's own domain: bodies that are ``fused`` hold ops of it."""

IR_VERSION = 10
"""The first with overloads of functions."""

HIDDEN = -1e30
"""Added to the score of a key that a row does not see: finite, so that one that sees none has no NaN."""

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
INTEGERS = ["tensor(int32)", "tensor(int64)"]
FUSED = "fused"
"""Marks the overload whose body holds ops of ONNX Runtime's own domain."""

STEP = "step_number"
"""Number of the run within a loop."""

_TYPES = {
    "T": FLOATS,
    "I": INTEGERS,
    "F": ["tensor(float)"],
    "L": ["tensor(int64)"],
    "Q": ["tensor(int8)"],
    "C": FLOATS,
}
"""Type parameters that the schemas use."""


class Body:
    """Writes ONNX nodes one after the other; a value is its name.

    Constants of one type, shape and content are written once.
    """

    def __init__(self, prefix: str = "v") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._numbers = itertools.count()
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def name(self) -> str:
        return f"{self._prefix}{next(self._numbers)}"

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node of one output; an input that is left out is ``""``."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: str, domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node of several outputs."""
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A constant tensor of a numpy dtype."""
        array = np.ascontiguousarray(np.asarray(values, dtype=dtype)).reshape(np.shape(values))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def number(self, value: float) -> str:
        """A float32 constant without dimensions."""
        return self.constant(value, np.float32)

    def attribute(self, name: str, kind: str = "value_float") -> str:
        """The function's own attribute as a tensor: ``value_float`` or ``value_int``."""
        out = self.op("Constant")
        self.refer(kind, name)
        return out

    def refer(self, attribute: str, name: str) -> None:
        """Give the last node an attribute whose value is the function's own ``name``."""
        made = self.nodes[-1].attribute.add()
        made.name, made.ref_attr_name = attribute, name
        whole = attribute == "value_int"
        made.type = onnx.AttributeProto.INT if whole else onnx.AttributeProto.FLOAT

    def call(self, values: Sequence[str], names: Sequence[str]) -> None:
        """Give values other names. What this body did not make is copied.

        A node that only renames would cost a copy where a result must lie in a given buffer.
        """
        own = {x for node in self.nodes for x in node.output}
        renamed: dict[str, str] = {}
        for value, name in zip(values, names, strict=True):
            if value in own and value not in renamed:
                renamed[value] = name
            else:
                self.nodes.append(helper.make_node("Identity", [value], [name]))
        _rename(self.nodes, renamed)

    # ------------------------------------------------------------- often needed

    def size(self, x: str, axis: int) -> str:
        """One size of x, int64 ``[1]``."""
        if axis == -1:
            return self.op("Shape", x, start=-1)
        return self.op("Shape", x, start=axis, end=axis + 1)

    def shape(self, *sizes: str | int) -> str:
        """Sizes (int64 ``[1]`` each, or numbers), as one int64 vector."""
        parts = [self.constant([s]) if isinstance(s, int) else s for s in sizes]
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, x: str, *sizes: str | int) -> str:
        if all(isinstance(s, int) for s in sizes):
            return self.op("Reshape", x, self.constant(list(sizes)))
        return self.op("Reshape", x, self.shape(*sizes))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """New axes of size 1, where they are in the result.

        One node an axis: runtimes share equal nodes of several layers only where their constants
        have one element.
        """
        for axis in sorted(axes):
            x = self.op("Unsqueeze", x, self.constant([axis]))
        return x

    def cast(self, x: str, to: int) -> str:
        return self.op("Cast", x, to=to)

    def long(self, x: str) -> str:
        return self.cast(x, TensorProto.INT64)

    def float(self, x: str) -> str:
        return self.cast(x, TensorProto.FLOAT)

    def range(self, count: str) -> str:
        """0 .. count-1, int64; ``count`` is int64 ``[1]``."""
        end = self.op("Squeeze", count, self.constant([0]))
        return self.op("Range", self.constant(0), end, self.constant(1))

    def slice(self, x: str, axis: int, start: str | int, end: str | int) -> str:
        """x from start to end along one axis."""
        bounds = [self.constant([b]) if isinstance(b, int) else b for b in (start, end)]
        return self.op("Slice", x, *bounds, self.constant([axis]))

    def loop(self, count: str, step: Body, results: Sequence[str]) -> list[str]:
        """The values ``results`` of ``count`` (int64 ``[1]``) runs of ``step``, along a new first axis.

        ``step`` writes its nodes beforehand, with a prefix of its own; the number of the run is its
        value :data:`STEP`, int64. It may read values of this body, too.
        """
        going = step.op("Identity", "going")
        graph = helper.make_graph(
            step.nodes,
            "step",
            [
                helper.make_tensor_value_info(STEP, TensorProto.INT64, []),
                helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            ],
            [helper.make_empty_tensor_value_info(name) for name in (going, *results)],
        )
        times = self.op("Squeeze", count, self.constant([0]))
        return self.ops("Loop", len(results), times, "", body=graph)

    def either(self, condition: str, yes: Body, no: Body, results: Sequence[str]) -> list[str]:
        """The values ``results``, which both bodies write, from ``yes`` or from ``no``."""
        graphs = {
            name: helper.make_graph(
                body.nodes, name, [], [helper.make_empty_tensor_value_info(r) for r in results]
            )
            for name, body in (("then_branch", yes), ("else_branch", no))
        }
        return self.ops("If", len(results), condition, **graphs)

    def flip(self, condition: str) -> str:
        return self.op("Not", condition)


def _rename(nodes: Sequence[onnx.NodeProto], names: dict[str, str]) -> None:
    """Values by other names, in graphs within the nodes too."""
    for node in nodes:
        node.input[:] = [names.get(x, x) for x in node.input]
        node.output[:] = [names.get(x, x) for x in node.output]
        for attribute in node.attribute:
            _rename(attribute.g.node, names)


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its type parameter, whether it may be left out."""

    name: str
    kind: str
    optional: bool = False


@dataclass(frozen=True)
class OnnxOp:
    """An op of the domain ``sparsevila``.

    ``attributes`` maps each name to ``"float"``, ``"int"`` or ``"string"``; those in ``choices``
    decide which body there is. ``body(b, given, chosen)`` writes the nodes to ``b`` and returns the
    names of the outputs; the inputs have the names of their ports. ``given`` are the optional
    inputs that are there, ``chosen`` the values of the attributes in ``choices`` and, where
    ``fusable``, under :data:`FUSED` whether ops of ONNX Runtime's own domain may stand in the body.
    """

    name: str
    doc: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: dict[str, str]
    body: Callable[[Body, frozenset[str], dict[str, Any]], Sequence[str]]
    choices: tuple[str, ...] = field(default=())
    fusable: bool = False

    def overload(self, given: frozenset[str], chosen: dict[str, Any]) -> str:
        """Name of the body for this case."""
        parts = [p.name for p in self.inputs if p.optional and p.name in given]
        parts += [f"{name}={chosen[name]}" for name in self.choices]
        parts += [FUSED] if chosen.get(FUSED) else []
        return ",".join(parts)

    def function(self, given: frozenset[str], chosen: dict[str, Any]) -> onnx.FunctionProto:
        """The body for this case as a model-local function."""
        b = Body()
        made = self.body(b, given, chosen)
        if len(made) != len(self.outputs):
            raise ValueError(f"{self.name}: the body has {len(made)} outputs")
        b.call(made, [p.name for p in self.outputs])
        opsets = [helper.make_opsetid("", OPSET)]
        if chosen.get(FUSED):
            opsets.append(helper.make_opsetid(CONTRIB, CONTRIB_VERSION))
        return helper.make_function(
            DOMAIN,
            self.name,
            [p.name for p in self.inputs],
            [p.name for p in self.outputs],
            b.nodes,
            opsets,
            attributes=list(self.attributes),
            overload=self.overload(given, chosen),
            doc_string=self.doc,
        )

    def node(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: dict[str, Any],
        fused: bool = False,
    ) -> tuple[onnx.NodeProto, onnx.FunctionProto]:
        """A node of this op (``""`` for an input that is left out), and the body that it needs."""
        if set(attributes) != set(self.attributes):
            raise ValueError(f"{self.name} has attributes {list(self.attributes)}")
        given = frozenset(p.name for p, x in zip(self.inputs, inputs, strict=True) if x)
        if fused and not self.fusable:
            raise ValueError(f"{self.name} has no body with ops of {CONTRIB}")
        chosen = {name: attributes[name] for name in self.choices}
        if self.fusable:
            chosen[FUSED] = fused
        node = helper.make_node(self.name, inputs, outputs, domain=DOMAIN, **attributes)
        node.overload = self.overload(given, chosen)
        return node, self.function(given, chosen)

    def schema(self) -> onnx.defs.OpSchema:
        """For onnx's own checker and shape inference."""
        from onnx.defs import OpSchema

        def kind(p: Port) -> str:
            # Integers need not be of one type.
            return f"{p.kind}_{p.name}" if p.kind == "I" else p.kind

        def ports(group: tuple[Port, ...]) -> list[OpSchema.FormalParameter]:
            single, optional = (
                OpSchema.FormalParameterOption.Single,
                OpSchema.FormalParameterOption.Optional,
            )
            return [
                OpSchema.FormalParameter(
                    p.name, kind(p), param_option=optional if p.optional else single
                )
                for p in group
            ]

        kinds = {
            "float": OpSchema.AttrType.FLOAT,
            "int": OpSchema.AttrType.INT,
            "string": OpSchema.AttrType.STRING,
        }
        used = {kind(p): _TYPES[p.kind] for p in (*self.inputs, *self.outputs)}
        return OpSchema(
            self.name,
            DOMAIN,
            DOMAIN_VERSION,
            doc=self.doc,
            inputs=ports(self.inputs),
            outputs=ports(self.outputs),
            type_constraints=[(name, types, "") for name, types in used.items()],
            attributes=[
                OpSchema.Attribute(name, kinds[held], required=True)
                for name, held in self.attributes.items()
            ],
        )
