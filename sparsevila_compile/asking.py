"""Asks the compiled model and the dense one the same questions, as chat sessions of several turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from sparsevila_compile.budget import keep_count
from sparsevila_compile.dialogues import AskedPicture
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import family_of
from sparsevila_compile.program import Program
from sparsevila_compile.prompt import PromptReader
from sparsevila_compile.session import Session

Progress = Callable[[str, int, int], None]


@dataclass
class TurnAnswers:
    """The answers to one question; ``dense`` and ``reference`` are None where there is none."""

    question: str
    compiled: str
    dense: str | None
    reference: str | None


@dataclass
class PictureAnswers:
    """The dialogue about one picture, and what it cost (visual tokens; bytes a decode step).

    Attributes:
        visual_tokens: before pruning.
        kept_tokens: after pruning: those that the cache holds.
        attended_tokens: those that a decode step attends in a sparse layer (the last turn's).
        dense_kv_bytes: KV bytes of visual tokens that a decode step of the dense model reads.
        kv_bytes: the same of the compiled model.
    """

    path: Path
    turns: list[TurnAnswers]
    visual_tokens: int
    kept_tokens: int
    attended_tokens: int
    dense_kv_bytes: int
    kv_bytes: int


class DenseModel:
    """transformers' own model behind the calls that a :class:`Session` makes."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def conversation(self, batch: int) -> None:
        """None: this model keeps no cache between turns."""

    def generate(self, *, conversation: None, **inputs: Any) -> torch.Tensor:
        """Greedy or sampled tokens, int64 ``[batch, prompt + new]``."""
        device = next(self.model.parameters()).device
        moved = {
            k: v.to(device, self.model.dtype if v.is_floating_point() else None)
            if isinstance(v, torch.Tensor)
            else v
            for k, v in inputs.items()
        }
        with torch.no_grad():
            return cast(torch.Tensor, self.model.generate(**moved))

    def chat(self) -> Session:
        return Session(cast(Any, self))


@contextmanager
def _asking(dialogue: AskedPicture, question: str) -> Iterator[None]:
    """Say which picture and question an error belongs to."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{dialogue.path}: {question!r}: {error}") from error


def ask_all(
    model: Any,
    dialogues: list[AskedPicture],
    max_new_tokens: int,
    progress: Progress = lambda what, done, total: None,
    after_picture: Callable[[Session, list[Any]], None] = lambda session, usages: None,
) -> list[list[str]]:
    """Greedy answers by picture and turn; every picture is a session of its own.

    Args:
        model: has ``chat()``: a compiled model or a :class:`DenseModel`.
        after_picture: told the session and, by turn, its usage.

    Raises:
        UserError: names the picture and the question that cannot be asked.
    """
    total = sum(len(d.turns) for d in dialogues)
    done = 0
    answers = []
    for dialogue in dialogues:
        session = model.chat()
        session.add_image(dialogue.picture)
        said, usages = [], []
        for turn in dialogue.turns:
            with _asking(dialogue, turn.question):
                answer = session.ask(turn.question, max_new_tokens=max_new_tokens, do_sample=False)
            said.append(answer)
            if not isinstance(model, DenseModel):
                usages.append(session.usage)
            done += 1
            progress("questions", done, total)
        answers.append(said)
        after_picture(session, usages)
    return answers


def compare(
    compiled: Any,
    dialogues: list[AskedPicture],
    dense: list[list[str]] | None,
    max_new_tokens: int,
    progress: Progress = lambda what, done, total: None,
) -> list[PictureAnswers]:
    """Ask the compiled model, and set its answers beside the dense model's and the right ones.

    Args:
        compiled: what :func:`sparsevila_compile.load` returns.
        dense: what :func:`ask_all` returned for the dense model, or None.
    """
    costs: list[tuple[int, int, int]] = []

    def note(_: Session, usages: list[Any]) -> None:
        # The picture is new in the first turn only; later turns find it in the cache.
        first, last = usages[0], usages[-1]
        costs.append((first.visual_tokens, first.kept_tokens, last.attended_visual))

    answers = ask_all(compiled, dialogues, max_new_tokens, progress, note)
    out = []
    for i, (dialogue, said, cost) in enumerate(zip(dialogues, answers, costs, strict=True)):
        turns = [
            TurnAnswers(turn.question, answer, dense[i][t] if dense else None, turn.answer)
            for t, (turn, answer) in enumerate(zip(dialogue.turns, said, strict=True))
        ]
        before, kept, attended = cost
        out.append(
            PictureAnswers(
                dialogue.path, turns, before, kept, attended, *kv_bytes(compiled.program, *cost)
            )
        )
    return out


class _Rehearsal:
    """Stands in for a compiled model: checks each prompt and answers nothing."""

    def __init__(self, program: Program, processor: Any, max_new_tokens: int) -> None:
        self.program = program
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.new_tokens = max_new_tokens
        self.reader = PromptReader(program, family_of(program.config))

    def conversation(self, batch: int) -> None:
        """None: nothing is computed."""

    def generate(self, *, conversation: None, **inputs: Any) -> torch.Tensor:
        known = self.reader.known_inputs
        (row,) = self.reader.read({k: v for k, v in inputs.items() if k in known})
        visual = sum(p.tokens for p in row.pictures)
        prune = self.program.prune
        kept = keep_count(prune.keep_ratio, visual) if prune else visual
        needed = len(row.ids) - visual + kept + self.new_tokens
        if needed > self.program.max_length:
            raise UserError(
                f"needs at least {needed} cache positions with its answer of {self.new_tokens} "
                f"tokens, the limit is {self.program.max_length}; shorten it, lower "
                "max_new_tokens, or raise max_length of insert_kv_cache"
            )
        ids: torch.Tensor = inputs["input_ids"]
        return ids

    def chat(self) -> Session:
        return Session(cast(Any, self))


def rehearse(
    program: Program, processor: Any, dialogues: list[AskedPicture], max_new_tokens: int
) -> None:
    """Build every prompt without running a model, so that what cannot be asked is known early.

    Raises:
        UserError: no chat template, placeholders and pictures that do not fit, a prompt that even
            with empty earlier answers is longer than the cache.
    """
    stand_in = _Rehearsal(program, processor, max_new_tokens)
    for dialogue in dialogues:
        session = stand_in.chat()
        session.add_image(dialogue.picture)
        for turn in dialogue.turns:
            with _asking(dialogue, turn.question):
                session.ask(turn.question)


def kv_bytes(program: Program, visual: int, kept: int, attended: int) -> tuple[int, int]:
    """KV bytes of visual tokens that one decode step reads: dense model, compiled model."""
    sparse = set(program.retrieval.layers) if program.retrieval else set()
    dense = compiled = 0
    for i, cache in enumerate(program.caches):
        token = 2 * cache.kv_heads * cache.head_dim * cache.dtype.itemsize
        dense += visual * token
        compiled += (attended if i in sparse else kept) * token
    return dense, compiled


def same(a: str | None, b: str | None) -> bool:
    """Equal but for case and spaces."""
    return a is not None and b is not None and a.casefold().split() == b.casefold().split()
