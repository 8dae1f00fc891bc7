"""``lower_to_onnx``: says of every canonical op which ONNX op it becomes, or refuses.

It takes the place of ``lower_ops`` where a recipe emits ONNX; recipes do not list it. The program
that it leaves runs on the reference implementations, so it can be compared with the bundle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor
from sparsevila_compile.graph_json import dtype_of
from sparsevila_compile.kernels.registry import REFERENCE
from sparsevila_compile.onnx.export import ExportOptions, emitted_as
from sparsevila_compile.pass_base import Context, Match, Miss, Pass, PassConfig
from sparsevila_compile.passes.lower_ops import canonical_op, require_cache
from sparsevila_compile.program import Program


def export_options(dtype: str, pure: bool, int8_activations: bool) -> ExportOptions:
    """The export's options for those of an ``emit`` section."""
    return ExportOptions(None if dtype == "auto" else dtype_of(dtype), pure, int8_activations)


class LowerToOnnxConfig(PassConfig):
    """What ``emit`` says of the bundle."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the bundle's tensors; auto keeps the program's."
    )
    pure: bool = Field(default=False, description="Ops of ai.onnx only.")
    int8_activations: bool = Field(
        default=False, description="4-bit linears round their inputs to int8."
    )


class LowerToOnnx(Pass[LowerToOnnxConfig]):
    """Every node of the namespace ``sparsevila`` is assigned an ONNX op."""

    name = "lower_to_onnx"
    stage = "lower"
    summary = "assigns an ONNX op to every op"
    config_type = LowerToOnnxConfig

    @classmethod
    def of(
        cls,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        pure: bool = False,
        int8_activations: bool = False,
    ) -> LowerToOnnx:
        """The pass for an ``emit`` section's options."""
        return cls(LowerToOnnxConfig(dtype=dtype, pure=pure, int8_activations=int8_activations))

    @property
    def options(self) -> ExportOptions:
        """The options of the export."""
        config = self.config
        return export_options(config.dtype, config.pure, config.int8_activations)

    def requires(self, program: Program) -> None:
        require_cache(program)

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for component in program.components.values():
            for node in component.graph.nodes:
                if canonical_op(node) is not None and "impl" not in node.kwargs:
                    try:
                        becomes = emitted_as(node, self.options)
                    except UserError as error:
                        raise UserError(f"{component.name}/{node.name}: {error}") from error
                    yield Match(component.name, node, becomes)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        node = match.node
        node.kwargs = {**node.kwargs, "impl": REFERENCE}
        context.notes.setdefault("implementations", {})[f"{match.component}/{node.name}"] = (
            match.data
        )

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        for component in program.components.values():
            Editor(component).sweep()
        emitted = Counter(m.data for m in matches)
        context.notes["emitted"] = ", ".join(f"{op} × {n}" for op, n in sorted(emitted.items()))

    def ensures(self, program: Program) -> None:
        for component in program.components.values():
            for node in component.graph.nodes:
                if canonical_op(node) is not None and "impl" not in node.kwargs:
                    raise GraphError(f"{component.name}/{node.name} has no ONNX op")
