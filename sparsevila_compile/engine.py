"""Runs a program's graphs: vision, prefill in chunks, retrieval, decode, over preallocated caches.

The engine works on rows of tokens that are already laid out (see ``conversation``) and keeps
lengths on the host; between turns ``decoding`` advances them on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsevila_compile import hf
from sparsevila_compile.budget import keep_count
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Family
from sparsevila_compile.program import Program
from sparsevila_compile.prompt import Picture
from sparsevila_compile.running import GraphRunner, Runner

_MIN_CHUNK = 128
"""Tokens a row at least: with fewer, attention would read a row's keys too often."""

VISION_CHUNK = 24576
"""Patches that the encoder takes at a time, where a single picture has no more: what bounds its
activations' memory.

An H200 works on two thirds of these for less time than its host takes to launch their kernels."""

_KEPT_GRIDS = 8

MIN_SPARED_BYTES = 5_000_000
"""Keys and values of one layer that retrieval must spare a decode step to be worth its scoring.

On an H200 the attention alone is faster from 2 MB on (batch 1 to 32, docs/performance.md). At 5 MB it
saves a microsecond a layer, which earns the question's scoring back within some ten tokens."""


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
    """Executes one program; several conversations may share it.

    Args:
        runner: runs the program's components; by default torch does, from the program itself.
    """

    def __init__(self, program: Program, family: Family, runner: Runner | None = None) -> None:
        self.program = program
        self.family = family
        self.device = program.device
        self.runner = runner or GraphRunner(program)
        self._grids: dict[Any, dict[str, torch.Tensor]] = {}
        self.axes = 3 if family.rope == "mrope" else 1

    def run(self, component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run one graph; ``inputs`` by name (more than it takes is fine)."""
        return self.runner.run(component, inputs)

    # ------------------------------------------------------------------ vision

    def vision_inputs(self, prompts: list[list[Picture]]) -> dict[str, Any]:
        """Inputs of the ``vision`` component for new pictures, by prompt."""
        pictures = [p for prompt in prompts for p in prompt]
        pixels = torch.cat([p.pixels for p in pictures])
        inputs: dict[str, Any] = {
            "pixel_values": pixels.to(device=self.device, dtype=self.program.dtype)
        }
        if self.family.precomputed:
            inputs |= self._grid_inputs(tuple(p.grid for p in pictures if p.grid))
        if self.program.prune is not None:
            inputs |= self._segments(prompts)
        return inputs

    def _grid_inputs(self, grids: tuple[tuple[int, int, int], ...]) -> dict[str, torch.Tensor]:
        """What depends on the pictures' sizes alone; the last few are kept on the device."""
        known = self._grids.pop(grids, None)
        if known is None:
            names, config = self.family.precomputed, self.program.config
            host = hf.host_vision_inputs(config, names, torch.tensor(grids))
            known = {k: v.to(self.device) for k, v in host.items()}
        self._grids[grids] = known
        if len(self._grids) > _KEPT_GRIDS:
            del self._grids[next(iter(self._grids))]
        return known

    def _groups(self, prompts: list[list[Picture]]) -> list[list[list[Picture]]]:
        """Pictures that one run of the encoder takes, by prompt: about ``VISION_CHUNK`` patches.

        Pictures that compete for one budget stay together; so does a picture, however large.
        """
        prune = self.program.prune
        if prune is not None and prune.budget == "prompt":
            return [prompts]
        unit, groups, size = self.program.layout.merge_unit, [], VISION_CHUNK
        group: list[list[Picture]] = []
        for prompt in prompts:
            group.append([])
            for picture in prompt:
                patches = picture.tokens * unit
                if size + patches > VISION_CHUNK:
                    group, size = [[]], 0
                    groups.append(group)
                group[-1].append(picture)
                size += patches
        return groups

    def encode(
        self, prompts: list[list[Picture]]
    ) -> tuple[torch.Tensor, Callable[[], list[list[torch.Tensor]]]]:
        """Visual tokens of new pictures, by prompt, at most ``VISION_CHUNK`` patches at a time.

        Returns:
            ``visual_tokens`` ``[kept, width]`` in prompt order, and a function that gives for every
            picture the indices of its kept tokens (int64, ascending, on the CPU). Only that waits
            for a GPU: what else there is to do on the host can be done before.
        """
        if not any(prompts):
            width = int(self.program.config["text_config"]["hidden_size"])
            empty = torch.empty((0, width), dtype=self.program.dtype, device=self.device)
            return empty, lambda: [[] for _ in prompts]
        total = sum(keep for prompt in prompts for _, keep in self.budgets(prompt))
        runs, at = [], 0
        tokens = torch.empty(0)
        groups = self._groups(prompts)
        for group in groups:
            out = self.run("vision", self.vision_inputs(group))
            part = out.pop("visual_tokens")
            if at == 0:  # the whole is allocated once: to join parts would hold them twice
                tokens = part if len(groups) == 1 else part.new_empty((total, part.shape[1]))
            if len(groups) > 1:
                with torch.inference_mode():
                    tokens[at : at + len(part)] = part
            at += len(part)
            runs.append((group, out))
            del part, out
        assert at == len(tokens), "the encoder gave other tokens than its budget"
        chosen = [] if self.program.prune is None else [out["kept"] for _, out in runs]

        def kept() -> list[list[torch.Tensor]]:
            if not chosen:
                return [[torch.arange(p.tokens) for p in prompt] for prompt in prompts]
            # One wait for the device, whatever the number of runs.
            parts = torch.split(torch.cat(chosen).cpu(), [len(part) for part in chosen])
            flat = itertools.chain.from_iterable(
                itertools.chain.from_iterable(self._by_picture(part, group))
                for part, (group, _) in zip(parts, runs, strict=True)
            )
            return [list(itertools.islice(flat, len(prompt))) for prompt in prompts]

        return tokens, kept

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

    def dense_because(self, columns: list[torch.Tensor]) -> str | None:
        """Why a turn decodes densely although the program can retrieve, or None.

        Args:
            columns: by row, cache positions of its visual tokens.
        """
        spec = self.program.retrieval
        if spec is None or spec.when == "always" or self.device.type != "cuda":
            return None
        spared = sum(len(c) - keep_count(spec.keep_ratio, len(c)) for c in columns)
        layers = [self.program.caches[i] for i in spec.layers]
        token = max(2 * c.kv_heads * c.head_dim * c.dtype.itemsize for c in layers)
        if spared * token >= MIN_SPARED_BYTES:
            return None
        return (
            f"retrieval would spare {spared * token / 1e6:.1f} MB a layer and step, too little to "
            f"save time (from {MIN_SPARED_BYTES / 1e6:.0f} MB on)"
        )

    def prefill(
        self,
        cache: KVCache,
        feeds: list[Feed],
        visual_tokens: torch.Tensor,
        columns: list[torch.Tensor],
        chunk: int | None = None,
        score: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Append the feeds to the cache, some tokens a row at a time.

        Args:
            columns: by row, cache positions of all its visual tokens (int64), this turn's included.
            chunk: tokens a row at a time; by default the rows share the runner's ``prefill_chunk``.
            score: whether retrieval will want scores.

        Returns:
            Logits of each row's last token ``[batch, vocabulary]`` and, where decode is sparse and
            there are visual tokens, ``scores_i`` by layer.
        """
        counts = [len(f.ids) for f in feeds]
        if chunk is None:
            chunk = max(self.runner.prefill_chunk // len(feeds), _MIN_CHUNK)
        # Chunks of one size: the largest decides how much memory activations take.
        chunk = -(-max(counts) // -(-max(counts) // chunk))
        score_columns = _pad_rows(columns, -1).to(device=self.device, dtype=torch.int32)
        sparse = score and "turn" in self.runner.components and score_columns.shape[1] > 0
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
        layers = len(scores)

        def every(rows: torch.Tensor) -> torch.Tensor:
            """The batch once for each layer: all layers choose in one run."""
            return rows.to(self.device).repeat(layers, *[1] * (rows.ndim - 1))

        chosen = self.run(
            "retrieve",
            {
                "scores": torch.cat(list(scores.values())),
                "columns": every(_pad_rows(columns, -1).to(torch.int32)),
                "counts": every(torch.tensor(counts)),
                "keep": every(torch.tensor(keep)),
                "slots": torch.arange(max(keep), device=self.device),
                "fixed": every(_pad_rows(fixed, -1).to(torch.int32)),
            },
        )["index"]
        names = [name.replace("scores_", "index_") for name in scores]
        index = dict(zip(names, chosen.chunk(layers), strict=True))
        start = torch.tensor(tails, dtype=torch.int32, device=self.device)
        return Retrieved(index, start, sum(keep))


def _pad_rows(rows: list[torch.Tensor], fill: float) -> torch.Tensor:
    """Stack rows of different lengths, right-padded: ``[rows, longest]``."""
    out = torch.full((len(rows), max(len(r) for r in rows)), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
