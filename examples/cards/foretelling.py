"""A loss that makes a question's attention foretell the answer's.

Retrieval-sparse decoding picks a turn's visual tokens by the attention that the question's rows pay
them. In a large model these are about the tokens that the answer's rows look at; a small one has no
reason for it, since the question's rows need not look anything up before the answer begins ("name
the colour of card B ." is followed by "it is", whatever the picture). This loss gives the reason:
in each layer, the divergence of the question rows' mean attention to the visual tokens from that of
the rows that decode an answer's second and later tokens and its end, which is held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from examples.cards.render import PATCHES
from examples.cards.vocabulary import EOS
from examples.cards.world import Dialogues

IMPLEMENTATION = "cards_watched"
#: while a watch is on: a layer's mean over heads of the text rows' weights on visual tokens
_seen: list[Tensor] | None = None


def _watched_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [n, heads, rows, head_dim] as usual; notes the text rows' weights when watched."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=attention_mask is None, scale=scaling
    )
    if _seen is not None:
        if attention_mask is not None or key.shape[2] != query.shape[2]:
            raise ValueError("a watch needs whole dialogues with every visual token")
        rows = query.shape[2] - 1 - PATCHES
        logits = (query[:, :, -rows:] @ key.transpose(2, 3)).float() * scaling
        ahead = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(F.pad(ahead, (1 + PATCHES, 0)), -math.inf)
        _seen.append(torch.softmax(logits, -1)[..., 1 : 1 + PATCHES].mean(1))
    return out.transpose(1, 2).contiguous(), None


def make_watchable(model: LlavaForConditionalGeneration) -> None:
    """Give the language model the attention that :func:`watched` needs."""
    AttentionInterface.register(IMPLEMENTATION, _watched_attention)
    model.model.language_model.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """Collects one float32 [n, text rows, PATCHES] a layer while the language model runs."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def foretelling_loss(layers: list[Tensor], talk: Dialogues) -> Tensor:
    """Mean divergence over layers and turns, in nats.

    A turn counts by the share of attention that its answer's rows pay to visual tokens: where they
    pay none there is nothing to foretell.
    """
    turns = torch.arange(talk.kind.shape[1], device=talk.text.device)
    here = talk.turn[:, None, :] == turns[:, None]
    asking = (here & ~talk.is_answer[:, None]).float()
    giving = (here & (talk.is_answer & (talk.text != EOS))[:, None]).float()
    total = layers[0].new_zeros(())
    for weights in layers:
        answer = (giving @ weights).detach()
        share = answer.sum(2) / giving.sum(2).clamp_min(1)
        target = answer / answer.sum(2, keepdim=True).clamp_min(1e-9)
        question = asking @ weights
        guess = question / question.sum(2, keepdim=True).clamp_min(1e-9)
        apart = target * ((target + 1e-9).log() - (guess + 1e-9).log())
        total = total + (apart.sum(2) * share).sum() / share.sum().clamp_min(1e-9)
    return total / len(layers)
