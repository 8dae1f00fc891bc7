"""How a program's weights are laid out in ONNX, and what has to be written for those that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsevila_compile import ops
from sparsevila_compile.errors import UserError
from sparsevila_compile.program import Program

LINEAR = torch.ops.aten.linear.default
INT4_PARTS = {1: "qweight", 2: "scales", 3: "zero_points"}


@dataclass(frozen=True)
class Layout:
    """What becomes of one weight.

    Attributes:
        transposed: stored ``[K, N]``, so that a linear is a plain MatMul: it reads a file mapped
            into memory as fast as a copy repacked for it, and sessions can share the file.
        dtype: type of the stored values, or None where they are raw 4-bit codes.
        zero_points: 4-bit zero points: two to a byte, rows padded (``row``), or not (``flat``).
    """

    transposed: bool = False
    dtype: torch.dtype | None = None
    zero_points: str | None = None


def readers(program: Program) -> dict[str, list[tuple[fx.Node, int]]]:
    """By weight: the calls that read it in any component, and as which argument."""
    found: dict[str, list[tuple[fx.Node, int]]] = {}
    for component in program.components.values():
        for node in component.graph.nodes:
            for i, arg in enumerate(node.args):
                if isinstance(arg, fx.Node) and arg.op == "get_attr":
                    found.setdefault(str(arg.target), []).append((node, i))
                elif isinstance(arg, (list, tuple)):
                    for part in arg:
                        if isinstance(part, fx.Node) and part.op == "get_attr":
                            found.setdefault(str(part.target), []).append((node, -1))
    return found


def layouts(program: Program, dtype: torch.dtype, pure: bool) -> dict[str, Layout]:
    """The layout of every weight that some component reads; ``dtype`` replaces the program's."""
    result = {}
    for name, uses in readers(program).items():
        held = program.weights[name]
        to = dtype if held.dtype == program.dtype else held.dtype
        if all(node.target is ops.W4A16_LINEAR and i in INT4_PARTS for node, i in uses):
            part = INT4_PARTS[uses[0][1]]
            if part == "qweight":
                result[name] = Layout()
            elif part == "zero_points":
                result[name] = Layout(zero_points="flat" if pure else "row")
            else:
                x: torch.Tensor = uses[0][0].args[0].meta["val"]  # type: ignore[union-attr]
                result[name] = Layout(dtype=dtype if x.dtype == program.dtype else x.dtype)
            continue
        turned = all(node.target in (LINEAR, ops.W8A8_LINEAR) and i == 1 for node, i in uses)
        result[name] = Layout(transposed=turned and held.dim() == 2, dtype=to)
    return result


class PackedWeights(Mapping[str, torch.Tensor]):
    """The weights whose ONNX bytes are not the program's: each is made when it is asked for.

    Tensors may be views that are not contiguous; what counts is their values in order.
    """

    def __init__(self, program: Program, found: dict[str, Layout]) -> None:
        self._weights = program.weights
        self._layouts = {
            name: layout for name, layout in found.items() if self._differs(name, layout)
        }

    def _differs(self, name: str, layout: Layout) -> bool:
        held = self._weights[name]
        cast = layout.dtype is not None and layout.dtype != held.dtype
        return layout.transposed or cast or layout.zero_points is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __getitem__(self, name: str) -> torch.Tensor:
        layout, held = self._layouts[name], self._weights[name]
        if layout.zero_points is not None:
            return pack_pairs(held, rows=layout.zero_points == "row")
        if layout.dtype is not None and layout.dtype != held.dtype:
            held = _cast(name, held, layout.dtype)
        return held.t() if layout.transposed else held


def _cast(name: str, held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = held.to(dtype)
    if bool((cast.isfinite() != held.isfinite()).any()):
        raise UserError(
            f"{name}: has values that {str(dtype).removeprefix('torch.')} cannot hold; "
            "emit bfloat16 or compile with model.dtype: float32"
        )
    return cast


def pack_pairs(values: torch.Tensor, rows: bool) -> torch.Tensor:
    """4-bit values, uint8 ``[N, G]``, two to a byte, the first in the lower bits.

    With ``rows`` every row is padded to whole bytes, as MatMulNBits reads zero points; else they
    follow one another without padding, as a tensor of the ONNX type uint4 is stored.
    """
    flat = values if rows else values.reshape(1, -1)
    if flat.shape[1] % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    packed = flat[:, 0::2] | (flat[:, 1::2] << 4)
    return packed if rows else packed.reshape(-1)


def stored_dims(held: torch.Tensor, layout: Layout) -> list[int]:
    """Dims of a plain weight's initializer."""
    dims: list[Any] = list(held.shape)
    return dims[::-1] if layout.transposed else dims
