"""How the model behaves when visual tokens are left out: is it a fair subject for such methods?

`python -m examples.cards.sparsity_study --model DIR` scores held-out dialogues, teacher forced:

1. *pruning*: visual tokens dropped before the language model by the tower's attention (a layer's
   class-token row, or its column mean over patches), at random, or covered patches first, at their
   original positions or compacted;
2. *retrieval*: the cache keeps every token, but rows that decode sees (answer tokens) attend only
   to the visual tokens that the turn's question rows weigh most, layer by layer (full-row causal
   softmax, mean over heads and question rows). The first token of an answer comes from the
   question's last row, which prefill computes densely; `first_too` restricts that row as well.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from examples.cards import model as vlm
from examples.cards.evaluate import add_arguments, load_subject
from examples.cards.render import PATCHES
from examples.cards.scoring import by_type, exact_turns, line
from examples.cards.world import Dialogues, Samples, in_chunks

PRUNE_SHARES = (0.5, 0.25, 0.1)
RETRIEVE_SHARES = (0.25, 0.1, 0.05)
Table = list[dict[str, Any]]


def saliences(
    model: LlavaForConditionalGeneration, part: Samples, g: torch.Generator
) -> dict[str, Tensor]:
    """Scores of the visual tokens by every method, float32 [n, PATCHES]."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")  # the one that returns attention weights
    pixels = vlm.normalised(part.pictures, model.dtype)
    attentions = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    chance = torch.rand(len(part), PATCHES, generator=g).to(part.covered.device)
    scores = {"random": chance, "covered first": part.covered + 1e-3 * chance}
    for name, layer in (("last layer", -1), ("layer before", -2)):
        weights = attentions[layer].float().mean(1)
        scores[f"class token, {name}"] = weights[:, 0, 1:]
        scores[f"column mean, {name}"] = weights[:, 1:, 1:].mean(1)
    return scores


@torch.inference_mode()
def pruning(model: LlavaForConditionalGeneration, samples: Samples, chunk: int) -> Table:
    """Turn accuracy for every method, share kept and kind of positions."""
    g = torch.Generator().manual_seed(5)
    right: dict[tuple[str, float, str], list[Tensor]] = {}
    for part in in_chunks(samples, chunk):
        features, _ = vlm.see(model, vlm.normalised(part.pictures, model.dtype))
        visual, text = vlm.project(model, features), part.dialogues.text
        dense = vlm.text_logits(model, visual, text)
        right.setdefault(("dense", 1.0, "-"), []).append(exact_turns(dense, part.dialogues))
        for name, score in saliences(model, part, g).items():
            for share in PRUNE_SHARES:
                kept = score.topk(math.ceil(share * PATCHES), 1).indices.sort(1).values
                for positions in ("original", "compact"):
                    logits = vlm.text_logits(model, visual, text, kept, positions == "compact")
                    row = right.setdefault((name, share, positions), [])
                    row.append(exact_turns(logits, part.dialogues))
    return [
        {"method": m, "kept": share, "positions": p, **by_type(torch.cat(r), samples.dialogues)}
        for (m, share, p), r in right.items()
    ]


@dataclass
class _Plan:
    """What the restricted attention below does; one study runs at a time."""

    kept: int | None = None  # visual tokens a layer; None (with the two below): dense
    at_random: bool = False
    asking: Tensor | None = None  # bool [n, turns, rows]: rows that score
    restricted: Tensor | None = None  # bool [n, turns, rows]: rows that see only what was kept
    draws: torch.Generator | None = None


PLAN = _Plan()


