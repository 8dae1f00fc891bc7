"""Settings of the card model's training and their command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Training settings; each is a command-line option, described in :data:`HELP`."""

    out: Path = Path("runs/cards/model")
    state: Path = Path("runs/cards/state.pt")
    warm_start: Path | None = None
    minutes: float = 15.2
    stop_at: float = 0.0
    tower_share: float = 0.33
    foretell_share: float = 0.17
    batch: int = 256
    rounds: int = 2
    chunk: int = 4
    tower_lr: float = 1.5e-3
    text_lr: float = 1.5e-3
    foretell_lr: float = 5e-4
    warmup: int = 300
    weight_decay: float = 0.05
    presence: float = 2.0
    text_alignment: float = 0.05
    foretell: float = 1.0
    retrieve_share: float = 0.5
    retrieve_fewest: float = 0.08
    retrieve_most: float = 0.25
    drop_share: float = 0.5
    drop_fewest: float = 0.2
    seed: int = 1
    validation: int = 256
    log_seconds: float = 20.0
    save_seconds: float = 90.0
    tiny: bool = False
    device: str = ""


HELP = {
    "out": "folder for the exported model",
    "state": "training state, resumed where it exists",
    "warm_start": "exported model to begin from when no state exists",
    "minutes": "training time over all calls",
    "stop_at": "pause at this time, seconds since 1970; 0: no limit",
    "tower_share": "share of the time for stage 1, the tower alone",
    "foretell_share": "share of the time for stage 3",
    "batch": "pictures a step",
    "rounds": "dialogues a picture in stages 2 and 3",
    "chunk": "batches drawn at a time",
    "tower_lr": "peak learning rate of stage 1",
    "text_lr": "peak learning rate of stage 2",
    "foretell_lr": "peak learning rate of stage 3",
    "warmup": "warm-up steps of each stage",
    "weight_decay": "of matrices; embeddings, biases and norms have none",
    "presence": "weight of the presence loss in stage 1",
    "text_alignment": "weight of the alignment loss in stages 2 and 3",
    "foretell": "weight of the foretelling loss in stage 3",
    "retrieve_share": "share of stage 3's whole batches whose answers see what is retrieved",
    "retrieve_fewest": "smallest share of visual tokens retrieved",
    "retrieve_most": "largest share of visual tokens retrieved",
    "drop_share": "share of the batches of stages 2 and 3 with visual tokens dropped",
    "drop_fewest": "smallest share of visual tokens such a batch keeps",
    "seed": "seed, 1 to 4",
    "validation": "dialogues scored at each log line",
    "log_seconds": "seconds between log lines",
    "save_seconds": "seconds between saved states",
    "tiny": "a very small model, to try every code path on a CPU",
    "device": "torch device; a GPU where there is one",
}


def parse(arguments: list[str] | None, description: str | None) -> Settings:
    """Settings from the command line."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(Settings):
        option, text = "--" + f.name.replace("_", "-"), f"{HELP[f.name]} [{f.default}]"
        if isinstance(f.default, bool):
            p.add_argument(option, action="store_true", help=text)
        else:
            kind = Path if f.default is None else type(f.default)
            p.add_argument(option, type=kind, default=f.default, help=text)
    s = Settings(**vars(p.parse_args(arguments)))
    if not 1 <= s.seed <= 4:
        p.error("--seed must be 1 to 4: training draws must stay apart from the fixed sets")
    return s
