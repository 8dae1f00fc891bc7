"""Make the released checkpoint: `python -m examples.cards.release --model DIR`.

DIR is an exported model with training.json, evaluation.json and sparsity.json. Writes checkpoint/:
the weights in one bf16 safetensors file, configuration, processor, the three reports and a model
card whose tables are those of the reports. The folder is made beside its place, then moved there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from examples.cards import model as vlm
from examples.cards.processor import save_processor
from examples.cards.vocabulary import TYPES

CHECKPOINT = Path(__file__).with_name("checkpoint")
LARGEST = 25_000_000  # bytes, all files together
REPORTS = ("training.json", "evaluation.json", "sparsity.json")
CARD = Path(__file__).with_name("card.md")
Row = dict[str, Any]


def table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; numbers with one decimal."""
    told = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] * len(head), *told]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_table(report: Row) -> str:
    """Turn accuracy by type of question."""
    counts = report["turns_by_type"]
    rows: list[list[object]] = [["all", sum(counts.values()), report["generate"]["all"]]]
    rows += [[t, counts[t], report["generate"][t]] for t in TYPES]
    return table(["question", "turns", "right, %"], rows)


def pruning_table(report: Row) -> str:
    """Turn accuracy by method, kind of positions and share kept."""
    rows = report["pruning"]
    shares = sorted({r["kept"] for r in rows if r["method"] != "dense"}, reverse=True)
    kinds = dict.fromkeys((r["method"], r["positions"]) for r in rows if r["method"] != "dense")
    found = {(r["method"], r["positions"], r["kept"]): r["all"] for r in rows}
    body: list[list[object]] = [
        [m, p, *(found[m, p, share] for share in shares)]
        for p in ("original", "compact")
        for m, q in kinds
        if q == p
    ]
    dense = next(r["all"] for r in rows if r["method"] == "dense")
    head = ["kept by", "positions", *(f"{100 * s:.0f} %" for s in shares)]
    return f"All tokens: {dense:.1f} %.\n\n" + table(head, body)


def retrieval_table(report: Row) -> str:
    """Turn accuracy by method, rows restricted and share kept."""
    rows = report["retrieval"]
    shares = sorted({r["kept"] for r in rows if r["method"] == "random"}, reverse=True)
    found = {(r["method"], r["first_too"], r["kept"]): r["all"] for r in rows}
    body: list[list[object]] = []
    for first_too, told in ((False, "second token on"), (True, "first token on")):
        for method in ("question rows", "random"):
            body.append([method, told, *(found[method, first_too, s] for s in shares), ""])
        body.append(["nothing", told, *[""] * len(shares), found["nothing", first_too, 0.0]])
    head = ["chosen by", "answer sparse from its", *(f"{100 * s:.0f} %" for s in shares), "none"]
    return table(head, body)


def run_table(report: Row) -> str:
    """The calls of the training command."""
    rows: list[list[object]] = []
    before = (0.0, 0)
    for run in report["runs"]:
        seconds, steps = run["seconds"] - before[0], run["steps"] - before[1]
        before = (run["seconds"], run["steps"])
        batch = run["settings"]["batch"]
        rows.append([run["device"], run["torch"], f"{seconds:.0f}", steps, batch])
    return table(["device", "torch", "seconds", "steps", "pictures a step"], rows)


def write_card(folder: Path) -> str:
    """The model card, its tables filled from the reports in `folder`."""
    training, evaluation, sparsity = (json.loads((folder / name).read_text()) for name in REPORTS)
    filled = {
        "RUNS": run_table(training),
        "SCORES": score_table(evaluation),
        "PRUNING": pruning_table(sparsity),
        "RETRIEVAL": retrieval_table(sparsity),
        "DIALOGUES": str(evaluation["dialogues"]),
        "STUDIED": str(sparsity["dialogues"]),
        "AGREEMENT": f"{evaluation['agreement']:.2f}",
        "SEVERAL": f"{evaluation['answers_of_several_tokens']:.1f}",
    }
    card = CARD.read_text(encoding="utf-8")
    for name, value in filled.items():
        if f"@{name}@" not in card:
            raise ValueError(f"{CARD.name} has no @{name}@")
        card = card.replace(f"@{name}@", value)
    return card


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", type=Path, required=True, help="folder of the exported model")
    p.add_argument("--out", type=Path, default=CHECKPOINT, help="where it goes [%(default)s]")
    a = p.parse_args(arguments)
    part = a.out.with_name(a.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    vlm.export(vlm.load(a.model, torch.device("cpu"), torch.bfloat16), part, shard="1GB")
    save_processor(part)
    for name in REPORTS:
        shutil.copyfile(a.model / name, part / name)
    (part / "README.md").write_text(write_card(part), encoding="utf-8")
    for file in part.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in part.iterdir())
    if size > LARGEST:
        raise SystemExit(f"{part}: {size} bytes, more than {LARGEST}")
    shutil.rmtree(a.out, ignore_errors=True)
    part.replace(a.out)
    print(f"{a.out}: {size} bytes in {len(list(a.out.iterdir()))} files")


if __name__ == "__main__":
    main()
