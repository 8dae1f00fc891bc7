"""Turn accuracy: a turn counts only when the whole answer and its end are right."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.cards.vocabulary import TYPES
from examples.cards.world import Dialogues


def exact_turns(logits: Tensor, talk: Dialogues) -> Tensor:
    """bool [n, turns]: each token of the answer and its </s> is the argmax after the true text."""
    wrong = (logits[:, :-1].argmax(-1) != talk.text[:, 1:]) & talk.is_answer[:, 1:]
    count = torch.zeros(talk.kind.shape, device=logits.device)
    count.scatter_add_(1, talk.turn[:, 1:].clamp_min(0), wrong.float())
    return count == 0


def by_type(right: Tensor, talk: Dialogues) -> dict[str, float]:
    """Accuracy in percent: all turns, each type, and answers of several tokens."""
    groups = {"all": torch.ones_like(right, dtype=torch.bool)}
    groups |= {name: talk.kind == i for i, name in enumerate(TYPES)}
    groups["several tokens"] = talk.answer_tokens > 1
    return {
        name: round(100 * right[chosen].float().mean().item(), 2) if chosen.any() else float("nan")
        for name, chosen in groups.items()
    }


def line(scores: dict[str, float]) -> str:
    """One short line for a log."""
    return " ".join(f"{k.replace('count_', '#')[:8]} {v:.1f}" for k, v in scores.items())
