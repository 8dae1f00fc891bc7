"""A loss that makes a question's attention foretell the answer's.

Retrieval-sparse decoding picks a turn's visual tokens by the attention that the question's rows pay
them. In a large model these are about the tokens that the answer's rows look at; a small one has no
reason for it, since the question's rows need not look anything up before the answer begins ("name
the colour of card B ." is followed by "it is", whatever the picture). This loss gives the reason:
in each layer, the divergence of the question rows' mean attention to the visual tokens from that of
the rows that decode an answer's second and later tokens and its end, which is held fixed.

Attention to few tokens also weighs each of them more, which a small model must have met: `watched`
can restrict answers to what their questions retrieve, for training to do so in a part of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from examples.cards.render import PATCHES
from examples.cards.world import Dialogues

IMPLEMENTATION = "cards_watched"


@dataclass
class Watch:
    """What the watched attention notes and does."""

    asking: Tensor  # bool [n, turns, text rows]
    answering: Tensor  # bool [n, turns, text rows]: those that decode feeds
    kept: int | None = None  # visual tokens an answer's rows see in a layer; None: all
    #: of each layer the text rows' weights on visual tokens, mean over heads, before `kept`
    layers: list[Tensor] = field(default_factory=list)


_watch: Watch | None = None


def _watched_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [n, heads, rows, head_dim] as usual, unless a watch is on."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if _watch is not None:
        if attention_mask is not None or key.shape[2] != query.shape[2]:
            raise ValueError("a watch needs whole dialogues with every visual token")
        attention_mask = _note(_watch, query, key, scaling)
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=attention_mask is None, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _note(watch: Watch, query: Tensor, key: Tensor, scaling: float) -> Tensor | None:
    """Note the text rows' weights; a mask bool [n, 1, rows, rows] where answers see a part only."""
    length = query.shape[2]
    rows = length - 1 - PATCHES
    logits = (query[:, :, -rows:] @ key.transpose(2, 3)).float() * scaling
    ahead = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    logits = logits.masked_fill(F.pad(ahead, (1 + PATCHES, 0)), -math.inf)
    weights = torch.softmax(logits, -1)[..., 1 : 1 + PATCHES].mean(1)
    watch.layers.append(weights)
    if watch.kept is None:
        return None
    chosen = (watch.asking.float() @ weights.detach()).topk(watch.kept, 2).indices
    lost = torch.ones(*watch.asking.shape[:2], PATCHES, device=query.device)
    lost.scatter_(2, chosen, 0.0)
    hidden = watch.answering.float().transpose(1, 2) @ lost > 0
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    mask = mask.expand(len(query), 1, -1, -1).clone()
    mask[:, 0, -rows:, 1 : 1 + PATCHES] &= ~hidden
    return mask


def make_watchable(model: LlavaForConditionalGeneration) -> None:
    """Give the language model the attention that :func:`watched` needs."""
    AttentionInterface.register(IMPLEMENTATION, _watched_attention)
    model.model.language_model.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def watched(talk: Dialogues, kept: int | None = None) -> Iterator[Watch]:
    """Watch the language model while it runs over whole dialogues.

    With `kept`, the rows that decode feeds see, in each layer, only the visual tokens that their
    turn's question rows weigh most, as in retrieval-sparse decoding.
    """
    global _watch
    _watch = Watch(*talk.rows(), kept)
    try:
        yield _watch
    finally:
        _watch = None


def foretelling_loss(watch: Watch) -> Tensor:
    """Mean divergence over layers and turns, in nats.

    A turn counts by the share of attention that its answer's rows pay to visual tokens: where they
    pay none there is nothing to foretell.
    """
    asking, answering = watch.asking.float(), watch.answering.float()
    total = watch.layers[0].new_zeros(())
    for weights in watch.layers:
        answer = (answering @ weights).detach()
        share = answer.sum(2) / answering.sum(2).clamp_min(1)
        target = answer / answer.sum(2, keepdim=True).clamp_min(1e-9)
        question = asking @ weights
        guess = question / question.sum(2, keepdim=True).clamp_min(1e-9)
        apart = target * ((target + 1e-9).log() - (guess + 1e-9).log())
        total = total + (apart.sum(2) * share).sum() / share.sum().clamp_min(1e-9)
    return total / len(watch.layers)
