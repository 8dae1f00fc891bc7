"""Calibration: run samples through a graph in lockstep and look at what flows into its linears.

The graph is walked once, node by node; each node is computed for all samples before the next one.
So only the values alive at one place are held, whatever the model's depth, and a visitor can
replace what a linear computes before anything behind it runs: later layers see the error of
earlier ones, as AWQ wants it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sparsevila_compile.conversation import Conversation
from sparsevila_compile.engine import Engine
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import family_of
from sparsevila_compile.pass_base import PASSES, Context
from sparsevila_compile.program import Component, Program
from sparsevila_compile.prompt import PromptReader
from sparsevila_compile.session import open_picture

Override = Callable[[torch.Tensor], torch.Tensor]
"""What a linear computes instead, from its input."""


def read_samples(path: Path, limit: int) -> list[dict[str, Any]]:
    """Calibration conversations: JSON lines ``{"image": FILE, "messages": [chat messages]}``.

    Pictures are found beside the file. ``images`` may list several.

    Raises:
        UserError: the file or a picture is missing or damaged, or there is nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the calibration data: {error}") from error
    samples: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(samples) == limit:
            break
        try:
            entry = json.loads(line)
            messages = entry["messages"]
            names = entry.get("images") or ([entry["image"]] if "image" in entry else [])
            if not isinstance(messages, list) or not all(isinstance(n, str) for n in names):
                raise TypeError("messages must be a list, image a file name")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}:{number}: want {{"image": FILE, "messages": […]}}: {type(error).__name__} {error}'
            ) from error
        pictures = [open_picture(path.parent / name) for name in names]
        samples.append({"messages": messages, "images": pictures})
    if not samples:
        raise UserError(f"{path}: no calibration conversation in this file")
    return samples


def tokenize(processor: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Processor outputs for one conversation, answers included."""
    try:
        text = processor.apply_chat_template(sample["messages"], tokenize=False)
        arguments = {"images": sample["images"]} if sample["images"] else {}
        return dict(processor(text=[text], return_tensors="pt", **arguments))
    except UserError:
        raise
    except Exception as error:  # whatever a third-party template or processor raises
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"calibration: the processor refuses a conversation: {type(error).__name__}: {detail}"
        ) from error


def component_inputs(
    program: Program, component: str, prompts: Iterable[dict[str, Any]]
) -> tuple[Component, list[dict[str, Any]]]:
    """A lowered copy of a component, and its inputs for each prompt.

    Args:
        component: ``language`` (with its cache inserted) or ``vision``.
    """
    lowered = program.snapshot()
    _lower(lowered)
    family = family_of(program.config)
    engine, reader = Engine(lowered, family), PromptReader(lowered, family)
    inputs = []
    for prompt in prompts:
        if component == "vision":
            fresh = [row.pictures for row in reader.read(prompt)]
            if not any(fresh):
                raise UserError(
                    "calibration of the vision component needs a picture in every conversation"
                )
            inputs.append(engine.vision_inputs(fresh))
        else:
            conversation = Conversation(engine, reader, 1, lowered.max_length)
            inputs.append(conversation.first_inputs(prompt))
    return lowered.component(component), inputs


def _lower(program: Program) -> None:
    """Bind the copy's ops to kernels; references would be slow on long prompts."""
    pass_ = PASSES["lower_ops"](PASSES["lower_ops"].config_type())
    matches = list(pass_.match(program))
    context = Context()
    for match in matches:
        pass_.rewrite(program, match, context)  # type: ignore[arg-type]
    pass_.finish(program, matches, context)  # type: ignore[arg-type]


class Lockstep:
    """Walks a graph for many samples at once.

    ``visit(node, inputs)`` is called for every ``aten.linear`` before it runs, with the node's
    input of each sample; entries it puts into ``overrides`` replace that node's computation.
    """

    def __init__(self, component: Component, weights: dict[str, torch.Tensor]) -> None:
        self.graph = component.graph
        self.weights = weights
        self.overrides: dict[fx.Node, Override] = {}
        self._last_use: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self._last_use.setdefault(node, []).append(source)

    @torch.no_grad()
    def run(
        self,
        samples: list[dict[str, Any]],
        visit: Callable[[fx.Node, list[torch.Tensor]], None],
    ) -> list[tuple[Any, ...]]:
        """Returns each sample's outputs."""
        values: list[dict[fx.Node, Any]] = [{} for _ in samples]
        results: list[tuple[Any, ...]] = []
        for node in self.graph.nodes:
            if node.op == "output":
                results = [tuple(v[r] for r in node.args[0]) for v in values]
                break
            if node.target is torch.ops.aten.linear.default:
                visit(node, [v[node.args[0]] for v in values])
            for sample, held in zip(samples, values, strict=True):
                held[node] = self._compute(node, sample, held)
                for source in self._last_use.get(node, ()):
                    del held[source]
                if not node.users:
                    held.pop(node)
        return results

    def _compute(self, node: fx.Node, sample: dict[str, Any], held: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return sample[str(node.target)]
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if node in self.overrides:
            return self.overrides[node](held[node.args[0]])  # type: ignore[index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: held[n])  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]
