"""Score an exported model on held-out dialogues: `python -m examples.cards.evaluate --model DIR`.

Two readings of the same turns: *teacher forced*, each answer token being the argmax after the true
text before it, and *generate*, greedy `model.generate` turn by turn with the model's own earlier
answers in the prompt. Writes evaluation.json beside the model, or to --out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from examples.cards import model as vlm
from examples.cards.render import PATCHES
from examples.cards.scoring import by_type, exact_turns, line
from examples.cards.vocabulary import BOS, EOS, IMAGE, PAD, TYPES
from examples.cards.world import HELD_OUT_SEED, Samples, fixed_set, in_chunks

LONGEST_ANSWER = 10  # tokens; one more than any true answer with its </s>


def add_arguments(p: argparse.ArgumentParser, dialogues: int, report: str) -> None:
    """The options that this command shares with the sparsity study."""
    p.add_argument("--model", type=Path, required=True, help="folder of the exported model")
    p.add_argument("--dialogues", type=int, default=dialogues, help=f"held-out ones [{dialogues}]")
    p.add_argument("--seed", type=int, default=HELD_OUT_SEED, help=f"their seed [{HELD_OUT_SEED}]")
    p.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--out", type=Path, help=f"report [MODEL/{report}]")


def load_subject(a: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, Samples]:
    """Model and held-out dialogues that the shared options name."""
    device = torch.device(a.device)
    samples = fixed_set(a.dialogues, a.seed, device)
    samples.dialogues = samples.dialogues.trimmed()
    return vlm.load(a.model, device, getattr(torch, a.dtype)), samples


@torch.inference_mode()
def teacher_forced(
    model: LlavaForConditionalGeneration, samples: Samples, chunk: int = 100
) -> Tensor:
    """bool [n, turns]."""
    right = []
    for part in in_chunks(samples, chunk):
        features, _ = vlm.see(model, vlm.normalised(part.pictures, model.dtype))
        logits = vlm.text_logits(model, vlm.project(model, features), part.dialogues.text)
        right.append(exact_turns(logits, part.dialogues))
    return torch.cat(right)


@torch.inference_mode()
def generated(
    model: LlavaForConditionalGeneration, samples: Samples, chunk: int = 125
) -> tuple[Tensor, list[list[list[int]]]]:
    """Greedy answers with the model's own history. bool [n, turns] and the answers' token ids."""
    right, said = [], []
    for part in in_chunks(samples, chunk):
        talk, pixels = part.dialogues, vlm.normalised(part.pictures, model.dtype)
        histories = [[BOS, *[IMAGE] * PATCHES] for _ in range(len(part))]
        answers: list[list[list[int]]] = [[] for _ in range(len(part))]
        turns = talk.kind.shape[1]
        for turn in range(turns):
            for i, history in enumerate(histories):
                history += talk.turn_ids(i, turn, answer=False)
            width = max(map(len, histories))
            ids = torch.tensor([[PAD] * (width - len(h)) + h for h in histories])
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=(ids != PAD).long().to(model.device),
                pixel_values=pixels,
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
            )
            for i, new in enumerate(out[:, width:].tolist()):
                answer = new[: new.index(EOS)] if EOS in new else [t for t in new if t != PAD]
                answers[i].append(answer)
                histories[i] += [*answer, EOS]
        right += [
            [answers[i][t] == talk.turn_ids(i, t, answer=True) for t in range(turns)]
            for i in range(len(part))
        ]
        said += answers
    return torch.tensor(right, device=model.device), said


def evaluate(model: LlavaForConditionalGeneration, samples: Samples) -> dict[str, Any]:
    """Scores in percent, by question type."""
    talk = samples.dialogues.to(torch.device("cpu"))
    forced = teacher_forced(model, samples).cpu()
    greedy = generated(model, samples)[0].cpu()
    return {
        "dialogues": len(samples),
        "turns_by_type": {t: int((talk.kind == i).sum()) for i, t in enumerate(TYPES)},
        "answers_of_several_tokens": round(100 * (talk.answer_tokens > 1).float().mean().item(), 1),
        "teacher_forced": by_type(forced, talk),
        "generate": by_type(greedy, talk),
        "generate_by_turn": [round(100 * x, 2) for x in greedy.float().mean(0).tolist()],
        "agreement": round(100 * (forced == greedy).float().mean().item(), 2),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__)
    add_arguments(p, 1000, "evaluation.json")
    a = p.parse_args(arguments)
    began = time.monotonic()
    report = evaluate(*load_subject(a))
    report |= {"seed": a.seed, "device": a.device, "dtype": a.dtype}
    report["seconds"] = round(time.monotonic() - began, 1)
    vlm.write_json(a.out or a.model / "evaluation.json", report)
    print("teacher forced:", line(report["teacher_forced"]), flush=True)
    print("generate:      ", line(report["generate"]), flush=True)
    print({k: v for k, v in report.items() if k not in ("teacher_forced", "generate")}, flush=True)
    return report


if __name__ == "__main__":
    main()