def _restricted_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager causal attention [n, heads, rows, head_dim] over whole dialogues, obeying PLAN.

    Every row of a turn other than the restricted ones is dense, so keys and values of later turns
    equal those of a turn-by-turn run that keeps the full cache.
    """
    n, heads, rows, _d = query.shape
    if key.shape[2] != rows:
        raise ValueError("the study needs whole dialogues in one pass, without a cache")
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query.float() @ key.float().transpose(2, 3) * scaling
    ahead = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    logits = logits.masked_fill(ahead, -math.inf)
    if PLAN.kept is not None and PLAN.asking is not None and PLAN.restricted is not None:
        weights = torch.softmax(logits, -1).mean(1)[:, :, 1 : 1 + PATCHES]
        hidden = torch.zeros(n, rows, rows, dtype=torch.bool, device=query.device)
        for turn in range(PLAN.asking.shape[1]):
            score = PLAN.asking[:, turn].float()[:, None, :] @ weights
            if PLAN.at_random:
                score = torch.rand(score.shape, generator=PLAN.draws).to(score)
            chosen = score[:, 0].topk(PLAN.kept, 1).indices
            lost = torch.zeros(n, rows, dtype=torch.bool, device=query.device)
            lost[:, 1 : 1 + PATCHES] = True
            lost.scatter_(1, 1 + chosen, False)
            hidden |= PLAN.restricted[:, turn][:, :, None] & lost[:, None, :]
        logits = logits.masked_fill(hidden[:, None], -math.inf)
    out = torch.softmax(logits, -1) @ value.float()
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def turn_rows(talk: Dialogues, first_too: bool) -> tuple[Tensor, Tensor]:
    """Rows that ask and rows that are restricted, bool [n, turns, 1 + PATCHES + text].

    An answer's </s> opens the next prefill, so its row stays dense.
    """
    asking, restricted = talk.rows()
    if first_too:
        before_answer = F.pad(talk.is_answer[:, 1:], (0, 1))[:, None]
        restricted = restricted | (asking & before_answer)
    return F.pad(asking, (1 + PATCHES, 0)), F.pad(restricted, (1 + PATCHES, 0))


@torch.inference_mode()
def retrieval(model: LlavaForConditionalGeneration, samples: Samples, chunk: int) -> Table:
    """Turn accuracy for query-aware and random retrieval, and with nothing kept."""
    AttentionInterface.register("cards_restricted", _restricted_attention)
    model.model.language_model.set_attn_implementation("cards_restricted")
    runs: list[tuple[str, float | None, bool]] = [("dense", None, False)]
    for first_too in (False, True):
        runs += [(m, x, first_too) for m in ("question rows", "random") for x in RETRIEVE_SHARES]
        runs.append(("nothing", 0.0, first_too))
    right: dict[tuple[str, float | None, bool], list[Tensor]] = {run: [] for run in runs}
    try:
        for part in in_chunks(samples, chunk):
            features, _ = vlm.see(model, vlm.normalised(part.pictures, model.dtype))
            visual = vlm.project(model, features)
            for run in runs:
                method, share, first_too = run
                PLAN.kept = None if share is None else math.ceil(share * PATCHES)
                PLAN.at_random = method == "random"
                PLAN.draws = torch.Generator().manual_seed(9)
                PLAN.asking, PLAN.restricted = turn_rows(part.dialogues, first_too)
                logits = vlm.text_logits(model, visual, part.dialogues.text)
                right[run].append(exact_turns(logits, part.dialogues))
    finally:
        PLAN.kept = PLAN.asking = PLAN.restricted = None
        model.model.language_model.set_attn_implementation("sdpa")
    return [
        {
            "method": method,
            "kept": 1.0 if share is None else share,
            "first_too": first_too,
            **by_type(torch.cat(r), samples.dialogues),
        }
        for (method, share, first_too), r in right.items()
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(p, 500, "sparsity.json")
    p.add_argument("--chunk", type=int, default=50, help="dialogues at a time [50]")
    a = p.parse_args(arguments)
    began = time.monotonic()
    model, samples = load_subject(a)
    report: dict[str, Any] = {
        "dialogues": len(samples),
        "seed": a.seed,
        "device": a.device,
        "dtype": a.dtype,
        "pruning": pruning(model, samples, a.chunk),
        "retrieval": retrieval(model, samples, a.chunk),
    }
    report["seconds"] = round(time.monotonic() - began, 1)
    vlm.write_json(a.out or a.model / "sparsity.json", report)
    for table in ("pruning", "retrieval"):
        print(f"\n{table}, turn accuracy %", flush=True)
        for row in report[table]:
            head = [
                str(v) for k, v in row.items() if k in ("method", "kept", "positions", "first_too")
            ]
            scores = {k: v for k, v in row.items() if isinstance(v, float) and k != "kept"}
            print(f"{' '.join(head):42s}", line(scores), flush=True)
    return report


if __name__ == "__main__":
    main()
