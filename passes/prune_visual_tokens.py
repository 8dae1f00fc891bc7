"""``prune_visual_tokens``: query-agnostic pruning of visual tokens (SparseVILA, Alg. 2).

The encoder's attention says how salient each token is; the scores come from the queries and keys
of one layer, never from a materialised attention matrix. Where that layer's attention runs anyway, it
also returns the log-sum-exp of its rows, which spares the scores half of their work. Pruning happens before the token merge,
so the language model sees a shorter sequence and does no work for pruned tokens. It is done once
a picture and does not depend on the question, so the KV cache stays valid over turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import fx

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import ATTENTION, ATTENTION_LSE, COLUMN_REDUCE, SELECT_TOKENS
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
from sparsevila_compile.passes.row_lse import with_lse
from sparsevila_compile.program import Program, PruneSpec

aten = torch.ops.aten
END = 9223372036854775807

Score = Literal["auto", "cls", "summary", "column_mean"]


class PruneVisualTokensConfig(PassConfig):
    """Options of ``prune_visual_tokens``."""

    keep_ratio: float = Field(
        gt=0,
        le=1,
        description="Share of the visual tokens kept: ceil(keep_ratio · n) of each budget.",
    )
    score: Score = Field(
        default="auto",
        description="Salience of a token: attention from CLS (cls), mean attention from the "
        "encoder's summary tokens (summary), or mean over all visual rows (column_mean); auto "
        "takes cls where the encoder has one such token, summary where several, else column_mean.",
    )
    layer: int | None = Field(
        default=None,
        description="Encoder layer whose attention scores, negative from the end; by default the "
        "last one with full (not windowed) attention.",
    )
    pool: Literal["mean", "max"] = Field(
        default="mean",
        description="How scores of patches become one score where a patch merger follows.",
    )
    budget: Literal["image", "frame", "prompt"] = Field(
        default="image",
        description="What keep_ratio counts over: each picture (a video is one), each frame of a "
        "video, or all pictures of a prompt together.",
    )
    positions: Literal["original", "compact"] = Field(
        default="original",
        description="Kept tokens keep the positions they had, or move together: contiguous (1-D) "
        "or the smallest regular grid over the kept tokens (mRoPE).",
    )


@register
class PruneVisualTokens(Pass[PruneVisualTokensConfig]):
    """Adds to ``vision`` the host-computed inputs ``segment_starts``, ``segment_lengths``,
    ``segment_keep``, ``segment_offsets`` (int64 ``[budgets]``) and ``visual_slots`` (int64
    ``[kept]``, only its size is read), and the output ``kept`` (int64 ``[kept]``, ascending within
    a budget).
    """

    name = "prune_visual_tokens"
    stage = "prune"
    summary = "drops the least salient visual tokens after the projector"
    config_type = PruneVisualTokensConfig

    def requires(self, program: Program) -> None:
        if program.prune is not None:
            raise UserError("visual tokens are pruned already; a program is pruned once")
        prefix = program.layout.prefix_tokens
        if self.config.score in ("cls", "summary") and not prefix:
            raise UserError(
                f"score: {self.config.score} needs an encoder with a CLS or summary token; the "
                f"encoder of {program.family} has none; use column_mean"
            )
        layers = len(list(calls(program, "vision", ATTENTION)))
        layer = self.config.layer
        if layer is not None and not -layers <= layer < layers:
            raise UserError(f"layer: {layer} is outside the encoder's {layers} layers")

    def match(self, program: Program) -> Iterator[Match | Miss]:
        nodes = list(calls(program, "vision", ATTENTION))
        chosen = self._choose(program, nodes)
        for i, node in enumerate(nodes):
            if node is chosen and program.prune is None:
                yield Match("vision", node, i)
            else:
                reason = (
                    "windowed attention: a token competes only within its window"
                    if self.config.layer is None and _windowed(program, node)
                    else "not the layer that scores"
                )
                yield Miss("vision", reason, module_path(node), node.name)

    def _choose(self, program: Program, nodes: list[fx.Node]) -> fx.Node | None:
        if self.config.layer is not None:
            return nodes[self.config.layer] if nodes else None
        full = [n for n in nodes if not _windowed(program, n)]
        return full[-1] if full else None

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        component = program.component("vision")
        edit = Editor(component)
        layer = module_path(match.node)
        own_sums = self._own_sums(program, match.node)
        if own_sums is None:
            node, lse = with_lse(edit, match.node, ATTENTION_LSE)
        else:
            node, lse = match.node, None
        scores = self._scores(program, edit, node, lse)
        for name in ("segment_starts", "segment_lengths", "segment_keep", "segment_offsets"):
            size = (
                "segments" if name == "segment_starts" else _size(component.input("segment_starts"))
            )
            edit.input(name, [size], torch.int64)
        slots = edit.input("visual_slots", ["kept"], torch.int64)
        tokens = component.results()[component.outputs.index("visual_tokens")]
        end = component.output_node()
        total = edit.call(aten.sym_size.int, slots, 0, before=end)
        segments = [
            component.input(f"segment_{n}") for n in ("starts", "lengths", "keep", "offsets")
        ]
        kept = edit.call(SELECT_TOKENS, scores, *segments, total, before=end, origin=node)
        fewer = edit.call(aten.index_select.default, tokens, 0, kept, before=end, origin=tokens)
        results = [fewer if r is tokens else r for r in component.results()]
        end.args = (tuple(results),)
        edit.output("kept", kept)
        program.prune = PruneSpec(self.config.keep_ratio, self.config.budget, self.config.positions)
        context.notes["score"] = self._score(program)
        context.notes["layer"] = layer
        context.notes["row_lse"] = (
            "from the layer's attention" if own_sums is None else f"computed for it: {own_sums}"
        )

    def _score(self, program: Program) -> Score:
        if self.config.score != "auto":
            return self.config.score
        prefix = program.layout.prefix_tokens
        return "column_mean" if not prefix else "cls" if prefix == 1 else "summary"

    def _own_sums(self, program: Program, node: fx.Node) -> str | None:
        """Why the attention's log-sum-exp cannot serve the scores, or None."""
        if self._score(program) != "column_mean":
            return "few rows are scored"
        if node.args[5] or node.args[6]:
            return "the attention is causal or windowed by distance"
        component = program.component("vision")
        tokens = component.results()[component.outputs.index("visual_tokens")]
        if not _leads_to(node, tokens):
            return "the layer's attention is not needed for the visual tokens"
        return None

    def _scores(
        self, program: Program, edit: Editor, node: fx.Node, lse: fx.Node | None
    ) -> fx.Node:
        """Salience of every visual token, float32, flat, in the order of ``visual_tokens``.

        ``lse``: the attention's log-sum-exp of rows, where ``node`` is an ``attention_lse``.
        """
        q, k, _, cu_seqlens, scale = node.args[:5]
        layout = program.layout
        before = node if lse is None else lse.next

        def call(target: object, *args: object) -> fx.Node:
            return edit.call(target, *args, before=before, origin=node)  # type: ignore[arg-type]

        def reduce(rows: object, known: object) -> fx.Node:
            arguments = (rows, k, None, cu_seqlens, None, None, None, known, scale, False, "mean")
            return call(COLUMN_REDUCE, *arguments)

        prefix = layout.prefix_tokens
        if not layout.packed:
            by_prefix = self._score(program) != "column_mean"
            bounds = (0, prefix) if by_prefix else (prefix, END)
            rows = call(aten.slice.Tensor, q, 2, *bounds)
            known = None if lse is None else call(aten.slice.Tensor, lse, 2, *bounds)
            patches = call(aten.slice.Tensor, reduce(rows, known), 2, prefix, END)
            return call(aten.reshape.default, patches, [-1])
        groups = call(aten.reshape.default, reduce(q, lse), [-1, layout.merge_unit])
        if self.config.pool == "mean":
            pooled = call(aten.mean.dim, groups, [1])
        else:
            pooled = call(aten.amax.default, groups, [1])
        if layout.permutation is None:
            return pooled
        order = call(aten.argsort.default, edit.component.input(layout.permutation))
        return call(aten.index_select.default, pooled, 0, order)

    def ensures(self, program: Program) -> None:
        component = program.component("vision")
        if "kept" not in component.outputs:
            raise GraphError("prune_visual_tokens: vision does not return the kept tokens")


def _leads_to(node: fx.Node, goal: fx.Node) -> bool:
    reached, front = {node}, [node]
    while front:
        for user in front.pop().users:
            if user not in reached:
                reached.add(user)
                front.append(user)
    return goal in reached


def _windowed(program: Program, node: fx.Node) -> bool:
    full = program.layout.full_attention_input
    bounds = node.args[3]
    return bounds is not None and isinstance(bounds, fx.Node) and bounds.target != full


def _size(node: fx.Node) -> int | torch.SymInt:
    return tensor_of(node).shape[0]
