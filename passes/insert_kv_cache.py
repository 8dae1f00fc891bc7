"""``insert_kv_cache``: causal attention of the language graph becomes ``cached_attention``.

The graph is traced without a cache; this pass gives it explicit, preallocated ones as inputs, so
one graph serves prefill chunks and dense decode, for batches of different prompt lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field

from sparsevila_compile.errors import GraphError, UserError
from sparsevila_compile.graph_edit import Editor, module_path
from sparsevila_compile.ops import ATTENTION, CACHED_ATTENTION
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
from sparsevila_compile.program import CacheSpec, Program


class InsertKvCacheConfig(PassConfig):
    """Options of ``insert_kv_cache``."""

    max_length: int | None = Field(
        default=None,
        gt=0,
        description="Cache positions a prompt and its answer may use, a row; by default the "
        "language model's max_position_embeddings.",
    )


@register
class InsertKvCache(Pass[InsertKvCacheConfig]):
    """Adds the inputs ``cache_lens`` and ``new_lens`` (int32 ``[batch]``) and, for layer i,
    ``k_cache_i`` and ``v_cache_i`` (``[batch, kv_heads, capacity, head_dim]``, written in place).
    """

    name = "insert_kv_cache"
    stage = "cache"
    summary = "gives the language model explicit, preallocated KV caches"
    config_type = InsertKvCacheConfig

    def match(self, program: Program) -> Iterator[Match | Miss]:
        for node in calls(program, "language", ATTENTION):
            _, _, _, cu_seqlens, _, causal, _ = node.args[:7]
            if not causal:
                reason = "attention is not causal: it has no past to cache"
            elif cu_seqlens is not None:
                reason = "attention is packed: a cache needs one sequence a row"
            else:
                yield Match("language", node)
                continue
            yield Miss("language", reason, module_path(node), node.name)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        component = program.component("language")
        edit = Editor(component)
        node = match.node
        q, k, v, _, scale, _, window = node.args[:7]
        batch = tensor_of(component.input("inputs_embeds")).shape[0]
        if "cache_lens" not in component.inputs:
            edit.input("cache_lens", [batch], torch.int32)
            edit.input("new_lens", [batch], torch.int32)
        shape = tensor_of(k).shape  # type: ignore[arg-type]
        dtype = tensor_of(k).dtype  # type: ignore[arg-type]
        heads, dim = int(shape[1]), int(shape[3])
        index = len(program.caches)
        capacity: int | str | torch.SymInt = "capacity"
        if index:
            capacity = tensor_of(component.input("k_cache_0")).shape[2]
        k_cache = edit.input(f"k_cache_{index}", [batch, heads, capacity, dim], dtype)
        capacity = tensor_of(k_cache).shape[2]
        v_cache = edit.input(f"v_cache_{index}", [batch, heads, capacity, dim], dtype)
        new = edit.call(
            CACHED_ATTENTION,
            q,
            k,
            v,
            k_cache,
            v_cache,
            component.input("cache_lens"),
            component.input("new_lens"),
            scale,
            window,
            before=node,
            origin=node,
        )
        if tensor_of(new).shape != tensor_of(node).shape:
            raise GraphError(f"{node.name}: cached attention changes the shape")
        layer = module_path(node)
        edit.replace(node, new)
        spec = CacheSpec(layer, heads, dim, dtype, int(window))  # type: ignore[arg-type]
        program.caches = (*program.caches, spec)

    def finish(self, program: Program, matches: list[Match], context: Context) -> None:
        size = torch.empty((), dtype=program.dtype).element_size()
        per_token = sum(2 * c.kv_heads * c.head_dim * size for c in program.caches)
        context.notes["cache_bytes_per_token"] = per_token
        if matches:
            positions = int(program.config["text_config"]["max_position_embeddings"])
            program.max_length = self.config.max_length or positions
            context.notes["max_length"] = program.max_length

    def requires(self, program: Program) -> None:
        left = [n for n in calls(program, "vision", ATTENTION) if n.args[5]]
        if left:
            raise UserError(
                f"the vision encoder has causal attention at {module_path(left[0])}, which is not supported"
            )

    def ensures(self, program: Program) -> None:
        if not program.caches:
            raise GraphError("no cache was inserted")
