"""Recognises the forward of a vision-language model in a graph that Dynamo captured.

The whole forward is one graph: embedding, token merge, layers that append to the cache, head. What
depends on the language model's weights is replaced; of it only logits and caches may leave the
graph. The rest (the visual tokens that the forward also returns, say) remains a graph.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsevila_compile.dynamo.adapter import Size, Sizes, source_of
from sparsevila_compile.families import Family

_PAST = re.compile(r"\['past_key_values'\]\.layers\[\d+\]\.(keys|values)$")
_WINDOW = re.compile(r"\['past_key_values'\]\.layers\[\d+\]\._sliding_window_tensor$")
_FEATURES = re.compile(r"\['mm_encoder_outputs'\]\['(\w+)'\].*pooler_output")
_WEIGHT = re.compile(r"\._(parameters|buffers)\[|\._modules\[.*\]\.\w+$")
_ARGUMENT = re.compile(r"\['(\w+)'\]$")
_BREAK = (
    "call generate, without output_hidden_states or output_attentions, keep hooks and prints out of "
    "the forward and torch._dynamo.config.capture_scalar_outputs on, and load the model anew"
)


class NotAForward(Exception):
    """The graph is not one that the compiled model can stand in for.

    Attributes:
        why: the reason, in plain words.
        change: what the user can change.
        broken: whether the rest of the forward comes as other graphs.
    """

    def __init__(self, why: str, change: str, broken: bool = False) -> None:
        super().__init__(f"{why}; {change}")
        self.why, self.change, self.broken = why, change, broken


@dataclass
class Forward:
    """Where a captured forward takes what it needs, and what it returns.

    Attributes:
        arguments: places of ``input_ids``, ``attention_mask``, ``position_ids`` and pictures.
        features: places of encoded pictures, by modality.
        past: places of cached keys and values, in graph order.
        outputs: what each result is: ``logits``, ``cache`` or ``rest``.
        caches: by cache among them, what gives its sizes from the arguments.
        rest: the graph that remains, or None; it takes the arguments at ``rest_inputs``.
    """

    arguments: dict[str, int]
    features: dict[str, list[int]]
    past: list[int]
    outputs: list[str]
    caches: list[tuple[Size, ...]]
    rest: fx.GraphModule | None = None
    rest_inputs: list[int] = field(default_factory=list)


def recognise(gm: fx.GraphModule, family: Family, text: Any) -> Forward:
    """Find the roles of a captured graph's inputs and outputs.

    Args:
        text: the language model's configuration.

    Raises:
        NotAForward: says what is in the way.
    """
    arguments: dict[str, int] = {}
    features: dict[str, list[int]] = {}
    past: list[int] = []
    weights: set[fx.Node] = set()
    unknown: list[str] = []
    known = {"input_ids", "attention_mask", "position_ids", "second_per_grid_ts"}
    for modality in family.modalities:
        known |= {modality.pixels, *((modality.grid,) if modality.grid else ())}
    for place, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        source = source_of(node)
        found = _FEATURES.search(source)
        named = _ARGUMENT.search(source)
        if not isinstance(node.meta.get("example_value"), torch.Tensor):
            continue
        if _WINDOW.search(source):
            continue  # a layer's window as a tensor: the program knows it
        if _WEIGHT.search(source):
            weights.add(node)
        elif _PAST.search(source):
            past.append(place)
        elif found:
            features.setdefault(found[1], []).append(place)
        elif named and named[1] in known:
            arguments[named[1]] = place
        else:
            unknown.append(source)
    language = {n for n in weights if "_modules['language_model']" in source_of(n)}
    touched = _users_of(language)
    results = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    shaped = [_role(node, touched, text) for node in results]
    outputs = [role for role, _ in shaped]
    _check(arguments, unknown, outputs, bool(language), text)
    sizes = Sizes(gm.graph)
    caches = [tuple(map(sizes.of, shape)) for role, shape in shaped if role == "cache"]
    forward = Forward(arguments, features, past, outputs, caches)
    rest = [i for i, role in enumerate(outputs) if role == "rest"]
    if rest:
        forward.rest, forward.rest_inputs = _remainder(gm, rest)
    return forward


def _users_of(nodes: set[fx.Node]) -> set[fx.Node]:
    reached, front = set(nodes), list(nodes)
    while front:
        for user in front.pop().users:
            if user not in reached:
                reached.add(user)
                front.append(user)
    return reached


def _role(node: Any, touched: set[fx.Node], text: Any) -> tuple[str, Sequence[int | torch.SymInt]]:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or node not in touched:
        return "rest", ()
    shape = tuple(value.shape)
    heads = int(text.num_key_value_heads or text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    if len(shape) == 4 and shape[1] == heads and shape[3] == width:
        return "cache", shape
    if len(shape) == 3 and shape[2] == int(text.vocab_size):
        return ("logits", shape) if shape[1] == 1 else ("all logits", shape)
    return "other", shape


def _check(
    arguments: dict[str, int], unknown: list[str], roles: list[str], language: bool, text: Any
) -> None:
    if not language or ("input_ids" not in arguments and "logits" not in roles):
        raise NotAForward("this graph is not a whole forward", _BREAK, broken=True)
    if "all logits" in roles:
        why = "the forward is asked for the logits of every position, pruned ones included"
        raise NotAForward(why, "pass logits_to_keep=1, as generate does")
    if "input_ids" not in arguments:
        named = any("inputs_embeds" in source for source in unknown)
        if named and "logits" in roles:
            why = "the forward is given inputs_embeds, whose pictures cannot be told apart"
            raise NotAForward(why, "pass input_ids and pixel_values")
        if any("['args']" in source for source in unknown):
            raise NotAForward("input_ids came by position", "pass arguments by name")
        why = "a graph break hides the token merge: embedding and layers are different graphs"
        raise NotAForward(why, _BREAK, broken=True)
    if unknown:
        change = "leave it out, and cache_implementation at its default"
        raise NotAForward(f"the forward uses {unknown[0]}, which no compiled model takes", change)
    if "logits" not in roles:
        raise NotAForward("a graph break hides the logits", _BREAK, broken=True)
    if "other" in roles:
        why = "the forward returns more of the language model than logits and caches"
        change = "leave labels, output_hidden_states and output_attentions out"
        raise NotAForward(why, change)
    count = 2 * int(text.num_hidden_layers)
    if roles.count("cache") != count:
        why = f"the forward returns {roles.count('cache')} caches, the model has {count}"
        raise NotAForward(why, "leave use_cache on and cache_implementation at its default")


def _remainder(gm: fx.GraphModule, rest: list[int]) -> tuple[fx.GraphModule, list[int]]:
    """The graph of these outputs alone, and which of the arguments it takes."""
    graph = copy.deepcopy(gm.graph)
    output = graph.output_node()
    output.args = (tuple(output.args[0][i] for i in rest),)  # type: ignore[index, union-attr]
    for node in reversed(list(graph.nodes)):
        # Checks of the token merge, too: they look at stand-ins; the prompt reader has its own.
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)
    places = []
    for place, node in enumerate([n for n in graph.nodes if n.op == "placeholder"]):
        if node.users:
            places.append(place)
        else:
            graph.erase_node(node)
    module = fx.GraphModule(gm, graph)
    return module, places
