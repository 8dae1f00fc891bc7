"""``quantize_linear``: AWQ w4a16 for the linears of one component (arXiv 2306.00978).

Linears that share an input form a group with one per-channel scale, searched on calibration data;
the scale is folded into the op before the group where the graph allows, and is an explicit
multiplication where not. Calibration walks the graph once (see ``calibration``), so later layers
are searched on what the quantized earlier ones put out.

All linears are clipped. AWQ's authors leave q_proj and k_proj unclipped, since their outputs are
multiplied with each other; on the card model of ``examples/cards`` clipping them too made the
median error of the logits 3 to 6 % smaller at every group size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import fx

from sparsevila_compile.awq import (
    ActivationStats,
    AwqResult,
    Quantized,
    check_width,
    quantize_awq,
    quantize_groupwise,
)
from sparsevila_compile.calibration import Lockstep, Override, component_inputs, read_samples
from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.kernels.w4a16_linear.packing import pack_int4
from sparsevila_compile.ops import W4A16_LINEAR
from sparsevila_compile.pass_base import (
    Context,
    Match,
    Miss,
    Pass,
    PassConfig,
    calls,
    register,
    tensor_of,
)
from sparsevila_compile.program import Component, Program

from .scale_folding import Fold, applied_scale, bias_of, find_fold, folded, weight_of

aten = torch.ops.aten
LINEAR = aten.linear.default


class Calibration(BaseModel):
    """Where calibration conversations come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        description='JSON lines {"image": FILE, "messages": [chat messages]}; pictures beside it.'
    )
    samples: int = Field(default=32, gt=0, description="Conversations used, from the first on.")


class QuantizeLinearConfig(PassConfig):
    """Options of ``quantize_linear``."""

    scheme: Literal["w4a16"] = Field(
        default="w4a16", description="4-bit groupwise weights, activations as they are."
    )
    method: Literal["awq", "rtn"] = Field(
        default="awq",
        description="Activation-aware scales and clipping (awq, needs calibration), or plain "
        "round-to-nearest (rtn).",
    )
    component: Literal["language", "vision"] = Field(
        default="language", description="Which component's linears are quantized."
    )
    group_size: Literal[32, 64, 128] = Field(
        default=128, description="Input channels that share a scale and a zero_point."
    )
    clip: bool = Field(default=True, description="Search how far to clip each group's range (awq).")
    calibration: Calibration | None = Field(default=None, description="Calibration data (awq).")
    ignore: tuple[str, ...] = Field(
        default=("lm_head",),
        description="Module paths (or their ends) to leave in floating point; an entry that names "
        "nothing is an error.",
    )
    indivisible: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a linear whose width group_size does not divide.",
    )

    @model_validator(mode="after")
    def _needs_data(self) -> QuantizeLinearConfig:
        if self.method == "awq" and self.calibration is None:
            raise ValueError("method awq needs calibration: {path: …}; give it, or set method: rtn")
        if self.method == "rtn" and self.calibration is not None:
            raise ValueError("calibration is not used by method rtn; remove it, or set method: awq")
        if self.method == "rtn" and "clip" in self.model_fields_set:
            raise ValueError("clip is not used by method rtn; remove it, or set method: awq")
        return self


class Packed(NamedTuple):
    """A linear as it is stored; shapes and dtypes are those of ``w4a16_linear``."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    @staticmethod
    def of(quantized: Quantized) -> Packed:
        return Packed(pack_int4(quantized.codes), quantized.scales, quantized.zero_points)

    @staticmethod
    def empty(rows: int, width: int, group_size: int, dtype: torch.dtype) -> Packed:
        """Shapes alone, for planning."""
        groups = width // group_size
        return Packed(
            torch.empty((rows, width // 8), dtype=torch.int32, device="meta"),
            torch.empty((rows, groups), dtype=dtype, device="meta"),
            torch.empty((rows, groups), dtype=torch.uint8, device="meta"),
        )

    def named(self, weight: str) -> dict[str, torch.Tensor]:
        """By the names that replace the weight's."""
        stem = weight.removesuffix(".weight")
        return {f"{stem}.{part}": tensor for part, tensor in self._asdict().items()}


@dataclass
class Group:
    """Linears that share their input, by weight name, in graph order.

    ``scale`` (float32 ``[K]``) is what their input is divided by, or None for 1.
    """

    names: list[str] = field(default_factory=list)
    fold: Fold | None = None
    scale: torch.Tensor | None = None
    result: AwqResult | None = None
    folded: bool = False

    @property
    def inverse_name(self) -> str:
        return f"{self.names[0].removesuffix('.weight')}.inverse_scale"


def _named(path: str, entry: str) -> bool:
    return path == entry or path.endswith("." + entry)


