"""A conversation that a caller's loop drives forward by forward.

transformers' ``generate`` owns the loop: it calls the forward with a prompt, then with one token at
a time, and with a new prompt over the same cache for the next turn. Cache columns are counted as it
counts them: padding and pruned placeholders included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsevila_compile.conversation import Conversation
from sparsevila_compile.decoding import Decoder
from sparsevila_compile.engine import Engine, Retrieved
from sparsevila_compile.errors import UserError
from sparsevila_compile.prompt import PromptReader, Row


class StepConversation(Conversation):
    """A batch of dialogues over one cache, a forward at a time.

    Attributes:
        columns: how many columns the caller's cache has.
        cuts: columns left by each roll-back so far.
    """

    def __init__(self, engine: Engine, reader: PromptReader, batch: int, limit: int) -> None:
        super().__init__(engine, reader, batch, limit)
        self.columns = 0
        self.cuts: list[int] = []
        self._present = torch.empty((batch, 0), dtype=torch.bool)
        self._retrieved: Retrieved | None = None
        self._steps: list[torch.Tensor] = []
        self._decoding = False

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        pictures: dict[str, Any],
        past: int,
    ) -> torch.Tensor:
        """Logits ``[batch, 1, vocabulary]`` behind the last of the new tokens.

        Args:
            ids: int64 ``[batch, new]``; what follows the first ``past`` columns. A single new token
                is a decode step, more are a prompt, which retrieves anew.
            mask: ``[batch, past + new]``, 0 for padding, or None.
            positions: the caller's, ``[batch, new]`` or ``[axes, batch, new]``; compared with ours
                where nothing is cached, else not used.
            pictures: processor outputs for the pictures among the new tokens.

        Raises:
            UserError: the prompt, its pictures and what is cached do not fit together.
        """
        if len(ids) != len(self.rows):
            raise UserError(
                f"the cache has {len(self.rows)} rows, the prompt has {len(ids)}; start without past_key_values"
            )
        step = bool(past) and past == self.columns and ids.shape[1] == 1 and not pictures
        logits = self._step(ids) if step else self._turn(ids, mask, positions, pictures, past)
        self.columns = past + ids.shape[1]
        return logits.clone()[:, None]  # the next step overwrites them

    # ------------------------------------------------------------------- turns

    def _turn(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        pictures: dict[str, Any],
        past: int,
    ) -> torch.Tensor:
        self._flush()
        whole = torch.ones((len(ids), past + ids.shape[1]), dtype=torch.bool)
        if mask is not None:
            whole = mask.cpu().bool()
            if tuple(whole.shape) != (len(ids), past + ids.shape[1]):
                raise UserError(
                    f"attention_mask has the shape {tuple(whole.shape)}; {past} cached and {ids.shape[1]} new columns need {(len(ids), past + ids.shape[1])}"
                )
        self._roll_back(whole[:, :past])
        new = {"input_ids": ids, "attention_mask": whole[:, past:], **pictures}
        rows = self.reader.read(new)
        if past:
            rows = [self._longer(held, row) for held, row in zip(self.rows, rows, strict=True)]
        logits, self._retrieved = self._feed(rows, None, 1)
        self.usage.new_tokens = 1
        self._present = torch.cat([self._present, whole[:, past:]], 1)
        if positions is not None and not past:
            _check_positions(rows, positions.cpu(), whole)
        return logits

    def _longer(self, held: Any, row: Row) -> Row:
        return self.reader.continued(held.ids, held.pictures, row)

    def _roll_back(self, seen: torch.Tensor) -> None:
        """Forget what lies behind the columns of ``seen`` (bool), and what it no longer shows."""
        past = seen.shape[1]
        if past < self.columns:
            self.cuts.append(past)
        present = self._present[:, :past]
        if bool((seen & ~present).any()):
            raise UserError(
                "attention_mask shows columns that were padding when they were cached; give the mask of the earlier turns with zeros where they were padded"
            )
        for held, was, now in zip(self.rows, present, seen, strict=True):
            kept = int(now.sum())
            if not bool(now[was][:kept].all()):
                raise UserError(
                    "attention_mask hides columns in the middle of what is cached; a cache can only be cut from its end"
                )
            if kept < len(held.ids):
                asked = held.prompt
                held.cut(kept)
                if kept >= asked:
                    held.answered = kept + 1  # the answer's last token comes with the new prompt
        self._present, self.columns = seen.clone(), past

    def _flush(self) -> None:
        """Note what decode has cached since the last prompt."""
        count = len(self._steps)
        tokens = torch.cat(self._steps, 1).cpu() if count else None
        for b, held in enumerate(self.rows):
            if tokens is not None:
                yes = torch.ones(count, dtype=torch.bool)
                held.extend(tokens[b], yes, ~yes, torch.arange(held.next, held.next + count))
                held.next += count
            if len(held.ids):
                held.answered = len(held.ids) + 1
        if self.cache is not None and count:
            self.cache.lens = [n + count for n in self.cache.lens]
            self._present = torch.cat(
                [self._present, torch.ones((len(self.rows), count), dtype=torch.bool)], 1
            )
        self._steps = []
        self._decoding = False

    # ------------------------------------------------------------------ decode

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        assert cache is not None
        needed = max(cache.lens) + len(self._steps) + 1
        if needed > cache.capacity:
            self._flush()
            cache.reserve(needed)
        if self._decoder is None or self._decoder.cache is not cache:
            self._decoder = Decoder(self.engine, cache)
        if not self._decoding:
            at = [held.next for held in self.rows]
            self._decoder.begin(at, self._retrieved, 0, ids.new_empty(0))
            self._decoding = True
        self._decoder.choose(ids[:, 0].to(self.engine.device))
        logits = self._decoder.step(greedy=False)
        self._steps.append(ids.clone())
        self.usage.new_tokens += 1
        return logits


def _check_positions(rows: list[Row], given: torch.Tensor, mask: torch.Tensor) -> None:
    if given.ndim == 2:
        given = given[None]
    given = given[1:] if given.shape[0] == 4 else given  # transformers puts the text's in front
    given = given.expand(-1, len(rows), -1)
    for row, mine, seen in zip(rows, given.unbind(1), mask, strict=True):
        if not torch.equal(row.positions, mine[:, seen].expand_as(row.positions)):
            raise UserError(
                "position_ids are not those of the prompt; the compiled model numbers tokens itself, leave them out"
            )


@dataclass(frozen=True)
class Place:
    """A state of a conversation that a caller's cache stands for.

    Attributes:
        columns: how many columns it has.
        cuts: roll-backs of the conversation when it was made.
        shown: columns that its longest layer shows; a layer with a window shows that much at most.
    """

    conversation: StepConversation
    columns: int
    cuts: int
    shown: int

    def used(self, shown: int) -> int:
        """How many columns of this state a cache that shows ``shown`` of them uses.

        Raises:
            UserError: they are not what the conversation holds any more: another copy of this cache
                was cut and continued differently.
        """
        columns = shown
        if self.shown < self.columns:  # every layer has a window
            if shown != self.shown:
                raise UserError(
                    "past_key_values was cut, which a model with a sliding window in every layer cannot follow; ask without past_key_values"
                )
            columns = self.columns
        if any(cut < columns for cut in self.conversation.cuts[self.cuts :]):
            raise UserError(
                "past_key_values is out of date: the same cache was cut and continued by another prompt; ask without past_key_values"
            )
        return columns
