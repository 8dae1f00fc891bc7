"""The sparsity study's one-pass retrieval equals a turn-by-turn run with a real cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, LlavaForConditionalGeneration

from examples.cards import model as vlm
from examples.cards import sparsity_study as study
from examples.cards.foretelling import make_watchable, watched
from examples.cards.render import PATCHES
from examples.cards.scoring import by_type, exact_turns
from examples.cards.vocabulary import BOS, EOS, PAD
from examples.cards.world import TURNS, Samples, fixed_set

CPU = torch.device("cpu")
KEPT = 26


@pytest.fixture(scope="module")
def drawn() -> Samples:
    return fixed_set(3, 606, CPU)


@pytest.fixture(scope="module")
def tiny() -> LlavaForConditionalGeneration:
    """Random, with attention sharp enough that what is left out matters."""
    torch.manual_seed(1)
    model = vlm.build(vlm.TINY_SIZES).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "language_model" in name and ("q_proj" in name or "k_proj" in name):
                p.mul_(12)
    return model


class Cached:
    """Feeds one dialogue piece by piece; decoding sees the visual tokens chosen a layer."""

    def __init__(self, model: LlavaForConditionalGeneration, visual: Tensor) -> None:
        self.model, self.cache = model, DynamicCache()
        self.scores: dict[int, Tensor] = {}
        self.asking: Tensor | None = None  # rows of this piece that score
        self.decoding = False
        AttentionInterface.register("test_cached", self.attention)
        model.model.language_model.set_attn_implementation("test_cached")
        start = model.get_input_embeddings()(torch.tensor([[BOS]]))
        self.feed(torch.cat([start, visual], 1))

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer, rows, length = module.layer_idx, query.shape[2], key.shape[2]
        outputs = []
        for head in range(query.shape[1]):
            k, v = (x[0, head // module.num_key_value_groups] for x in (key, value))
            q = query[0, head]
            logits = q @ k.T * scaling
            for r in range(rows):
                logits[r, length - rows + r + 1 :] = -math.inf
            weights = logits.softmax(-1)
            if self.asking is not None:
                visual = weights[self.asking][:, 1 : 1 + PATCHES].sum(0)
                self.scores[layer] = self.scores.get(layer, torch.zeros(PATCHES)) + visual
            if self.decoding:
                chosen = self.scores[layer].topk(KEPT).indices + 1
                seen = torch.cat([torch.tensor([0]), chosen, torch.arange(1 + PATCHES, length)])
                outputs.append((q @ k[seen].T * scaling).softmax(-1) @ v[seen])
            else:
                outputs.append(weights @ v)
        return torch.stack(outputs, 1)[None], None

    @torch.no_grad()
    def feed(self, x: Tensor, asking: Tensor | None = None, decoding: bool = False) -> Tensor:
        """Logits [rows, vocab] of one more piece."""
        if asking is not None:
            self.scores = {}
        self.asking, self.decoding = asking, decoding
        past = self.cache.get_seq_length()
        out = self.model.model.language_model(
            inputs_embeds=x,
            position_ids=torch.arange(past, past + x.shape[1])[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.model.lm_head(out.last_hidden_state)[0]

    def tell(self, ids: list[int], **how: Any) -> Tensor:
        return self.feed(self.model.get_input_embeddings()(torch.tensor([ids])), **how)


def stepped(model: LlavaForConditionalGeneration, drawn: Samples, i: int, visual: Tensor) -> Tensor:
    """Logits at every text position of dialogue i, from prefill and decode with a cache."""
    run, parts = Cached(model, visual[i : i + 1]), []
    opening: list[int] = []
    for turn in range(TURNS):
        question, answer = (drawn.dialogues.turn_ids(i, turn, a) for a in (False, True))
        rows = torch.arange(len(opening) + len(question)) >= len(opening)
        parts.append(run.tell([*opening, *question], asking=rows))
        parts += [run.tell([token], decoding=True) for token in answer]
        opening = [EOS]
    parts.append(run.tell([EOS]))
    model.model.language_model.set_attn_implementation("sdpa")
    return torch.cat(parts)


def one_pass(
    model: LlavaForConditionalGeneration, drawn: Samples, visual: Tensor
) -> tuple[Tensor, Tensor]:
    """Dense and retrieval-sparse logits of the study's attention."""
    talk, decoder = drawn.dialogues, model.model.language_model
    AttentionInterface.register("cards_restricted", study._restricted_attention)
    decoder.set_attn_implementation("cards_restricted")
    with torch.no_grad():
        dense = vlm.text_logits(model, visual, talk.text)
        study.PLAN.kept, study.PLAN.at_random = KEPT, False
        study.PLAN.asking, study.PLAN.restricted = study.turn_rows(talk, first_too=False)
        try:
            sparse = vlm.text_logits(model, visual, talk.text)
        finally:
            study.PLAN.kept = study.PLAN.asking = study.PLAN.restricted = None
            decoder.set_attn_implementation("sdpa")
    return dense, sparse