@register
class QuantizeLinear(Pass[QuantizeLinearConfig]):
    """Every matched ``aten.linear`` becomes ``w4a16_linear``, in all components that share it."""

    name = "quantize_linear"
    stage = "quantize"
    summary = "stores linear weights in 4 bits (AWQ w4a16)"
    config_type = QuantizeLinearConfig
    repeatable = True  # once a component

    def requires(self, program: Program) -> None:
        if self.config.component == "language" and not program.caches:
            raise UserError(
                "language linears are calibrated through the KV cache; list insert_kv_cache before it"
            )
        paths = [module_path(n) for n in calls(program, self.config.component, LINEAR)]
        entries = self.config.ignore if "ignore" in self.config.model_fields_set else ()
        for entry in entries:
            if not any(_named(path, entry) for path in paths):
                raise UserError(
                    f"ignore: {entry!r} names no linear of the {self.config.component} component; remove it"
                )

    def match(self, program: Program) -> Iterator[Match | Miss]:
        component = self.config.component
        readers = Counter(weight_of(n) for n in calls(program, component, LINEAR))
        for node in calls(program, component, LINEAR):
            path, name = module_path(node), weight_of(node)
            reason = None
            if any(_named(path, entry) for entry in self.config.ignore):
                reason = "in ignore"
            elif name is None:
                reason = "its weight is computed, not stored"
            elif readers[name] > 1:
                reason = "its weight serves several inputs"
            else:
                reason = self._indivisible(int(tensor_of(node.args[1]).shape[1]), path)  # type: ignore[arg-type]
            if reason is None:
                yield Match(component, node)
            else:
                yield Miss(component, reason, path, node.name)

    def _indivisible(self, width: int, path: str) -> str | None:
        size = self.config.group_size
        if width % size and self.config.indivisible == "skip":
            return f"its width {width} is not divisible by group_size {size}"
        try:
            check_width(width, size, path)
        except UserError as error:
            raise UserError(f"{error} (list it in ignore, or set indivisible: skip)") from None
        return None

    def prepare(self, program: Program, matches: list[Match], context: Context) -> None:
        """Search scales and codes of all groups before the graph is touched."""
        groups: dict[str, Group] = {}
        for match in matches:
            groups.setdefault(str(match.node.args[0]), Group()).names.append(_name(match.node))
        self._groups = list(groups.values())
        self._group_of = {name: group for group in self._groups for name in group.names}
        self._packed: dict[str, Packed] = {}
        if context.dry or not matches:
            return
        if self.config.method == "rtn":
            for done, group in enumerate(self._groups, 1):
                context.progress("rounding", done, len(self._groups))
                self._round(program, group)
        else:
            for group in self._groups:
                group.fold = find_fold(list(program.components.values()), group.names)
            self._calibrate(program, context)
        self._note(context)

    def _round(self, program: Program, group: Group) -> None:
        for name in group.names:
            weight, size = program.weights[name], self.config.group_size
            try:
                quantized = quantize_groupwise(weight, size, scale_dtype=program.dtype)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            self._packed[name] = Packed.of(quantized)

    def _calibrate(self, program: Program, context: Context) -> None:
        given = self.config.calibration
        assert given is not None
        path = Path(context.base) / Path(given.path).expanduser()
        samples = read_samples(path, given.samples)
        if len(samples) < given.samples and "samples" in given.model_fields_set:
            raise UserError(
                f"calibration.samples is {given.samples}, but {path} holds {len(samples)} "
                "conversations; lower it, or add conversations"
            )
        context.notes["calibration_samples"] = len(samples)
        component, inputs = component_inputs(
            program, self.config.component, context.processor, samples
        )
        wanted = [n for n in component.graph.nodes if weight_of(n) in self._group_of]

        def visit(node: fx.Node, values: list[torch.Tensor]) -> Override:
            group = self._group_of[_name(node)]
            if group.result is None:
                self._search(program, group, values)
                done = sum(g.result is not None for g in self._groups)
                context.progress("calibrating", done, len(self._groups))
            return self._stand_in(program, group, node)

        Lockstep(component, program.weights).run(inputs, wanted, visit)

    def _search(self, program: Program, group: Group, values: list[torch.Tensor]) -> None:
        weights = [program.weights[n] for n in group.names]
        stats = ActivationStats(weights[0].shape[1], weights[0].device)
        for x in values:
            stats.update(x)
        held = dict(program.weights)  # what has been quantized already will be folded into as such
        for name, packed in self._packed.items():
            held |= packed.named(name)

        def applied(scale: torch.Tensor) -> torch.Tensor:
            if group.fold is not None:
                return applied_scale(held, group.fold, scale)
            inverse = _inverse(scale, program.dtype)
            return 1 / inverse.float()

        try:
            result = quantize_awq(
                weights,
                stats,
                self.config.group_size,
                clip=self.config.clip,
                scale_dtype=program.dtype,
                applied=applied,
            )
        except UserError as error:
            raise UserError(f"{group.names[0]}: {error}") from error
        for name, quantized in zip(group.names, result.quantized, strict=True):
            self._packed[name] = Packed.of(quantized)
        result.quantized.clear()  # one byte a code; packed they take half
        group.result = result
        if not bool((result.scale == 1).all()):
            group.scale = result.scale

    def _stand_in(self, program: Program, group: Group, node: fx.Node) -> Override:
        """What the quantized linear will compute, for calibrating the layers behind it."""
        packed, bias = self._packed[_name(node)], bias_of(node)
        stored = None if bias is None else program.weights[str(bias.target)]

        def run(x: torch.Tensor) -> torch.Tensor:
            if group.scale is not None:
                x = (x / group.scale).to(x.dtype)
            out: torch.Tensor = W4A16_LINEAR(x, *packed, stored, self.config.group_size)
            return out

        return run

    def _note(self, context: Context) -> None:
        notes = context.notes
        notes["groups"] = len(self._groups)
        scaled = [g for g in self._groups if g.scale is not None]
        kinds = Counter(g.fold.kind for g in scaled if g.fold is not None)
        notes["folded_scales"] = sum(kinds.values())
        notes["folded_into"] = dict(kinds)
        notes["explicit_scales"] = len(scaled) - sum(kinds.values())
        notes["unscaled_groups"] = len(self._groups) - len(scaled)
        results = {g.names[0]: g.result for g in self._groups if g.result is not None}
        if results:
            # Each group counts alike, whatever the size of its outputs.
            shares = [r.error_awq / r.error_rtn for r in results.values() if r.error_rtn]
            notes["output_error_awq_over_rtn"] = sum(shares) / len(shares) if shares else 1.0
            notes["output_error"] = {
                n: {
                    "rtn": r.error_rtn / (r.output_power or 1.0),
                    "awq": r.error_awq / (r.output_power or 1.0),
                    "clipped": r.clipped,
                }
                for n, r in results.items()
            }

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        name = _name(match.node)
        group = self._group_of[name]
        if group.scale is not None and group.fold is not None and not group.folded:
            program.weights |= folded(program.weights, group.fold, group.scale)
            group.folded = True
        elif group.scale is not None and group.fold is None:
            program.weights[group.inverse_name] = _inverse(group.scale, program.dtype)
        if context.dry:
            rows, width = program.weights[name].shape
            packed = Packed.empty(rows, width, self.config.group_size, program.dtype)
        else:
            packed = self._packed.pop(name)
        stored = packed.named(name)
        program.weights |= stored
        for component in program.components.values():
            for node in list(component.graph.nodes):
                if node.target is LINEAR and weight_of(node) == name:
                    self._replace(program, component, node, stored, group)

    def _replace(
        self,
        program: Program,
        component: Component,
        node: fx.Node,
        stored: dict[str, torch.Tensor],
        group: Group,
    ) -> None:
        edit = Editor(component)
        x = node.args[0]
        if group.scale is not None and group.fold is None:
            x = self._explicit(program, component, edit, node, group)
        parts = [edit.weight(n, tensor, before=node) for n, tensor in stored.items()]
        bias, size = bias_of(node), self.config.group_size
        new = edit.call(W4A16_LINEAR, x, *parts, bias, size, before=node, origin=node)
        edit.replace(node, new)
        edit.sweep()

    @staticmethod
    def _explicit(
        program: Program, component: Component, edit: Editor, node: fx.Node, group: Group
    ) -> fx.Node:
        """The linear's input times the group's inverse scale, computed once for the group."""
        name = group.inverse_name
        for held in component.graph.nodes:
            if held.op == "get_attr" and held.target == name:
                product: fx.Node = next(iter(held.users))
                return product
        inverse = edit.weight(name, program.weights[name], before=node)
        return edit.call(aten.mul.Tensor, node.args[0], inverse, before=node, origin=node)

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"quantize_linear left {found.site().where} behind")


def _name(node: fx.Node) -> str:
    """Checkpoint name of a matched linear's weight."""
    name = weight_of(node)
    if name is None:
        raise GraphError(f"{node.name} is no linear with a stored weight")
    return name


def _inverse(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an explicit scale is stored as; 1 where that would overflow or vanish."""
    inverse = (1 / scale).to(dtype)
    return torch.where(inverse.isfinite() & (inverse != 0), inverse, 1.0).to(dtype)
