"""Write the example's data: `python -m examples.cards.make_data`.

- quickstart/: four held-out pictures whose dialogues together ask every type of question, and
  dialogues.jsonl, a line {"image": FILE, "turns": [{"question": ..., "answer": ...}, ...]} each;
- calibration/: 32 pictures that are neither trained nor scored on and conversations.jsonl, a line
  {"image": FILE, "messages": [chat messages]} each.

Pixels and lines are the same on every machine; how tightly PNG files are packed depends on Pillow.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from examples.cards.vocabulary import spell
from examples.cards.world import CALIBRATION_SEED, HELD_OUT_SEED, Dialogues, Samples, fixed_set

HERE = Path(__file__).parent
QUICKSTART, CALIBRATION = 4, 32  # pictures


def turns(talk: Dialogues, i: int) -> list[dict[str, str]]:
    """Questions and answers of dialogue i as text."""
    return [
        {"question": spell(talk.turn_ids(i, t, False)), "answer": spell(talk.turn_ids(i, t, True))}
        for t in range(talk.kind.shape[1])
    ]


def messages(talk: Dialogues, i: int) -> list[dict[str, Any]]:
    """Dialogue i as chat messages, the picture first."""
    said: list[dict[str, Any]] = []
    for turn in turns(talk, i):
        for role, key in (("user", "question"), ("assistant", "answer")):
            said.append({"role": role, "content": [{"type": "text", "text": turn[key]}]})
    said[0]["content"].insert(0, {"type": "image"})
    return said


def picture(samples: Samples, i: int) -> Image.Image:
    """Picture i, RGB."""
    return Image.fromarray(samples.pictures[i].permute(1, 2, 0).contiguous().numpy())


def varied(samples: Samples, count: int) -> Samples:
    """`count` samples, each the first of those that ask most types not asked before."""
    asked: set[int] = set()
    kinds = {i: set(row) for i, row in enumerate(samples.dialogues.kind.tolist())}
    chosen: list[Samples] = []
    for _ in range(count):
        i = max(kinds, key=lambda j: len(kinds[j] - asked))
        asked |= kinds.pop(i)
        chosen.append(samples[i : i + 1])
    return Samples.cat(chosen)


def write_set(folder: Path, file: str, samples: Samples, entries: list[dict[str, Any]]) -> None:
    """Pictures, then the file that names them, written beside its place and moved there."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, entry in enumerate(entries):
        picture(samples, i).save(folder / entry["image"], optimize=True)
    part = folder / (file + ".part")
    part.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    part.replace(folder / file)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=HERE, help="where the folders go [%(default)s]")
    out = p.parse_args(arguments).out
    cpu = torch.device("cpu")
    held_out = varied(fixed_set(50, HELD_OUT_SEED, cpu), QUICKSTART)
    asked = [
        {"image": f"{i}.png", "turns": turns(held_out.dialogues, i)} for i in range(QUICKSTART)
    ]
    write_set(out / "quickstart", "dialogues.jsonl", held_out, asked)
    others = fixed_set(CALIBRATION, CALIBRATION_SEED, cpu)
    talks = [
        {"image": f"{i:03d}.png", "messages": messages(others.dialogues, i)}
        for i in range(CALIBRATION)
    ]
    write_set(out / "calibration", "conversations.jsonl", others, talks)


if __name__ == "__main__":
    main()
