"""``quantize_linear``: linears of one component in 4 or 8 bits.

Linears that share an input form a group with one per-channel scale, searched on calibration data;
the scale is folded into the op before the group where the graph allows. Where not, AWQ multiplies
by it explicitly and SmoothQuant leaves the group unsmoothed. Calibration walks the graph once (see
``calibration``), so later layers are searched on what the quantized earlier ones put out.

AWQ clips all linears. Its authors leave q_proj and k_proj unclipped, since their outputs are
multiplied with each other; on the card model of ``examples/cards`` clipping them too made the
median error of the logits 3 to 6 % smaller at every group size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import fx

from sparsevila_compile.awq import check_finite, check_width
from sparsevila_compile.calibration import Lockstep, Override, component_inputs, read_samples
from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.kernels.w8a8_linear.op import float8_missing
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

from .linear_schemes import W4A16, W8A8, Applied, Parts, Scheme, Searched, named
from .scale_folding import Fold, applied_scale, bias_of, find_fold, folded, weight_of

aten = torch.ops.aten

_ROUNDED_AT_ONCE = 1 << 26
"""Values of a weight that are rounded at once: 256 MB in float32."""
LINEAR = aten.linear.default

METHODS: dict[str, tuple[str, ...]] = {
    "w4a16": ("awq", "rtn"),
    "w8a8": ("smoothquant", "rtn"),
    "fp8": ("rtn",),
}
"""The methods of each scheme, its default first."""


class Calibration(BaseModel):
    """Where calibration conversations come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        description='JSON lines {"image": FILE, "messages": [chat messages]}; pictures beside it.'
    )
    samples: int = Field(default=32, gt=0, description="Conversations used, from the first on.")


class QuantizeLinearConfig(PassConfig):
    """Options of ``quantize_linear``."""

    scheme: Literal["w4a16", "w8a8", "fp8"] = Field(
        default="w4a16",
        description="4-bit groupwise weights with activations as they are (w4a16), or weights and "
        "activations in 8 bits, int8 (w8a8) or float8_e4m3fn (fp8).",
    )
    method: Literal["awq", "smoothquant", "rtn"] | None = Field(
        default=None,
        description="awq: activation-aware scales and clipping (w4a16, needs calibration); "
        "smoothquant: outliers of the input moved to the weights (w8a8, needs calibration); rtn: "
        "plain round-to-nearest. By default awq for w4a16, smoothquant for w8a8, rtn for fp8.",
    )
    component: Literal["language", "vision"] = Field(
        default="language", description="Which component's linears are quantized."
    )
    group_size: Literal[32, 64, 128] = Field(
        default=128, description="Input channels that share a scale and a zero_point (w4a16)."
    )
    clip: bool = Field(default=True, description="Search how far to clip each group's range (awq).")
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="How much of the difficulty moves to the weights (smoothquant).",
    )
    calibration: Calibration | None = Field(
        default=None, description="Calibration data (awq, smoothquant)."
    )
    ignore: tuple[str, ...] = Field(
        default=("lm_head",),
        description="Module paths (or their ends) to leave in floating point; an entry that names "
        "nothing is an error.",
    )
    indivisible: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a linear whose width group_size does not divide (w4a16).",
    )

    @property
    def how(self) -> str:
        """The method, or the scheme's default."""
        return self.method or METHODS[self.scheme][0]

    @model_validator(mode="after")
    def _fits_together(self) -> QuantizeLinearConfig:
        scheme, how = self.scheme, self.how
        if how not in METHODS[scheme]:
            others = " or ".join(METHODS[scheme])
            raise ValueError(f"method {how} is not one of scheme {scheme}; set method: {others}")
        if how == "rtn":
            unused = {"calibration", "clip", "alpha"}
        else:
            unused = {"alpha"} if how == "awq" else {"clip"}
        for key in sorted(unused & self.model_fields_set):
            if getattr(self, key) is not None:
                searching = METHODS[scheme][0]
                instead = "" if searching == "rtn" else f", or set method: {searching}"
                raise ValueError(f"{key} is not used by method {how}; remove it{instead}")
        if scheme != "w4a16":
            for key in ("group_size", "indivisible"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key} is not used by scheme {scheme}; remove it")
        if how != "rtn" and self.calibration is None:
            raise ValueError(
                f"method {how} needs calibration: {{path: …}}; give it, or set method: rtn"
            )
        return self

    def storage(self) -> Scheme:
        """How linears are stored."""
        if self.scheme == "w4a16":
            return W4A16(self.group_size, self.clip)
        return W8A8(torch.int8 if self.scheme == "w8a8" else torch.float8_e4m3fn, self.alpha)


@dataclass
class Group:
    """Linears that share their input, by weight name, in graph order."""

    names: list[str] = field(default_factory=list)
    fold: Fold | None = None
    found: Searched | None = None
    folded: bool = False

    @property
    def scale(self) -> torch.Tensor | None:
        """Float32 ``[K]``, what their input is divided by, or None for 1."""
        return None if self.found is None else self.found.scale

    @property
    def inverse_name(self) -> str:
        return f"{self.names[0].removesuffix('.weight')}.inverse_scale"


def _named(path: str, entry: str) -> bool:
    return path == entry or path.endswith("." + entry)


