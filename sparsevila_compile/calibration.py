"""Calibration: run samples through a graph in lockstep and look at what flows into its linears.

The graph is walked once, node by node; each node is computed for all samples before the next one.
So only the values alive at one place are held, whatever the model's depth, and a visitor can
replace what a linear computes before anything behind it runs: later layers see the error of
earlier ones, as AWQ wants it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
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

Visitor = Callable[[fx.Node, list[torch.Tensor]], Override | None]
"""Sees a linear and its input for each sample before it runs; None lets it run as it is."""


@dataclass(frozen=True)
class Sample:
    """One calibration conversation; ``where`` is its file and line."""

    where: str
    messages: list[Any]
    pictures: list[Image.Image]


def read_samples(path: Path, limit: int) -> list[Sample]:
    """Calibration conversations: JSON lines ``{"image": FILE, "messages": [chat messages]}``.

    Pictures are found beside the file. ``images`` may list several.

    Args:
        limit: conversations read at most.

    Raises:
        UserError: the file or a picture is missing or damaged, or there is nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such calibration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the calibration data: {error}") from error
    samples: list[Sample] = []
    for number, line in enumerate(lines, 1):
        if len(samples) == limit:
            break
        if line.strip():
            samples.append(_sample(f"{path}:{number}", line, path.parent))
    if not samples:
        raise UserError(f"{path}: no calibration conversation in this file")
    return samples


def _sample(where: str, line: str, folder: Path) -> Sample:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    entry = entry if isinstance(entry, dict) else {}
    messages, several = entry.get("messages"), entry.get("images", [])
    names = [entry["image"]] if "image" in entry else []
    names += several if isinstance(several, list) else [None]
    if not isinstance(messages, list) or not all(isinstance(n, str) and n for n in names):
        raise UserError(f'{where}: want {{"image": FILE, "messages": [chat messages]}}')
    try:
        pictures = [open_picture(folder / name) for name in names]
    except (UserError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UserError(f"{where}: {error}") from error
    return Sample(where, messages, pictures)


def tokenize(processor: Any, sample: Sample) -> dict[str, Any]:
    """Processor outputs for one conversation, answers included.

    Raises:
        UserError: the processor or its chat template refuses the conversation.
    """
    try:
        text = processor.apply_chat_template(sample.messages, tokenize=False)
        arguments = {"images": sample.pictures} if sample.pictures else {}
        return dict(processor(text=[text], return_tensors="pt", **arguments))
    except Exception as error:  # whatever a third-party template or processor raises
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{sample.where}: the processor refuses this conversation: "
            f"{type(error).__name__}: {detail}"
        ) from error


def component_inputs(
    program: Program, component: str, processor: Any, samples: Collection[Sample]
) -> tuple[Component, list[dict[str, Any]]]:
    """A lowered copy of a component, and its inputs for each conversation, one row each.

    Rows have no padding. The language component's head is asked for every text token.

    Args:
        component: ``language`` (with its cache inserted) or ``vision``.

    Raises:
        UserError: a conversation does not fit the model.
    """
    lowered = program.snapshot()
    _lower(lowered)
    family = family_of(program.config)
    engine, reader = Engine(lowered, family), PromptReader(lowered, family)
    inputs = []
    for sample in samples:
        prompt = tokenize(processor, sample)
        try:
            if component == "vision":
                inputs.append(_vision_inputs(engine, reader, prompt))
            else:
                inputs.append(_language_inputs(engine, reader, prompt))
        except UserError as error:
            raise UserError(f"{sample.where}: {error}") from error
    return lowered.component(component), inputs


def _vision_inputs(engine: Engine, reader: PromptReader, prompt: dict[str, Any]) -> dict[str, Any]:
    fresh = [row.pictures for row in reader.read(prompt)]
    if not any(fresh):
        raise UserError("no picture; calibrating the vision component needs one here")
    return engine.vision_inputs(fresh)


def _language_inputs(
    engine: Engine, reader: PromptReader, prompt: dict[str, Any]
) -> dict[str, Any]:
    conversation = Conversation(engine, reader, 1, engine.program.max_length)
    inputs = conversation.first_inputs(prompt)
    [held] = conversation.rows
    text = (~held.visual[held.kept]).nonzero()[:, 0]
    inputs["logit_rows"] = text[None].to(engine.device)
    return inputs


def _lower(program: Program) -> None:
    """Bind the copy's ops to kernels; references would be slow on long prompts."""
    pass_ = PASSES["lower_ops"](PASSES["lower_ops"].config_type())
    matches = list(pass_.match(program))
    context = Context()
    for match in matches:
        pass_.rewrite(program, match, context)  # type: ignore[arg-type]
    pass_.finish(program, matches, context)  # type: ignore[arg-type]


class Lockstep:
    """Walks a graph for many samples at once."""

    def __init__(self, component: Component, weights: dict[str, torch.Tensor]) -> None:
        self.graph = component.graph
        self.weights = weights
        self._last_use: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self._last_use.setdefault(node, []).append(source)

    @torch.no_grad()
    def run(
        self, samples: list[dict[str, Any]], wanted: Collection[fx.Node], visit: Visitor
    ) -> None:
        """Compute up to the last of the ``wanted`` linears, each of which is visited.

        Args:
            samples: the component's inputs by name; each tensor is let go of (taken out of its
                dictionary) as soon as nothing needs it.
            wanted: ``aten.linear`` nodes of the component.
        """
        left = set(wanted)
        values: list[dict[fx.Node, Any]] = [{} for _ in samples]
        for node in self.graph.nodes:
            if not left:
                return
            override = None
            if node in left:
                left.remove(node)
                override = visit(node, [v[node.args[0]] for v in values])
            for sample, held in zip(samples, values, strict=True):
                held[node] = self._compute(node, sample, held, override)
                for source in self._last_use.get(node, ()):
                    del held[source]
                if not node.users:
                    del held[node]

    def _compute(
        self,
        node: fx.Node,
        sample: dict[str, Any],
        held: dict[fx.Node, Any],
        override: Override | None,
    ) -> Any:
        if node.op == "placeholder":
            return sample.pop(str(node.target))
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if override is not None:
            return override(held[node.args[0]])  # type: ignore[index]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: held[n])  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]
