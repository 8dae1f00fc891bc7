"""From FX values to ONNX values: names, types, sizes and constants, for the tables of converters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import fx

from sparsevila_compile.errors import UserError
from sparsevila_compile.graph_edit import value
from sparsevila_compile.kernels.onnx_support import Body

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

Value = str | list[str]
"""Names of what a node gives: one tensor, or several."""


class Unsupported(UserError):
    """A node that this exporter has no ONNX form for."""


class GraphWriter(Body):
    """Writes one component's nodes.

    A tensor is a value's name; a size is the name of an int64 ``[1]``. ``retype`` maps the
    program's floating type to the emitted one.
    """

    def __init__(
        self,
        component: str,
        retype: dict[torch.dtype, torch.dtype],
        pure: bool = False,
        int8_activations: bool = False,
    ) -> None:
        super().__init__(prefix="_")
        self.component = component
        self.pure = pure
        self.int8_activations = int8_activations
        self.values: dict[fx.Node, Value] = {}
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.transposed: set[str] = set()
        self.shaped: set[fx.Node] = set()  # views whose input has their shape already
        self.functions: dict[tuple[str, str], onnx.FunctionProto] = {}
        self._retype = retype
        self._sizes: dict[str, str] = {}

    def refuse(self, node: fx.Node, why: str) -> Unsupported:
        return Unsupported(f"{self.component}/{node.name}: ONNX export: {why}")

    # ------------------------------------------------------------------- types

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type a value of the program has in ONNX."""
        return self._retype.get(dtype, dtype)

    def type_code(self, dtype: torch.dtype) -> int:
        found = ONNX_TYPES.get(self.dtype(dtype))
        if found is None:
            raise Unsupported(f"{self.component}: ONNX export: no tensor type for {dtype}")
        return found

    # ------------------------------------------------------------------ values

    def tensor(self, arg: Any) -> str:
        """The name of a node's one value."""
        found = self.values[arg]
        if isinstance(found, list):
            raise TypeError(f"{arg} has several values")
        return found

    def typed(self, arg: Any, dtype: torch.dtype) -> str:
        """A tensor or a number as a tensor of that type of the program."""
        code = self.type_code(dtype)
        if not isinstance(arg, fx.Node):
            array = np.asarray(arg, dtype=np.float64 if dtype.is_floating_point else np.int64)
            return self.literal(array, code)
        held = value(arg)
        name = self.tensor(arg)
        if not isinstance(held, torch.Tensor):
            name, held_type = self.op("Squeeze", name, self.constant([0])), torch.int64
        else:
            held_type = held.dtype
        return name if self.type_code(held_type) == code else self.cast(name, code)

    def literal(self, array: np.ndarray[Any, Any], code: int) -> str:
        """A constant of any ONNX type."""
        return self.constant(array, helper.tensor_dtype_to_np_dtype(code))

    # ------------------------------------------------------------------- sizes

    def length(self, arg: Any) -> str:
        """A size as int64 ``[1]``."""
        return self.constant([int(arg)]) if not isinstance(arg, fx.Node) else self.tensor(arg)

    def vector(self, sizes: Sequence[Any]) -> str:
        """Sizes as one int64 vector."""
        if not any(isinstance(s, fx.Node) for s in sizes):
            return self.constant([int(s) for s in sizes])
        return self.op("Concat", *(self.length(s) for s in sizes), axis=0)

    def shared_size(self, size: Any) -> str:
        """A symbolic size as int64 ``[1]``, read once from an input that has it; ``""``: none has."""
        symbol = str(size)
        if symbol not in self._sizes:
            if not symbol.isidentifier():
                return ""
            for node in self.values:
                held = value(node)
                if node.op == "placeholder" and symbol in map(str, held.shape):
                    axis = [str(s) for s in held.shape].index(symbol)
                    self._sizes[symbol] = self.size(str(node.target), axis)
                    break
            else:
                return ""
        return self._sizes[symbol]

    # ----------------------------------------------------------------- weights

    def weight(self, name: str, dims: Sequence[int], code: int) -> str:
        """An initializer whose bytes are kept outside the model."""
        proto = TensorProto(name=name, data_type=code, dims=list(dims))
        proto.data_location = TensorProto.EXTERNAL
        known = self.initializers.setdefault(name, proto)
        if list(known.dims) != list(dims) or known.data_type != code:
            raise ValueError(f"weight {name} is needed in two layouts")
        return name

    def add_function(self, node: onnx.NodeProto, function: onnx.FunctionProto) -> None:
        self.nodes.append(node)
        self.functions[(function.name, function.overload)] = function
