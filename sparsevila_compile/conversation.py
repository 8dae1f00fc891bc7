"""Prompts over a KV cache that outlives them: prefix reuse, pruning, retrieval, generation.

A conversation takes whole prompts, as transformers' ``generate`` does, and feeds only what its
cache does not hold yet: the next turn of a dialogue costs its new tokens. Where a prompt departs
from the cache (another picture, edited history), the cache is rolled back to the last common
token. Retrieval is done anew for every prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsevila_compile import hf
from sparsevila_compile.decoding import Decoder, Sampling, generate_tokens
from sparsevila_compile.engine import Engine, Feed, KVCache, Retrieved
from sparsevila_compile.errors import UserError
from sparsevila_compile.prompt import Picture, PromptReader, Row, compact_positions


@dataclass
class Held:
    """What one cache row holds.

    Attributes:
        ids: full prompt tokens that the cache covers, pruned placeholders included, ``[n]``.
        kept: which of them have a cache position, ``[n]``.
        visual: which of them are placeholders, ``[n]``.
        positions: largest position used up to each token, ``[n]``.
        pictures: their places and digests.
        next: position of the token that follows.
        asked: index of the first token of the last question.
        prompt: length of the last prompt.
        answered: ids fed or generated up to the end of the last answer (no part of a question).
    """

    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    visual: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    pictures: list[Picture] = field(default_factory=list)
    next: int = 0
    asked: int = 0
    prompt: int = 0
    answered: int = 0

    def common(self, row: Row) -> int:
        """How many leading tokens of a prompt the cache can serve; at least one stays to be fed."""
        n = min(len(self.ids), len(row.ids) - 1)
        differs = (self.ids[:n] != row.ids[:n]).nonzero()
        if len(differs):
            n = int(differs[0])
        old = {p.start: p for p in self.pictures}
        for picture in row.pictures:
            if picture.start >= n:
                break
            known = old.get(picture.start)
            end = picture.start + picture.tokens
            if known is None or known.digest != picture.digest or end > n:
                return picture.start
        return n

    def cut(self, n: int) -> None:
        if n < len(self.ids):  # else an answer's last token, which is not cached, still counts
            self.answered = min(self.answered, n)
        self.ids, self.kept = self.ids[:n], self.kept[:n]
        self.visual, self.positions = self.visual[:n], self.positions[:n]
        self.pictures = [p for p in self.pictures if p.start < n]
        self.next = int(self.positions.max()) + 1 if n else 0
        self.asked, self.prompt = min(self.asked, n), min(self.prompt, n)

    def extend(
        self, ids: torch.Tensor, kept: torch.Tensor, visual: torch.Tensor, top: torch.Tensor
    ) -> None:
        self.ids = torch.cat([self.ids, ids])
        self.kept = torch.cat([self.kept, kept])
        self.visual = torch.cat([self.visual, visual])
        self.positions = torch.cat([self.positions, top])

    def columns(self) -> torch.Tensor:
        """Cache positions of the visual tokens."""
        return self.visual[self.kept].nonzero()[:, 0]


@dataclass
class Usage:
    """What the last prompt cost.

    Attributes:
        visual_tokens: visual tokens of the new pictures before pruning, over the batch.
        kept_tokens: after pruning.
        cached_tokens: prompt tokens that the cache already held.
        fed_tokens: tokens that prefill ran on.
        cached_visual: visual tokens in the cache.
        attended_visual: visual tokens that a decode step attends, a layer and group.
        new_tokens: generated tokens.
        dense_because: why decode did not retrieve although the recipe asks for it, or None.
    """

    visual_tokens: int = 0
    kept_tokens: int = 0
    cached_tokens: int = 0
    fed_tokens: int = 0
    cached_visual: int = 0
    attended_visual: int = 0
    new_tokens: int = 0
    dense_because: str | None = None


class Conversation:
    """A batch of dialogues over one cache."""

    def __init__(self, engine: Engine, reader: PromptReader, batch: int, limit: int) -> None:
        self.engine = engine
        self.reader = reader
        self.limit = limit
        self.rows = [Held() for _ in range(batch)]
        self.cache: KVCache | None = None
        self.usage = Usage()
        self._decoder: Decoder | None = None

    def generate(
        self,
        inputs: dict[str, Any],
        tools: hf.GenerationTools,
        *,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        query_start: list[int] | None = None,
    ) -> torch.Tensor:
        """Answer whole prompts.

        Args:
            inputs: processor outputs for the whole prompts (all turns, all pictures).
            query_start: by row, index of the first token (padding not counted) that asks; by
                default the new text after the last picture and the last answer.

        Returns:
            ``[batch, prompt + new]``, the prompts as given followed by the answers, padded.
        """
        rows = self.reader.read(inputs)
        if len(rows) != len(self.rows):
            raise UserError(
                f"this conversation has {len(self.rows)} rows, the prompt has {len(rows)}"
            )
        if query_start is not None and len(query_start) != len(rows):
            raise UserError(
                f"query_start has {len(query_start)} entries, the prompt has {len(rows)} rows"
            )
        device = self.engine.device
        prompt = inputs["input_ids"].to(device)
        tools.special_tokens(device, len(rows))
        new_tokens = self._room(tools, prompt.shape[1])
        processors = tools.processors(prompt, logits_processor)
        criteria = tools.criteria(stopping_criteria, tokenizer)
        ends, limit = tools.plain_stop(criteria, device)
        sampling = Sampling(
            processors,
            criteria,
            draw=bool(tools.config.do_sample),
            ends=ends,
            limit=limit or prompt.shape[1] + new_tokens,
            watched=streamer is not None or bool(logits_processor),
        )
        logits, retrieved = self._feed(rows, query_start, new_tokens)
        return self._answer(prompt, logits, retrieved, tools, sampling, streamer)

    @staticmethod
    def _room(tools: hf.GenerationTools, prompt: int) -> int:
        """New tokens at most; also settles ``max_length`` for the stopping criteria."""
        config = tools.config
        if config.max_new_tokens is not None:
            config.max_length = prompt + config.max_new_tokens
        new = int(config.max_length) - prompt
        if new < 1:
            raise UserError(
                f"generate: max_length={config.max_length} leaves no room after a prompt of {prompt} tokens; give max_new_tokens"
            )
        return new

    # ------------------------------------------------------------------- turns

    def _feed(
        self, rows: list[Row], query_start: list[int] | None, new_tokens: int
    ) -> tuple[torch.Tensor, Retrieved | None]:
        common = [
            self._reusable(held, row, query_start[b] if query_start else None)
            for b, (held, row) in enumerate(zip(self.rows, rows, strict=True))
        ]
        fresh = [
            [p for p in row.pictures if p.start >= n] for row, n in zip(rows, common, strict=True)
        ]
        # The largest possible need first: refuse before any work is done.
        for held, row, n in zip(self.rows, rows, common, strict=True):
            self._check(int(held.kept[:n].sum()), row, n, new_tokens)
        before = [replace(held) for held in self.rows]
        try:
            return self._prefill(rows, common, fresh, query_start, new_tokens)
        except BaseException:
            self.rows = before
            for held, n in zip(self.rows, common, strict=True):
                held.cut(n)  # what was written behind it is overwritten by the next prompt
            raise

    def _reusable(self, held: Held, row: Row, query_start: int | None) -> int:
        """Leading tokens of a prompt that need not be fed.

        Retrieval scores while the question is fed, so a question that the cache holds already
        (asked again, or edited) is fed again from its start.
        """
        n = held.common(row)
        if self.engine.program.retrieval is None:
            return n
        if query_start is not None:
            n = min(n, max(query_start, 0))
        elif n < held.prompt:
            n = min(n, held.asked)
        inside = (p.start for p in row.pictures if p.start < n < p.start + p.tokens)
        return next(inside, n)

    def _prefill(
        self,
        rows: list[Row],
        common: list[int],
        fresh: list[list[Picture]],
        query_start: list[int] | None,
        new_tokens: int,
    ) -> tuple[torch.Tensor, Retrieved | None]:
        feeds, tokens = self._lay_out(rows, common, fresh, query_start)
        columns = [held.columns() for held in self.rows]
        lens = [int(held.kept.sum()) for held in self.rows]
        if self.cache is None:
            self.cache = KVCache(self.engine.program, len(rows), max(lens) + new_tokens, self.limit)
        self.cache.reserve(max(lens) + new_tokens)
        self.cache.lens = [n - len(f.ids) for n, f in zip(lens, feeds, strict=True)]
        dense = self.engine.dense_because(columns)
        score = dense is None
        logits, scores = self.engine.prefill(self.cache, feeds, tokens, columns, score=score)
        retrieved = self.engine.retrieve(scores, columns, self.cache.lens)
        cached = sum(len(c) for c in columns)
        self.usage = Usage(
            visual_tokens=sum(p.tokens for row in fresh for p in row),
            kept_tokens=len(tokens),
            cached_tokens=sum(common),
            fed_tokens=sum(len(f.ids) for f in feeds),
            cached_visual=cached,
            attended_visual=cached if retrieved is None else retrieved.visual,
            dense_because=dense,
        )
        return logits, retrieved

    def _lay_out(
        self,
        rows: list[Row],
        common: list[int],
        fresh: list[list[Picture]],
        query_start: list[int] | None,
    ) -> tuple[list[Feed], torch.Tensor]:
        """Encode new pictures and lay out each row's new tokens; the rows count as held then."""
        tokens, wait = self.engine.encode(fresh)
        for row in rows:  # while a GPU encodes
            row.settle()
        kept = wait()
        feeds, offset = [], 0
        for b, (held, row, n) in enumerate(zip(self.rows, rows, common, strict=True)):
            start = query_start[b] if query_start else None
            feeds.append(self._row_feed(held, row, n, fresh[b], kept[b], offset, start))
            offset += sum(len(k) for k in kept[b])
        return feeds, tokens

    def first_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the ``language`` component for whole prompts, for calibration.

        Prefills nothing; the conversation is of no use afterwards.
        """
        rows = self.reader.read(inputs)
        fresh = [row.pictures for row in rows]
        feeds, tokens = self._lay_out(rows, [0] * len(rows), fresh, None)
        longest = max(len(f.ids) for f in feeds)
        cache = KVCache(self.engine.program, len(rows), longest, max(longest, self.limit))
        columns = torch.full((len(rows), 0), -1, dtype=torch.int32, device=self.engine.device)
        return self.engine.chunk_inputs(cache, feeds, tokens, columns, 0, longest)

    def _check(self, cached: int, row: Row, n: int, new_tokens: int) -> None:
        fresh = [p for p in row.pictures if p.start >= n]
        pictures = sum(p.tokens for p in fresh)
        kept = sum(keep for _, keep in self.engine.budgets(fresh))
        needed = cached + len(row.ids) - n - pictures + kept + new_tokens
        if needed > self.limit:
            raise UserError(
                f"the prompt needs {needed} cache positions with its {new_tokens} new tokens, the "
                f"limit is {self.limit}; shorten it, ask for fewer new tokens, or raise max_length "
                "of insert_kv_cache"
            )

    def _row_feed(
        self,
        held: Held,
        row: Row,
        n: int,
        fresh: list[Picture],
        kept: list[torch.Tensor],
        offset: int,
        query_start: int | None,
    ) -> Feed:
        """Lay out a row's new tokens and note them as held."""
        answered = held.answered if n >= held.prompt else n
        held.cut(n)
        ids, positions = row.ids[n:], row.positions[:, n:]
        visual = row.visual()[n:]
        keep = ~visual
        source = torch.full((len(ids),), -1, dtype=torch.int64)
        for picture, inside in zip(fresh, kept, strict=True):
            at = picture.start - n + inside
            keep[at] = True
            source[at] = torch.arange(offset, offset + len(inside))
            offset += len(inside)
        prune = self.engine.program.prune
        if prune is not None and prune.positions == "compact":
            moved = [_shifted(p, -n) for p in fresh]
            placed = compact_positions(positions, keep, moved, held.next)
            top = torch.full((len(ids),), -1, dtype=torch.int64)
            top[keep] = placed.max(0).values
            following = max(held.next, int(top.max()) + 1)
        else:
            placed, top = positions[:, keep], positions.max(0).values
            following = row.next
        held.extend(ids, keep, visual, top)
        held.next, held.prompt = following, len(row.ids)
        held.pictures += [replace(p, pixels=p.pixels[:0]) for p in fresh]
        index = torch.arange(n, n + len(ids))
        asks = self._query(index, visual, answered, query_start)
        held.asked = n + int(asks.nonzero()[0])
        weights = asks[keep].float()
        return Feed(ids[keep], placed, source[keep], weights / weights.sum())

    @staticmethod
    def _query(
        index: torch.Tensor, visual: torch.Tensor, answered: int, query_start: int | None
    ) -> torch.Tensor:
        """Which new tokens are the turn's question."""
        text = ~visual
        if query_start is not None:
            asks = text & (index >= query_start)
            if not bool(asks.any()):
                raise UserError(f"query_start {query_start} leaves no new text token to ask with")
            return asks
        last = visual.nonzero()
        after = int(last[-1]) + 1 if len(last) else 0
        asks = text & (torch.arange(len(index)) >= after) & (index >= answered)
        return asks if bool(asks.any()) else text if bool(text.any()) else ~text

    # -------------------------------------------------------------- generation

    def _answer(
        self,
        prompt: torch.Tensor,
        logits: torch.Tensor,
        retrieved: Retrieved | None,
        tools: hf.GenerationTools,
        sampling: Sampling,
        streamer: Any,
    ) -> torch.Tensor:
        cache, length = self.cache, prompt.shape[1]
        assert cache is not None
        if self._decoder is None or self._decoder.cache is not cache:
            self._decoder = Decoder(self.engine, cache)
        decoder, before = self._decoder, list(cache.lens)
        ends = prompt.new_empty(0) if sampling.ends is None else sampling.ends
        decoder.begin([held.next for held in self.rows], retrieved, tools.pad_token_id, ends)
        sequence = prompt.new_full((len(prompt), sampling.limit), tools.pad_token_id)
        sequence[:, :length] = prompt
        if streamer is not None:
            streamer.put(prompt.cpu())
        try:
            generate_tokens(decoder, sequence, length, logits, sampling, streamer)
        except BaseException:
            self._note(sequence[:, length:], before, ended=0)
            raise
        new = self._note(sequence[:, length:], before, ended=1)
        if streamer is not None:
            streamer.end()
        self.usage.new_tokens = new
        return sequence[:, : length + new]

    def _note(self, new: torch.Tensor, before: list[int], ended: int) -> int:
        """Record what decode has cached; an answer's last token is not, until the next turn."""
        assert self.cache is not None
        assert self._decoder is not None
        lens: list[int] = self._decoder.lens.tolist()
        tokens = new.cpu()
        for held, row, was, now in zip(self.rows, tokens, before, lens, strict=True):
            n = now - was
            yes = torch.ones(n, dtype=torch.bool)
            held.extend(row[:n], yes, ~yes, torch.arange(held.next, held.next + n))
            held.next += n
            held.answered = len(held.ids) + ended
        self.cache.lens = lens
        return max(now - was for was, now in zip(before, lens, strict=True)) + 1


def _shifted(picture: Picture, by: int) -> Picture:
    return replace(picture, start=picture.start + by)
