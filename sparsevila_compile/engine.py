"""Runs a program's graphs: vision, prefill in chunks, retrieval, decode, over preallocated caches.

The engine works on rows of tokens that are already laid out (see ``conversation``); it keeps
lengths on the host and never reads results back, so a decode step needs no synchronisation of its
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsevila_compile import hf
from sparsevila_compile.budget import keep_count
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Family
from sparsevila_compile.program import Program
from sparsevila_compile.prompt import Picture

PREFILL_CHUNK = 8192


class KVCache:
    """Keys and values of all layers, ``[batch, kv_heads, capacity, head_dim]`` each.

    ``lens`` (host) is how many positions of each row are in use. Capacity doubles as needed up to
    ``limit`` positions.
    """

    def __init__(self, program: Program, batch: int, capacity: int, limit: int) -> None:
        self.limit = limit
        self.capacity = min(max(capacity, 1), limit)
        self.lens = [0] * batch
        self.batch = batch
        self.device = program.device
        self.tensors: dict[str, torch.Tensor] = {}
        for i, spec in enumerate(program.caches):
            for kind in ("k", "v"):
                self.tensors[f"{kind}_cache_{i}"] = torch.zeros(
                    (batch, spec.kv_heads, self.capacity, spec.head_dim),
                    dtype=spec.dtype,
                    device=program.device,
                )

    def reserve(self, needed: int) -> None:
        """Make room for ``needed`` positions a row.

        Raises:
            UserError: that is more than the limit.
        """
        if needed > self.limit:
            raise UserError(
                f"the prompt and its answer need {needed} cache positions, the limit is {self.limit} "
                "(max_length); shorten the prompt, ask for fewer new tokens, or prune more visual tokens"
            )
        if needed <= self.capacity:
            return
        capacity = min(max(needed, 2 * self.capacity), self.limit)
        for name, old in self.tensors.items():
            new = old.new_zeros((self.batch, old.shape[1], capacity, old.shape[3]))
            new[:, :, : self.capacity] = old
            self.tensors[name] = new
        self.capacity = capacity

    def lengths(self) -> torch.Tensor:
        return torch.tensor(self.lens, dtype=torch.int32, device=self.device)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass
class Feed:
    """New tokens of one row, pruned placeholders left out.

    Attributes:
        ids: int64 ``[n]``.
        positions: int64 ``[axes, n]``.
        visual: int64 ``[n]``, row of the visual tokens that stands here, or -1 for text.
        weights: float32 ``[n]``, share of each token in the turn's query (0: does not ask).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    weights: torch.Tensor


@dataclass
class Retrieved:
    """What decode attends below the tail: ``index_i`` by layer, and where each row's tail starts.

    ``visual`` counts the visual tokens among them, over the batch, a layer and group.
    """

    index: dict[str, torch.Tensor]
    tail_start: torch.Tensor
    visual: int


