"""``sparsify_decode_attention``: query-aware retrieval at decode (SparseVILA, Alg. 3).

Once a turn, while the question is prefilled, each layer scores the cached visual tokens by the
attention they get from the question's rows; decode then attends the text and the best of them, in
place. A chunk that holds part of a question attends the whole cache anyway: its rows' log-sum-exp
comes from there. The full cache stays, so the next turn retrieves anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import (
    CACHED_ATTENTION,
    CACHED_ATTENTION_LSE,
    COLUMN_REDUCE,
    RETRIEVAL_ATTENTION,
    SELECT_TOKENS,
)
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
from sparsevila_compile.program import Program, RetrievalSpec
from sparsevila_compile.trace import trace_function


class SparsifyDecodeAttentionConfig(PassConfig):
    """Options of ``sparsify_decode_attention``."""

    keep_ratio: float = Field(
        gt=0, le=1, description="Share of the cached visual tokens that decode attends a turn."
    )
    share: Literal["layer", "kv_head"] = Field(
        default="layer",
        description="One set of retrieved tokens for a whole layer, or one for each KV head.",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Language layers to sparsify, by number; all by default."
    )
    when: Literal["pays", "always"] = Field(
        default="pays",
        description="Retrieve every turn (always), or decode a turn densely where retrieval would "
        "save no time on this device, and say so (pays).",
    )


class _Retrieve(torch.nn.Module):
    """From one layer's scores to the cache positions that decode attends below the tail."""

    def forward(
        self,
        scores: torch.Tensor,
        columns: torch.Tensor,
        counts: torch.Tensor,
        keep: torch.Tensor,
        slots: torch.Tensor,
        fixed: torch.Tensor,
    ) -> torch.Tensor:
        batch, groups, width = scores.shape
        k = slots.shape[0]
        rows = torch.arange(batch * groups, device=scores.device)

        def each(x: torch.Tensor) -> torch.Tensor:
            return x[:, None].expand(batch, groups).reshape(-1)

        chosen = SELECT_TOKENS(
            scores.reshape(-1), rows * width, each(counts), each(keep), rows * k, batch * groups * k
        )
        positions = columns[:, None, :].expand(batch, groups, width).reshape(-1)
        found = positions[chosen.clamp_min(0)]
        found = torch.where(chosen < 0, -1, found).reshape(batch, groups, k)
        always = fixed[:, None, :].expand(batch, groups, fixed.shape[1])
        return torch.cat([always, found], dim=2)


@register
class SparsifyDecodeAttention(Pass[SparsifyDecodeAttentionConfig]):
    """Adds three components over the weights of ``language``:

    - ``turn``: prefill that also returns ``scores_i`` (float32 ``[batch, groups, V]``); new inputs
      ``score_weights`` (float32 ``[batch, new]``, zero for rows that do not ask) and
      ``score_columns`` (int32 ``[batch, V]``, cache positions of visual tokens, -1 padded).
    - ``retrieve``: ``scores, columns, counts, keep, slots, fixed`` → ``index`` (int32 ``[batch,
      groups, F + k]``), where ``fixed`` holds the text positions before the last visual token.
    - ``decode``: attends ``index_i`` and the contiguous tail from ``tail_start`` (int32 ``[batch]``).
    """

    name = "sparsify_decode_attention"
    stage = "sparsify"
    summary = "decode attends the visual tokens that the turn's question retrieves"
    config_type = SparsifyDecodeAttentionConfig

    def requires(self, program: Program) -> None:
        if not program.caches:
            raise UserError("there is no KV cache to retrieve from; list insert_kv_cache before it")
        if program.retrieval is not None:
            raise UserError("decode attention is sparse already")
        count = len(program.caches)
        for layer in self.config.layers or ():
            if not 0 <= layer < count:
                raise UserError(f"layers: {layer} is outside the language model's {count} layers")

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for i, node in enumerate(calls(program, "language", CACHED_ATTENTION)):
            if program.retrieval is not None:
                reason = "sparse already"
            elif self.config.layers is not None and i not in self.config.layers:
                reason = "not in layers"
            elif node.args[8]:
                reason = "sliding-window attention: it reads a bounded cache already"
            else:
                yield Match("language", node, i)
                continue
            yield Miss("language", reason, module_path(node), node.name)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        if "turn" not in program.components:
            language = program.component("language")
            program.components["turn"] = turn = language.clone("turn")
            program.components["decode"] = decode = language.clone("decode")
            batch, length = tensor_of(turn.input("inputs_embeds")).shape[:2]
            edit = Editor(turn)
            edit.input("score_weights", [batch, length], torch.float32)
            edit.input("score_columns", [batch, "visual"], torch.int32)
            Editor(decode).input(
                "tail_start", [tensor_of(decode.input("cache_lens")).shape[0]], torch.int32
            )
        self._score(program, match)
        self._retrieve(program, match)

    def _score(self, program: Program, match: Match) -> None:
        turn = program.component("turn")
        edit = Editor(turn)
        node = next(n for n in turn.graph.nodes if n.name == match.node.name)
        node, lse = with_lse(edit, node, CACHED_ATTENTION_LSE)
        q, k_cache, scale = node.args[0], node.args[3], node.args[7]
        heads = "mean" if self.config.share == "layer" else "kv"
        scores = edit.call(
            COLUMN_REDUCE,
            q,
            k_cache,
            turn.input("score_weights"),
            None,
            turn.input("cache_lens"),
            None,
            turn.input("score_columns"),
            lse,
            scale,
            True,
            heads,
            before=lse.next,  # after the attention, which writes this turn's keys to the cache
            origin=node,
        )
        edit.output(f"scores_{match.data}", scores)

    def _retrieve(self, program: Program, match: Match) -> None:
        decode = program.component("decode")
        edit = Editor(decode)
        node = next(n for n in decode.graph.nodes if n.name == match.node.name)
        q, k, v, k_cache, v_cache, cache_lens, new_lens, scale, _ = node.args[:9]
        groups = 1 if self.config.share == "layer" else program.caches[match.data].kv_heads
        batch = tensor_of(decode.input("cache_lens")).shape[0]
        index = edit.input(f"index_{match.data}", [batch, groups, "indexed"], torch.int32)
        new = edit.call(
            RETRIEVAL_ATTENTION,
            q,
            k,
            v,
            k_cache,
            v_cache,
            cache_lens,
            new_lens,
            index,
            decode.input("tail_start"),
            scale,
            before=node,
            origin=node,
        )
        edit.replace(node, new)

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        if not matches:
            return
        groups = 1 if self.config.share == "layer" else program.caches[matches[0].data].kv_heads
        program.components["retrieve"] = trace_function(
            "retrieve",
            _Retrieve(),
            {
                "scores": (torch.float32, ("batch", groups, "visual")),
                "columns": (torch.int32, ("batch", "visual")),
                "counts": (torch.int64, ("batch",)),
                "keep": (torch.int64, ("batch",)),
                "slots": (torch.int64, ("kept",)),
                "fixed": (torch.int32, ("batch", "fixed")),
            },
            ("index",),
            program.device,
        )
        program.retrieval = RetrievalSpec(
            self.config.keep_ratio,
            self.config.share,
            tuple(m.data for m in matches),
            self.config.when,
        )

    def ensures(self, program: Program) -> None:
        if program.retrieval is None:
            return
        left = list(calls(program, "decode", CACHED_ATTENTION))
        if len(left) + len(program.retrieval.layers) != len(program.caches):
            raise GraphError("sparsify_decode_attention: layers are neither sparse nor dense")
