"""``quantize_linear``: AWQ w4a16 for the linears of one component (arXiv 2306.00978).

Linears that share an input form a group with one per-channel scale, searched on calibration data;
the scale is folded into the op before the group where the graph allows, and is an explicit
multiplication where not. Calibration walks the graph once (see ``calibration``), so later layers
are searched on what the quantized earlier ones put out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

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
from sparsevila_compile.calibration import (
    Lockstep,
    Override,
    component_inputs,
    read_samples,
    tokenize,
)
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

from .scale_folding import Fold, apply_fold, find_fold

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
        return self


def weight_name(node: fx.Node) -> str:
    """Checkpoint name of a linear's weight."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        raise GraphError(f"{node.name}: the weight is computed, not stored")
    return str(weight.target)


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
        for node in calls(program, component, LINEAR):
            path = module_path(node)
            width = int(tensor_of(node.args[1]).shape[1])  # type: ignore[arg-type]
            weight = node.args[1]
            if any(_named(path, entry) for entry in self.config.ignore):
                yield Miss(component, "in ignore", path, node.name)
            elif not isinstance(weight, fx.Node) or weight.op != "get_attr":
                yield Miss(component, "its weight is computed, not stored", path, node.name)
            elif width % self.config.group_size and self.config.indivisible == "skip":
                reason = (
                    f"its width {width} is not divisible by group_size {self.config.group_size}"
                )
                yield Miss(component, reason, path, node.name)
            else:
                check_width(width, self.config.group_size, path)
                yield Match(component, node)

    def prepare(self, program: Program, matches: list[Match], context: Context) -> None:
        """Search scales and codes of all groups before the graph is touched."""
        self._folds: dict[str, Fold | None] = {}
        self._scales: dict[str, torch.Tensor] = {}  # by the group's first weight
        self._quantized: dict[str, Quantized] = {}
        self._errors: dict[str, AwqResult] = {}
        self._groups = self._group(matches)
        self._explicit: dict[tuple[str, str], fx.Node] = {}
        self._folded: set[str] = set()
        if context.dry or not matches:
            return
        graphs = list(program.components.values())
        for names in self._groups.values():
            self._folds[names[0]] = find_fold(graphs, names)
        if self.config.method == "rtn":
            for done, names in enumerate(self._groups.values(), 1):
                context.progress("rounding", done, len(self._groups))
                self._round(program, names)
        else:
            self._calibrate(program, context)
        self._note(context)

    @staticmethod
    def _group(matches: list[Match]) -> dict[str, list[str]]:
        """Weight names by the input they share, in graph order."""
        groups: dict[str, list[str]] = {}
        for match in matches:
            names = groups.setdefault(str(match.node.args[0]), [])
            if (name := weight_name(match.node)) not in names:
                names.append(name)
        return groups

    def _round(self, program: Program, names: list[str]) -> None:
        weights = [program.weights[n] for n in names]
        self._scales[names[0]] = torch.ones(weights[0].shape[1], device=weights[0].device)
        for name, weight in zip(names, weights, strict=True):
            self._quantized[name] = quantize_groupwise(
                weight, self.config.group_size, scale_dtype=program.dtype
            )

    def _calibrate(self, program: Program, context: Context) -> None:
        given = self.config.calibration
        assert given is not None
        samples = read_samples(Path(context.base) / Path(given.path).expanduser(), given.samples)
        prompts = [tokenize(context.processor, s) for s in samples]
        component, inputs = component_inputs(program, self.config.component, prompts)
        context.notes["calibration_samples"] = len(samples)
        lockstep = Lockstep(component, program.weights)
        by_name = {n: names for names in self._groups.values() for n in names}

        def visit(node: fx.Node, values: list[torch.Tensor]) -> None:
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or str(weight.target) not in by_name:
                return
            names = by_name[str(weight.target)]
            if names[0] not in self._scales:
                self._search(program, names, values)
                context.progress("calibrating", len(self._scales), len(self._groups))
            quantized = self._quantized[str(weight.target)]
            lockstep.overrides[node] = _stand_in(self._scales[names[0]], quantized, node, program)

        lockstep.run(inputs, visit)

    def _search(self, program: Program, names: list[str], values: list[torch.Tensor]) -> None:
        weights = [program.weights[n] for n in names]
        stats = ActivationStats(weights[0].shape[1], weights[0].device)
        for x in values:
            stats.update(x)
        explicit = self._folds[names[0]] is None

        def applied(scale: torch.Tensor) -> torch.Tensor:
            """An explicit scale is stored inverted, in the program's dtype."""
            return 1 / (1 / scale).to(program.dtype).float() if explicit else scale

        result = quantize_awq(
            weights,
            stats,
            self.config.group_size,
            clip=self.config.clip,
            scale_dtype=program.dtype,
            applied=applied,
        )
        self._scales[names[0]] = result.scale
        self._quantized |= dict(zip(names, result.quantized, strict=True))
        self._errors[names[0]] = result

    def _note(self, context: Context) -> None:
        notes = context.notes
        notes["groups"] = len(self._groups)
        scaled = [n for n, scale in self._scales.items() if not bool((scale == 1).all())]
        notes["folded_scales"] = sum(self._folds[n] is not None for n in scaled)
        notes["explicit_scales"] = sum(self._folds[n] is None for n in scaled)
        notes["unscaled_groups"] = len(self._scales) - len(scaled)
        if self._errors:
            # Each group counts alike, whatever the size of its outputs.
            shares = [r.error_awq / r.error_rtn for r in self._errors.values() if r.error_rtn]
            notes["output_error_awq_over_rtn"] = sum(shares) / len(shares) if shares else 1.0
            notes["output_error"] = {
                n: {
                    "rtn": r.error_rtn / (r.output_power or 1.0),
                    "awq": r.error_awq / (r.output_power or 1.0),
                    "clipped": r.clipped,
                }
                for n, r in self._errors.items()
            }

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        name = weight_name(match.node)
        group = next(names for names in self._groups.values() if name in names)
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" not in program.weights:
            self._store(program, name, stem, context)
        for component in program.components.values():
            for node in list(component.graph.nodes):
                if node.target is LINEAR and _uses(node, name):
                    self._replace(program, component, node, stem, group, context)

    def _store(self, program: Program, name: str, stem: str, context: Context) -> None:
        rows, width = program.weights[name].shape
        groups = width // self.config.group_size
        if context.dry:
            meta = torch.device("meta")
            for part, columns, dtype in (
                ("qweight", width // 8, torch.int32),
                ("scales", groups, program.dtype),
                ("zero_points", groups, torch.uint8),
            ):
                program.weights[f"{stem}.{part}"] = torch.empty(
                    (rows, columns), dtype=dtype, device=meta
                )
            return
        quantized = self._quantized.pop(name)
        program.weights[f"{stem}.qweight"] = pack_int4(quantized.codes)
        program.weights[f"{stem}.scales"] = quantized.scales.to(program.dtype)
        program.weights[f"{stem}.zero_points"] = quantized.zero_points

    def _replace(
        self,
        program: Program,
        component: Component,
        node: fx.Node,
        stem: str,
        group: list[str],
        context: Context,
    ) -> None:
        edit = Editor(component)
        parts = [
            edit.weight(n, program.weights[n], before=node)
            for n in (f"{stem}.qweight", f"{stem}.scales", f"{stem}.zero_points")
        ]
        x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
        if not context.dry:
            x = self._scaled(program, component, edit, node, group)
        new = edit.call(
            W4A16_LINEAR, x, *parts, bias, self.config.group_size, before=node, origin=node
        )
        edit.replace(node, new)
        edit.sweep()

    def _scaled(
        self,
        program: Program,
        component: Component,
        edit: Editor,
        node: fx.Node,
        group: list[str],
    ) -> fx.Node:
        """The linear's input, divided by the group's scale, here or in the op before."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        scale = self._scales[group[0]]
        if bool((scale == 1).all()):
            return x
        fold = self._folds[group[0]]
        if fold is not None:
            if group[0] not in self._folded:
                apply_fold(program, fold, scale)
                self._folded.add(group[0])
            return x
        key = (component.name, group[0])
        if key not in self._explicit:
            name = f"{group[0].removesuffix('.weight')}.inverse_scale"
            program.weights[name] = (1 / scale).to(program.dtype)
            held = edit.weight(name, program.weights[name], before=node)
            self._explicit[key] = edit.call(aten.mul.Tensor, x, held, before=node, origin=node)
        return self._explicit[key]

    def ensures(self, program: Program) -> None:
        for found in self.match(program):
            if isinstance(found, Match):
                raise GraphError(f"quantize_linear left {found.site().where} behind")


def _uses(node: fx.Node, name: str) -> bool:
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == name


def _stand_in(
    scale: torch.Tensor, quantized: Quantized, node: fx.Node, program: Program
) -> Override:
    """What the quantized linear will compute, for calibrating the layers behind it."""
    bias = node.args[2] if len(node.args) > 2 else None
    stored = program.weights[str(bias.target)] if isinstance(bias, fx.Node) else None

    def run(x: torch.Tensor) -> torch.Tensor:
        weight = quantized.dequantize().to(x.dtype)
        return torch.nn.functional.linear((x / scale).to(x.dtype), weight, stored)

    return run