@register
class QuantizeLinear(Pass[QuantizeLinearConfig]):
    """Every matched ``aten.linear`` becomes a quantized one, in all components that share it."""

    name = "quantize_linear"
    stage = "quantize"
    summary = "stores linears in 4 bits (AWQ w4a16) or 8 (SmoothQuant w8a8, fp8)"
    config_type = QuantizeLinearConfig
    repeatable = True  # once a component

    def requires(self, program: Program) -> None:
        missing = float8_missing(program.device) if self.config.scheme == "fp8" else None
        if missing is not None:
            raise UserError(f"scheme: fp8 {missing}; use scheme: w8a8")
        if self.config.component == "language" and not program.caches:
            raise UserError(
                "language linears are calibrated through the KV cache; list insert_kv_cache before it"
            )
        paths = [module_path(n) for n in calls(program, self.config.component, LINEAR)]
        stored = sum(1 for _ in calls(program, self.config.component, W4A16_LINEAR))
        left = [p for p in paths if not any(_named(p, e) for e in self.config.ignore)]
        if stored and not left and not self.config.optional:
            raise UserError(
                f"the {stored} {self.config.component} linears are in 4 bits already, as the "
                "checkpoint or an earlier quantize_linear has them; remove this one, or give it "
                "the other component"
            )
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
            elif self.config.scheme == "w4a16":
                reason = self._indivisible(int(tensor_of(node.args[1]).shape[1]), path)  # type: ignore[arg-type]
            if reason is None:
                yield Match(component, node)
            else:
                yield Miss(component, reason, path, node.name)
        for node in calls(program, component, W4A16_LINEAR):
            yield Miss(component, "in 4 bits already", module_path(node), node.name)

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
        self._packed: dict[str, Parts] = {}
        self._scheme = self.config.storage()
        if context.dry or not matches:
            return
        if self.config.how == "rtn":
            for match in matches:  # before anything is rewritten
                self._check(program, _name(match.node))
        else:
            for group in self._groups:
                group.fold = find_fold(list(program.components.values()), group.names)
            self._calibrate(program, context)
        self._note(context)

    def spends_weights(self, program: Program) -> bool:
        """Rounding needs each weight once: a GPU never holds the model twice."""
        return self.config.how == "rtn" and program.device.type == "cuda"

    @staticmethod
    def _check(program: Program, name: str) -> None:
        try:
            check_finite(program.weights[name])
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    def _rounded(self, program: Program, name: str, context: Context) -> Parts:
        """A weight rounded to nearest, some rows at a time: they are float32 for a while."""
        group = self._group_of[name]
        if name == group.names[0]:
            context.progress("rounding", self._groups.index(group) + 1, len(self._groups))
        weight = program.weights[name]
        rows = max(1, _ROUNDED_AT_ONCE // max(1, weight.shape[1]))
        try:
            pieces = [self._scheme.rounded(part, program.dtype) for part in weight.split(rows)]  # type: ignore[no-untyped-call]
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

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
            if group.found is None:
                self._search(program, group, values)
                done = sum(g.found is not None for g in self._groups)
                context.progress("calibrating", done, len(self._groups))
            return self._stand_in(program, group, node)

        Lockstep(component, program.weights).run(inputs, wanted, visit)

    def _search(self, program: Program, group: Group, values: list[torch.Tensor]) -> None:
        weights = [program.weights[n] for n in group.names]
        applied = self._applied(program, group)
        try:
            group.found = self._scheme.searched(weights, values, program.dtype, applied)
        except UserError as error:
            raise UserError(f"{group.names[0]}: {error}") from error
        self._packed |= zip(group.names, group.found.stored, strict=True)
        group.found.stored = []

    def _applied(self, program: Program, group: Group) -> Applied | None:
        """What becomes of a scale that is wanted; None where the group can have none."""
        fold = group.fold
        if fold is not None:
            held = dict(program.weights)  # what has been quantized is folded into as such
            for name, parts in self._packed.items():
                held |= named(name, parts)
            return lambda scale: applied_scale(held, fold, scale)
        if self._scheme.explicit:
            return lambda scale: 1 / _inverse(scale, program.dtype).float()
        return None

    def _stand_in(self, program: Program, group: Group, node: fx.Node) -> Override:
        """What the quantized linear will compute, for calibrating the layers behind it."""
        parts, bias = self._packed[_name(node)], bias_of(node)
        stored = None if bias is None else program.weights[str(bias.target)]
        arguments = self._scheme.arguments(list(parts.values()), stored)

        def run(x: torch.Tensor) -> torch.Tensor:
            if group.scale is not None:
                x = (x / group.scale).to(x.dtype)
            out: torch.Tensor = self._scheme.op(x, *arguments)
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
        found = {g.names[0]: g.found for g in self._groups if g.found is not None}
        reasons = Counter(f.reason for f in found.values() if f.reason is not None)
        if reasons:
            notes["unscaled_because"] = dict(reasons)
        if found:
            how = self.config.how
            # Each group counts alike, whatever the size of its outputs.
            shares = [f.errors[how] / f.errors["rtn"] for f in found.values() if f.errors["rtn"]]
            notes[f"output_error_{how}_over_rtn"] = sum(shares) / len(shares) if shares else 1.0
            notes["output_error"] = {n: f.errors for n, f in found.items()}

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
            parts = self._scheme.empty(rows, width, program.dtype)
        elif name in self._packed:
            parts = self._packed.pop(name)
        else:
            parts = self._rounded(program, name, context)
        stored = named(name, parts)
        program.weights |= stored
        for component in program.components.values():
            for node in list(component.graph.nodes):
                if node.target is LINEAR and weight_of(node) == name:
                    self._replace(program, component, node, stored, group)
        if not any(name in c.weight_names() for c in program.components.values()):
            del program.weights[name]

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
        arguments = self._scheme.arguments(parts, bias_of(node))
        new = edit.call(self._scheme.op, x, *arguments, before=node, origin=node)
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
