"""``fp8_prefill``: the 4-bit linears of prefill multiply many rows in float8.

A prompt's products are bound by arithmetic, where float8 is twice as fast as bfloat16; decode's are
bound by the bytes of the weights and stay as they are. Weights remain stored in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.kernels.w8a8_linear.op import float8_missing
from sparsevila_compile.ops import W4A8_LINEAR, W4A16_LINEAR
from sparsevila_compile.pass_base import Context, Match, Miss, Pass, PassConfig, calls, register
from sparsevila_compile.program import Program

PREFILL = ("language", "turn")
"""Components that see prompts; ``language`` decodes too where nothing is retrieved, with few rows."""


class Fp8PrefillConfig(PassConfig):
    """Options of ``fp8_prefill``."""

    min_rows: int = Field(
        default=512,
        ge=1,
        description="Tokens of one call, all rows of the batch together, from which float8 is used.",
    )


@register
class Fp8Prefill(Pass[Fp8PrefillConfig]):
    """Every ``w4a16_linear`` of ``language`` and ``turn`` becomes ``w4a8_linear``."""

    name = "fp8_prefill"
    stage = "fuse"
    summary = "4-bit linears multiply a prompt's tokens in float8"
    config_type = Fp8PrefillConfig

    def requires(self, program: Program) -> None:
        reason = float8_missing(program.device)
        if reason is not None:
            raise UserError(f"float8 {reason}; leave fp8_prefill out")

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for name in PREFILL:
            if name in program.components:
                for node in calls(program, name, W4A16_LINEAR):
                    yield Match(name, node)
        for name in sorted(set(program.components) - set(PREFILL)):
            for node in calls(program, name, W4A16_LINEAR):
                yield Miss(name, "not a prefill component", module_path(node), node.name)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        edit = Editor(program.component(match.component))
        node = match.node
        new = edit.call(W4A8_LINEAR, *node.args[:6], self.config.min_rows, before=node, origin=node)
        edit.replace(node, new)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"fp8_prefill left {found.node.name} behind")
