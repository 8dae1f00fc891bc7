"""From a Hugging Face model to a :class:`~sparsevila_compile.program.Program`.

Three components are exported: ``embed``, ``vision`` (projector included) and ``language``, once,
without a cache. Sizes that differ between requests (batch, text length, number and size of
pictures) are symbolic. Data-dependent tensors of packed encoders are inputs, computed on the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from sparsevila_compile import hf
from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.families import Family, family_of, layout_of, patch_values
from sparsevila_compile.ops import ATTENTION
from sparsevila_compile.program import Component, Program

TAP = "encoder_state"
_PREFIX = "traced."  # where the wrappers below hold the model


class _Embed(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.traced = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.traced.get_input_embeddings()(input_ids)  # type: ignore[operator, no-any-return]


class _Language(torch.nn.Module):
    """Embeddings to logits, the head applied only to the rows that are asked for.

    Logits of every row of a long prompt would take more memory than the caches.
    """

    def __init__(self, model: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.traced = model
        self.text_model = [hf.part(model, family, "text model")]  # in a list: not a second owner
        self.head = [hf.part(model, family, "language-model head")]

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.text_model[0](
            inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        rows = logit_rows[:, :, None].expand(-1, -1, hidden.shape[-1])
        return self.head[0](hidden.gather(1, rows))  # type: ignore[no-any-return]


class _BatchedVision(torch.nn.Module):
    """Pictures of one resolution: pixels ``[pictures, 3, H, W]`` to ``[pictures·tokens, width]``.

    transformers goes on to make a Python list of one tensor a picture, which would fix their
    number; so the projector's output is taken as it leaves the projector, and the list is made of
    its first picture alone (dead code, which the export drops).
    """

    def __init__(self, model: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.traced = model
        self.encoder = [hf.part(model, family, "encoder")]
        self.projector = [hf.part(model, family, "projector")]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def encoded(module: Any, args: Any, output: Any) -> None:
            seen["state"] = output.last_hidden_state

        def projected(module: Any, args: Any, output: Any) -> torch.Tensor:
            seen["tokens"] = output
            return output[:1]  # type: ignore[no-any-return]

        hooks = [
            self.encoder[0].register_forward_hook(encoded),
            self.projector[0].register_forward_hook(projected),
        ]
        try:
            hf.base_model(self.traced).get_image_features(pixel_values, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
        return seen["tokens"].flatten(0, 1), seen["state"]


class _PackedVision(torch.nn.Module):
    """Pictures of any size in one sequence: patches ``[patches, values]`` to ``[tokens, width]``."""

    def __init__(self, model: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.traced = model
        self.encoder = [hf.part(model, family, "encoder")]
        self.names = family.precomputed

    def forward(
        self, pixel_values: torch.Tensor, *precomputed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The lengths only choose kernels in transformers; our op reads the bounds themselves.
        lengths = {"max_seqlen": 1, "max_window_seqlen": 1}
        given = dict(zip(self.names, precomputed, strict=True))
        out = self.encoder[0](pixel_values, grid_thw=None, return_dict=True, **given, **lengths)
        return out.pooler_output, out.last_hidden_state


def _export(
    wrapper: torch.nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...], what: str
) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(wrapper, args, dynamic_shapes=shapes, strict=False)
    except UserError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{what} cannot be traced: {type(error).__name__}: {detail}") from error


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    path = re.sub(r"^L\['self'\]\.?", "", path)
    return path.removeprefix(_PREFIX)


def _component(
    name: str,
    program: ExportedProgram,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    weights: dict[str, torch.Tensor],
) -> Component:
    """Turn an exported program into a component: weights become ``get_attr``, inputs get names."""
    signature = program.graph_signature
    if signature.user_inputs_to_mutate or signature.buffers_to_mutate:
        raise GraphError(f"{name}: the traced graph mutates its inputs or buffers")
    kinds = {spec.arg.name: spec for spec in signature.input_specs}  # type: ignore[union-attr]
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    names = iter(inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                new = graph.placeholder(next(names))
            elif not node.users:
                continue  # a weight of another component
            else:
                target = str(spec.target)
                held = program.constants if target in program.constants else program.state_dict
                public = target.removeprefix(_PREFIX)
                if spec.kind == InputKind.CONSTANT_TENSOR:
                    public = f"{name}.{public}"
                weights.setdefault(public, held[target].detach())
                new = graph.create_node("get_attr", public)
            new.meta = dict(node.meta)
        elif node.op == "output":
            results = tuple(mapped[n] for n in node.args[0])
            if len(results) != len(outputs):
                raise GraphError(f"{name}: {len(results)} outputs traced, {len(outputs)} expected")
            new = graph.output(results)
        else:
            new = graph.node_copy(node, lambda n: mapped[n])
            new.meta["module_path"] = _module_path(node)
        mapped[node] = new
    return Component(name, graph, outputs)


def trace(model: Any) -> Program:
    """Trace a vision-language model (real weights, or none: see :func:`hf.empty_model`).

    Args:
        model: a transformers ``…ForConditionalGeneration`` in evaluation mode.

    Returns:
        A program at stage ``trace``; its weights are the model's own tensors.

    Raises:
        UserError: the model is not supported; says which accessor or attention is the reason.
    """
    if model.training:
        raise UserError("the model is in training mode, where dropout is random; call eval() on it")
    hf.check_adopted(model)
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights say it
    family = family_of(config)
    layout = layout_of(family, config)
    some = next(model.parameters())
    width = int(config["text_config"]["hidden_size"])
    weights: dict[str, torch.Tensor] = {}
    dynamic = Dim.DYNAMIC

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=some.device)

    def floats(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=some.dtype, device=some.device)

    two = {0: dynamic, 1: dynamic}
    with hf.traceable_attention(model):
        embed = _component(
            "embed",
            _export(_Embed(model), (ints(2, 5),), (two,), "the embedding"),
            ("input_ids",),
            ("inputs_embeds",),
            weights,
        )
        mrope = family.rope == "mrope"
        positions = ints(3, 2, 7) if mrope else ints(2, 7)
        language = _component(
            "language",
            _export(
                _Language(model, family),
                (floats(2, 7, width), positions, ints(2, 3)),
                (two, {1: dynamic, 2: dynamic} if mrope else two, two),
                "the language model",
            ),
            ("inputs_embeds", "position_ids", "logit_rows"),
            ("logits",),
            weights,
        )
        vision = _trace_vision(model, family, config, weights, floats)
    program = Program(
        family=family.model_type,
        config=config,
        components={"embed": embed, "vision": vision, "language": language},
        weights=weights,
        layout=layout,
        dtype=some.dtype,
        device=some.device,
        taps=(TAP,),
    )
    _check_attention(program)
    return program


def _trace_vision(
    model: Any,
    family: Family,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    floats: Callable[..., torch.Tensor],
) -> Component:
    vision = config["vision_config"]
    outputs = ("visual_tokens", TAP)
    one = {0: Dim.DYNAMIC}
    if not family.precomputed:
        side = int(vision["image_size"])
        pixels = floats(2, int(vision.get("num_channels", 3)), side, side)
        exported = _export(_BatchedVision(model, family), (pixels,), (one,), "the vision tower")
        return _component("vision", exported, ("pixel_values",), outputs, weights)
    merge = int(vision["spatial_merge_size"])
    # Two pictures of different sizes, each more than one window, so that nothing looks equal.
    side = merge * (int(vision["window_size"]) // int(vision["patch_size"]) // merge + 1)
    grid = torch.tensor([[1, side, side + merge], [1, side + 2 * merge, side]])
    pixels = floats(int(grid.prod(1).sum()), patch_values(vision))
    host = hf.host_vision_inputs(config, family.precomputed, grid)
    args = (pixels, *(t.to(pixels.device) for t in host.values()))
    shapes = (one, tuple(one for _ in host))
    exported = _export(_PackedVision(model, family), args, shapes, "the vision tower")
    return _component("vision", exported, ("pixel_values", *host), outputs, weights)


def _check_attention(program: Program) -> None:
    """Every attention must have come out as our op: a module that bypasses the interface is refused."""
    for component in program.components.values():
        for node in component.graph.nodes:
            if node.op == "call_function" and "scaled_dot_product" in str(node.target):
                raise UserError(
                    f"{program.family}: {node.meta.get('module_path')} calls attention directly, "
                    "not through transformers' attention interface; it cannot be rewritten"
                )
    for name in ("vision", "language"):
        if not any(n.target is ATTENTION for n in program.component(name).graph.nodes):
            raise UserError(f"{program.family}: the {name} component has no attention to rewrite")


def trace_function(
    name: str,
    module: torch.nn.Module,
    inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]],
    outputs: tuple[str, ...],
    device: torch.device,
) -> Component:
    """Trace a weightless module of our own into a component.

    Args:
        inputs: dtype and shape by name, in the order of ``forward``; a string is a symbolic size,
            equal where the strings are.
    """
    sizes: dict[str, int] = {}
    dims: dict[str, Any] = {}
    args, shapes = [], []
    for dtype, shape in inputs.values():
        for s in shape:
            if isinstance(s, str) and s not in sizes:
                sizes[s] = 5 + 2 * len(sizes)
                dims[s] = Dim(s, min=2)
        concrete = [s if isinstance(s, int) else sizes[s] for s in shape]
        args.append(torch.zeros(concrete, dtype=dtype, device=device))
        shapes.append({i: dims[s] for i, s in enumerate(shape) if isinstance(s, str)})
    exported = _export(module, tuple(args), tuple(shapes), name)
    weights: dict[str, torch.Tensor] = {}
    component = _component(name, exported, tuple(inputs), outputs, weights)
    if weights:
        raise GraphError(f"{name}: a weightless function traced with weights {sorted(weights)}")
    return component
