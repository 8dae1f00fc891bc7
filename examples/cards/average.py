"""Average the weights of two exported models: `python -m examples.cards.average A B --out DIR`.

Two models of which one was trained on from the other mostly keep what each does better: the earlier
one how it bears dropped visual tokens, the later one what it was trained on for. Writes the model
and training.json: B's, with what was averaged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from examples.cards import model as vlm
from examples.cards.train import REPORT_FILE


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("first", type=Path, help="folder of an exported model")
    p.add_argument("second", type=Path, help="folder of another of the same sizes")
    p.add_argument("--share", type=float, default=0.5, help="of the second [0.5]")
    p.add_argument("--out", type=Path, required=True, help="folder for the average")
    a = p.parse_args(arguments)
    if not 0 < a.share < 1:
        p.error("--share must lie between 0 and 1")
    first, second = (vlm.load(f, torch.device("cpu"), torch.float32) for f in (a.first, a.second))
    with torch.no_grad():
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        for mine, other in pairs:
            mine.lerp_(other, a.share)
    vlm.export(first, a.out)
    reports = [json.loads((f / REPORT_FILE).read_text()) for f in (a.first, a.second)]
    averaged = [
        {"steps": r["steps"], "share": s}
        for r, s in zip(reports, (1 - a.share, a.share), strict=True)
    ]
    vlm.write_json(a.out / REPORT_FILE, reports[1] | {"averaged": averaged})


if __name__ == "__main__":
    main()