class Engine:
    """Executes one program; several conversations may share it."""

    def __init__(self, program: Program, family: Family) -> None:
        self.program = program
        self.family = family
        self.device = program.device
        self.modules = {n: c.module(program.weights) for n, c in program.components.items()}
        self._inputs = {n: c.inputs for n, c in program.components.items()}
        self._outputs = {n: c.outputs for n, c in program.components.items()}
        self.axes = 3 if family.rope == "mrope" else 1

    def run(self, component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run one graph; ``inputs`` by name (more than it takes is fine)."""
        picked = [inputs[name] for name in self._inputs[component]]
        with torch.inference_mode():
            results = self.modules[component](*picked)
        return dict(zip(self._outputs[component], results, strict=True))

    # ------------------------------------------------------------------ vision

    def vision_inputs(self, prompts: list[list[Picture]]) -> dict[str, Any]:
        """Inputs of the ``vision`` component for new pictures, by prompt."""
        pictures = [p for prompt in prompts for p in prompt]
        pixels = torch.cat([p.pixels for p in pictures])
        inputs: dict[str, Any] = {
            "pixel_values": pixels.to(device=self.device, dtype=self.program.dtype)
        }
        if self.family.precomputed:
            grid = torch.tensor([p.grid for p in pictures])
            host = hf.host_vision_inputs(self.program.config, self.family.precomputed, grid)
            inputs |= {k: v.to(self.device) for k, v in host.items()}
        if self.program.prune is not None:
            inputs |= self._segments(prompts)
        return inputs

    def encode(self, prompts: list[list[Picture]]) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Visual tokens of new pictures, by prompt.

        Returns:
            ``visual_tokens`` ``[kept, width]`` in prompt order, and for every picture the indices
            of its kept tokens (int64, ascending, on the CPU).
        """
        if not any(prompts):
            width = int(self.program.config["text_config"]["hidden_size"])
            empty = torch.empty((0, width), dtype=self.program.dtype, device=self.device)
            return empty, [[] for _ in prompts]
        out = self.run("vision", self.vision_inputs(prompts))
        if self.program.prune is None:
            everything = [[torch.arange(p.tokens) for p in prompt] for prompt in prompts]
            return out["visual_tokens"], everything
        return out["visual_tokens"], self._by_picture(out["kept"].cpu(), prompts)

    def budgets(self, pictures: list[Picture]) -> list[tuple[int, int]]:
        """Runs of one prompt's visual tokens that compete, and how many each keeps."""
        prune = self.program.prune
        if prune is None:
            return [(p.tokens, p.tokens) for p in pictures]
        if prune.budget == "prompt":
            lengths = [sum(p.tokens for p in pictures)] if pictures else []
        elif prune.budget == "image":
            lengths = [p.tokens for p in pictures]
        else:
            lengths = [p.tokens // p.frames for p in pictures for _ in range(p.frames)]
        return [(n, keep_count(prune.keep_ratio, n)) for n in lengths]

    def _segments(self, prompts: list[list[Picture]]) -> dict[str, torch.Tensor]:
        runs = [run for prompt in prompts for run in self.budgets(prompt)]
        lengths, keep = [n for n, _ in runs], [k for _, k in runs]

        def offsets(sizes: list[int]) -> torch.Tensor:
            total = torch.tensor([0, *sizes]).cumsum(0)
            return total[:-1].to(self.device)

        return {
            "segment_starts": offsets(lengths),
            "segment_lengths": torch.tensor(lengths, device=self.device),
            "segment_keep": torch.tensor(keep, device=self.device),
            "segment_offsets": offsets(keep),
            "visual_slots": torch.arange(sum(keep), device=self.device),
        }

    @staticmethod
    def _by_picture(kept: torch.Tensor, prompts: list[list[Picture]]) -> list[list[torch.Tensor]]:
        start, result = 0, []
        for prompt in prompts:
            mine = []
            for picture in prompt:
                inside = (kept >= start) & (kept < start + picture.tokens)
                mine.append(kept[inside] - start)
                start += picture.tokens
            result.append(mine)
        return result

    # ----------------------------------------------------------------- prefill

    def chunk_inputs(
        self,
        cache: KVCache,
        feeds: list[Feed],
        visual_tokens: torch.Tensor,
        score_columns: torch.Tensor,
        start: int,
        chunk: int,
    ) -> dict[str, Any]:
        """Inputs of a prefill graph for the tokens from ``start`` on, ``chunk`` a row at most."""
        new = [min(max(len(f.ids) - start, 0), chunk) for f in feeds]
        parts = [slice(start, start + n) for n in new]
        pieces = list(zip(feeds, parts, strict=True))
        last = [min(max(len(f.ids) - 1 - start, 0), max(new) - 1) for f in feeds]
        return {
            "inputs_embeds": self._embed(feeds, parts, visual_tokens),
            "position_ids": self._positions([f.positions[:, p] for f, p in pieces]),
            "logit_rows": torch.tensor(last, device=self.device)[:, None],
            "cache_lens": cache.lengths(),
            "new_lens": torch.tensor(new, dtype=torch.int32, device=self.device),
            "score_weights": _pad_rows([f.weights[p] for f, p in pieces], 0).to(self.device),
            "score_columns": score_columns,
            **cache.tensors,
        }

    def prefill(
        self,
        cache: KVCache,
        feeds: list[Feed],
        visual_tokens: torch.Tensor,
        columns: list[torch.Tensor],
        chunk: int = PREFILL_CHUNK,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Append the feeds to the cache, ``chunk`` tokens a row at a time.

        Args:
            columns: by row, cache positions of all its visual tokens (int64), this turn's included.

        Returns:
            Logits of each row's last token ``[batch, vocabulary]`` and, where decode is sparse and
            there are visual tokens, ``scores_i`` by layer.
        """
        counts = [len(f.ids) for f in feeds]
        score_columns = _pad_rows(columns, -1).to(device=self.device, dtype=torch.int32)
        sparse = "turn" in self.modules and score_columns.shape[1] > 0
        logits: list[torch.Tensor] = [torch.empty(0)] * len(feeds)
        scores: dict[str, torch.Tensor] = {}
        for start in range(0, max(counts), chunk):
            asks = sparse and any(bool(f.weights[start : start + chunk].any()) for f in feeds)
            inputs = self.chunk_inputs(cache, feeds, visual_tokens, score_columns, start, chunk)
            out = self.run("turn" if asks else "language", inputs)
            for name, value in out.items():
                if name != "logits":
                    # A question may span chunks: its weights sum to one over all of them.
                    scores[name] = scores[name] + value if name in scores else value
            for b, n in enumerate(counts):
                if start < n <= start + chunk:
                    logits[b] = out["logits"][b, 0]
                cache.lens[b] += min(max(n - start, 0), chunk)
        return torch.stack(logits), scores

    def _embed(
        self, feeds: list[Feed], parts: list[slice], visual_tokens: torch.Tensor
    ) -> torch.Tensor:
        ids = _pad_rows([f.ids[p] for f, p in zip(feeds, parts, strict=True)], 0)
        visual = _pad_rows([f.visual[p] for f, p in zip(feeds, parts, strict=True)], -1)
        # A placeholder's id may lie outside the embedding table.
        text = torch.where(visual < 0, ids, 0).to(self.device)
        embeds = self.run("embed", {"input_ids": text})["inputs_embeds"]
        where = (visual >= 0).nonzero(as_tuple=True)
        if len(where[0]):
            rows = visual[where].to(self.device)
            at = tuple(w.to(self.device) for w in where)
            with torch.inference_mode():
                embeds = embeds.clone()
                embeds[at] = visual_tokens[rows].to(embeds.dtype)
        return embeds

    def _positions(self, rows: list[torch.Tensor]) -> torch.Tensor:
        padded = torch.stack([_pad_rows([r[a] for r in rows], 0) for a in range(self.axes)])
        padded = padded.to(self.device)
        return padded if self.axes == 3 else padded[0]

    # ------------------------------------------------------------------ decode

    def retrieve(
        self,
        scores: dict[str, torch.Tensor],
        columns: list[torch.Tensor],
        lens: list[int],
    ) -> Retrieved | None:
        """Choose what decode attends this turn, by layer; None where nothing is sparse."""
        spec = self.program.retrieval
        if spec is None or not scores:
            return None
        tails = [int(c.max()) + 1 if len(c) else n for c, n in zip(columns, lens, strict=True)]
        fixed = []
        for row, tail in zip(columns, tails, strict=True):
            text = torch.ones(tail if len(row) else 0, dtype=torch.bool)
            text[row] = False
            fixed.append(text.nonzero()[:, 0])
        tails = [t if len(c) else 0 for t, c in zip(tails, columns, strict=True)]
        counts = [len(c) for c in columns]
        keep = [keep_count(spec.keep_ratio, n) for n in counts]
        common = {
            "columns": _pad_rows(columns, -1).to(device=self.device, dtype=torch.int32),
            "counts": torch.tensor(counts, device=self.device),
            "keep": torch.tensor(keep, device=self.device),
            "slots": torch.arange(max(keep), device=self.device),
            "fixed": _pad_rows(fixed, -1).to(device=self.device, dtype=torch.int32),
        }
        index = {
            name.replace("scores_", "index_"): self.run("retrieve", {"scores": value, **common})[
                "index"
            ]
            for name, value in scores.items()
        }
        start = torch.tensor(tails, dtype=torch.int32, device=self.device)
        return Retrieved(index, start, sum(keep))

    def decode(
        self,
        cache: KVCache,
        tokens: torch.Tensor,
        positions: list[int],
        active: list[bool],
        retrieved: Retrieved | None,
    ) -> torch.Tensor:
        """One token a row.

        Args:
            tokens: int64 ``[batch]`` on the device.
            positions: position of each token.
            active: rows that are not finished; others write nothing.

        Returns:
            Logits ``[batch, vocabulary]``.
        """
        batch = cache.batch
        at = torch.tensor(positions, device=self.device)[:, None]
        inputs: dict[str, Any] = {
            "inputs_embeds": self.run("embed", {"input_ids": tokens[:, None]})["inputs_embeds"],
            "position_ids": at.expand(3, -1, -1) if self.axes == 3 else at,
            "logit_rows": torch.zeros((batch, 1), dtype=torch.int64, device=self.device),
            "cache_lens": cache.lengths(),
            "new_lens": torch.tensor(active, device=self.device).to(torch.int32),
            **cache.tensors,
        }
        if retrieved is None:
            out = self.run("language", inputs)
        else:
            inputs |= retrieved.index
            inputs["tail_start"] = retrieved.tail_start
            out = self.run("decode", inputs)
        cache.lens = [n + int(a) for n, a in zip(cache.lens, active, strict=True)]
        return out["logits"][:, 0]


def _pad_rows(rows: list[torch.Tensor], fill: float) -> torch.Tensor:
    """Stack rows of different lengths, right-padded: ``[rows, longest]``."""
    out = torch.full((len(rows), max(len(r) for r in rows)), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
