"""The intermediate representation: a program of named graph components over one set of weights.

A :class:`Program` is what :func:`sparsevila_compile.trace.trace` returns and what passes rewrite.
Its components are plain ``torch.fx`` graphs whose ``get_attr`` nodes name weights by their
checkpoint names, in one dictionary that all components share; so prefill and decode can be two
graphs over one copy of the weights, and a snapshot is a copy of graphs, not of tensors.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from sparsevila_compile.errors import GraphError
from sparsevila_compile.kernels.registry import OPS

Stage = Literal["trace", "canonicalize", "prune", "cache", "sparsify", "quantize", "fuse", "lower"]
STAGES: tuple[Stage, ...] = (
    "trace",
    "canonicalize",
    "prune",
    "cache",
    "sparsify",
    "quantize",
    "fuse",
    "lower",
)


@dataclass(frozen=True)
class VisionLayout:
    """How the visual tokens of a traced ``vision`` component are laid out.

    Attributes:
        packed: True where all pictures share one ``[tokens, width]`` sequence (any resolution);
            False where they are a batch ``[pictures, tokens, width]`` of one resolution.
        prefix_tokens: encoder tokens before the patches (1 for a CLS token).
        merge_unit: patches that a patch merger joins into one visual token.
        tokens_per_picture: visual tokens of a picture, or None where its size decides.
        permutation: input that holds the order in which the encoder sees merge units, or None.
        full_attention_input: input with the segment bounds of full (not windowed) attention.
    """

    packed: bool
    prefix_tokens: int
    merge_unit: int
    tokens_per_picture: int | None
    permutation: str | None = None
    full_attention_input: str | None = None


@dataclass(frozen=True)
class CacheSpec:
    """One layer's KV cache: two tensors ``[batch, kv_heads, capacity, head_dim]``."""

    layer: str
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0


@dataclass(frozen=True)
class PruneSpec:
    """What the glue must know of prefill pruning (SparseVILA, Alg. 2)."""

    keep_ratio: float
    budget: Literal["image", "frame", "prompt"]
    positions: Literal["original", "compact"]


@dataclass(frozen=True)
class RetrievalSpec:
    """What the engine must know of decode retrieval (SparseVILA, Alg. 3).

    ``layers`` are indices into ``Program.caches``; a layer that is not named decodes densely.
    ``when`` says whether a turn for which retrieval saves too little may decode densely.
    """

    keep_ratio: float
    share: Literal["layer", "kv_head"]
    layers: tuple[int, ...]
    when: Literal["pays", "always"] = "pays"


@dataclass
class Component:
    """One graph with named inputs (its placeholders, in order) and named outputs."""

    name: str
    graph: fx.Graph
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "placeholder")

    def input(self, name: str) -> fx.Node:
        """The placeholder of that name.

        Raises:
            GraphError: the component has no such input.
        """
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.target == name:
                found: fx.Node = node
                return found
        raise GraphError(f"component {self.name} has no input {name}; it has {self.inputs}")

    def output_node(self) -> fx.Node:
        node: fx.Node = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return node

    def results(self) -> list[fx.Node]:
        """The nodes that the component returns, in the order of ``outputs``."""
        return list(self.output_node().args[0])  # type: ignore[arg-type]

    def weight_names(self) -> set[str]:
        return {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}

    def clone(self, name: str | None = None) -> Component:
        """A copy of the graph (metadata values shared, weights by name)."""
        return Component(name or self.name, copy.deepcopy(self.graph), self.outputs)

    def module(self, weights: dict[str, torch.Tensor], *, direct: bool = False) -> fx.GraphModule:
        """A callable that returns a tuple of the outputs; inputs go by position or by name.

        Args:
            direct: call the implementations that canonical ops are bound to as plain functions, past
                torch's dispatcher: less time on the host, and nothing for autograd or modes to see.
        """
        graph = copy.deepcopy(self.graph)
        for node in graph.nodes if direct else ():
            if "impl" in node.kwargs:
                rest = dict(node.kwargs)
                node.target = OPS[node.target._opname].function(rest.pop("impl"))
                node.kwargs = rest
        root = torch.nn.Module()
        flat: dict[str, str] = {}
        for node in graph.nodes:
            if node.op != "get_attr":
                continue
            name = str(node.target)
            if name not in flat:
                # One flat attribute each: a nested module path costs several look-ups a call.
                flat[name] = f"w{len(flat)}"
                root.register_buffer(flat[name], weights[name])
            node.target = flat[name]
        return fx.GraphModule(root, graph, class_name=f"Compiled_{self.name}")


@dataclass
class Program:
    """A traced vision-language model.

    Attributes:
        components: ``embed`` (input_ids → inputs_embeds), ``vision`` (pixels → visual_tokens and,
            until pruning is over, the taps) and ``language`` (inputs_embeds, position_ids, logit_rows →
            logits); passes add ``turn``, ``decode`` and ``retrieve``.
        weights: every parameter and constant, by checkpoint name.
        config: the Hugging Face configuration as plain data.
        taps: outputs of ``vision`` that exist only so that no encoder layer is dead code while
            passes look at it; they go once pruning is over.
        max_length: cache positions a row may use at most (set with the cache).
    """

    family: str
    config: dict[str, Any]
    components: dict[str, Component]
    weights: dict[str, torch.Tensor]
    layout: VisionLayout
    dtype: torch.dtype
    device: torch.device
    taps: tuple[str, ...] = ()
    caches: tuple[CacheSpec, ...] = ()
    prune: PruneSpec | None = None
    retrieval: RetrievalSpec | None = None
    stage: Stage = "trace"
    passes: list[str] = field(default_factory=list)
    max_length: int = 0

    def component(self, name: str) -> Component:
        """The component of that name.

        Raises:
            GraphError: there is none.
        """
        if name not in self.components:
            raise GraphError(f"no component {name}; the program has {sorted(self.components)}")
        return self.components[name]

    def snapshot(self) -> Program:
        """A copy to go back to: graphs are copied, tensors are shared."""
        other = copy.copy(self)
        other.components = {k: v.clone() for k, v in self.components.items()}
        other.weights = dict(self.weights)
        other.passes = list(self.passes)
        return other

    def restore(self, snapshot: Program) -> None:
        self.__dict__.update(snapshot.__dict__)

    def node_count(self) -> int:
        return sum(len(c.graph.nodes) for c in self.components.values())

    def weight_bytes(self) -> int:
        """Bytes of all weights; tied tensors count once."""
        seen: dict[tuple[Any, ...], int] = {}
        for name, w in self.weights.items():
            key = ("meta", name) if w.is_meta else (w.data_ptr(), w.shape, w.dtype)
            seen[key] = w.numel() * w.element_size()
        return sum(seen.values())

    def drop_unused_weights(self) -> list[str]:
        """Forget weights that no component names; returns their names."""
        used: set[str] = set().union(*(c.weight_names() for c in self.components.values()))
        gone = [n for n in self.weights if n not in used]
        for name in gone:
            del self.weights[name]
        return gone