def test_retrieval_in_one_pass_equals_cached_decoding(
    drawn: Samples, tiny: LlavaForConditionalGeneration
) -> None:
    talk = drawn.dialogues
    torch.manual_seed(2)
    visual = torch.randn(len(drawn), PATCHES, tiny.config.text_config.hidden_size)
    dense, sparse = one_pass(tiny, drawn, visual)
    for i in range(2):
        there = talk.text[i] != PAD
        want = stepped(tiny, drawn, i, visual)
        got, without = sparse[i][there], dense[i][there]
        assert (got - want).norm() / want.norm() < 1e-4
        assert (without - want).norm() / want.norm() > 1e-2, "retrieval made no difference"


def test_training_restricts_answers_as_the_study_does(
    drawn: Samples, tiny: LlavaForConditionalGeneration
) -> None:
    torch.manual_seed(3)
    visual = torch.randn(len(drawn), PATCHES, tiny.config.text_config.hidden_size)
    dense, want = one_pass(tiny, drawn, visual)
    make_watchable(tiny)
    try:
        with torch.no_grad(), watched(drawn.dialogues, KEPT):
            got = vlm.text_logits(tiny, visual, drawn.dialogues.text)
    finally:
        tiny.model.language_model.set_attn_implementation("sdpa")
    there = drawn.dialogues.text != PAD
    assert (got - want)[there].norm() / want[there].norm() < 1e-4
    assert (dense - want)[there].norm() / want[there].norm() > 1e-2


def test_rows_that_ask_and_rows_that_are_restricted(drawn: Samples) -> None:
    talk = drawn.dialogues
    asking, restricted = study.turn_rows(talk, first_too=False)
    _, first = study.turn_rows(talk, first_too=True)
    assert not asking[:, :, : 1 + PATCHES].any()
    for i in range(len(drawn)):
        for t in range(TURNS):
            question, answer = (talk.turn_ids(i, t, a) for a in (False, True))
            rows = [x[i, t, 1 + PATCHES :] for x in (asking, restricted, first)]
            assert talk.text[i][rows[0]].tolist() == question
            assert talk.text[i][rows[1]].tolist() == answer
            assert talk.text[i][rows[2]].tolist() == [question[-1], *answer]


def test_saliences_point_at_different_tokens(
    drawn: Samples, tiny: LlavaForConditionalGeneration
) -> None:
    with torch.no_grad():
        scores = study.saliences(tiny, drawn, torch.Generator().manual_seed(0))
    assert all(s.shape == (len(drawn), PATCHES) for s in scores.values())
    for name, s in scores.items():
        assert s.std() > 0, name
        if "class token" in name:  # a softmax row less its own column
            assert bool((s.sum(1) < 1).all()), name
            assert bool((s.sum(1) > 0.5).all()), name
    top = scores["covered first"].argmax(1)
    assert bool((drawn.covered.gather(1, top[:, None])[:, 0] == drawn.covered.amax(1)).all())


def test_tables_hold_every_run(drawn: Samples, tiny: LlavaForConditionalGeneration) -> None:
    pruned = study.pruning(tiny, drawn, chunk=2)
    found = study.retrieval(tiny, drawn, chunk=2)
    assert len(pruned) == 1 + 6 * len(study.PRUNE_SHARES) * 2
    assert len(found) == 1 + 2 * (2 * len(study.RETRIEVE_SHARES) + 1)
    assert tiny.model.language_model.config._attn_implementation == "sdpa"


def test_a_turn_is_right_only_as_a_whole(drawn: Samples) -> None:
    talk = drawn.dialogues
    logits = torch.zeros(*talk.text.shape, 128)
    logits[:, :-1].scatter_(2, talk.text[:, 1:, None], 1.0)
    assert exact_turns(logits, talk).all()
    assert by_type(exact_turns(logits, talk), talk)["all"] == 100
    at = int((talk.is_answer[0] & (talk.turn[0] == 1)).nonzero()[-1])  # the </s> of turn 1
    assert talk.text[0, at] == EOS
    logits[0, at - 1] = 0
    right = exact_turns(logits, talk)
    assert right[0].tolist() == [True, False, True, True]
    assert right[1:].all()
    assert not exact_turns(torch.zeros_like(logits), talk).any()
