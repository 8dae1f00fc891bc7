"""Train the card model on one GPU: `python -m examples.cards.train --out runs/cards/model`.

Three stages, each with its own warm-up and cosine, on a schedule tied to wall-clock time:

1. the tower and projector alone (targets.py);
2. the tower frozen, the language model and projector on dialogues. In half of the batches only a
   part of the visual tokens is given, at their original positions, so that none of them becomes a
   place where the model keeps notes about the rest;
3. the same, at a lower learning rate and with the foretelling loss (foretelling.py) on the batches
   that keep all visual tokens.

The same command resumes from --state. --stop-at ends a call early; --warm-start begins from an
exported model when the state is lost. Writes the exported model (config and bf16 weights), the
training heads and training.json to --out.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.cards import model as vlm
from examples.cards.foretelling import foretelling_loss, make_watchable, watched
from examples.cards.render import PATCHES
from examples.cards.scoring import by_type, exact_turns, line
from examples.cards.settings import Settings, parse
from examples.cards.targets import NEIGHBOURS, NOTES, TrainingHeads, make_targets
from examples.cards.world import VALIDATION_SEED, Samples, World, fixed_set, in_chunks

STARTED = time.monotonic()
HEADS_FILE = "training_heads.safetensors"
REPORT_FILE = "training.json"
#: share of stage 2 up to which pictures have (fewest, most) cards
CURRICULUM = ((0.05, (1, 2)), (0.12, (1, 3)), (0.22, (2, 5)), (1.0, (4, 8)))


def log(*what: object) -> None:
    print(*what, flush=True)


class Trainer:
    """Model, heads, optimizer and the clock; `step()` does one update."""

    def __init__(self, settings: Settings) -> None:
        s = self.settings = settings
        name = s.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        torch.manual_seed(s.seed)
        self.dice = random.Random(s.seed)
        self.world = World(self.device)
        self.sizes = vlm.TINY_SIZES if s.tiny else vlm.SIZES
        self.model = vlm.build(self.sizes).to(self.device)
        # residual streams in bf16 under autocast: less memory traffic
        self.model.model.vision_tower.pre_layrnorm.register_forward_hook(
            lambda _module, _inputs, out: out.bfloat16()
        )
        heads = TrainingHeads(self.sizes["tower_width"], self.sizes["text_width"])
        self.heads = heads.to(self.device)
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for module in (self.model, self.heads):
            for key, p in module.named_parameters():
                (decayed if p.ndim >= 2 and "embed" not in key else plain).append(p)
        self.parameters = decayed + plain
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": s.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=s.text_lr,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.draws = torch.Generator(self.device)
        self.queue: list[Samples] = []
        self.steps = self.stage_steps = self.stage = 0
        self.seconds = 0.0  # of training, over all calls
        self.history: list[str] = []
        self.runs: list[dict[str, Any]] = []  # the calls before this one

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Any]:
        return {
            "sizes": self.sizes,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.steps, self.stage_steps, self.stage],
            "seconds": self.seconds,
            "history": self.history,
            "runs": [*self.runs, self._run()],
        }

    def _run(self) -> dict[str, Any]:
        """This call: how far it came, where, and with which settings."""
        settings = asdict(self.settings)
        for key in ("out", "state", "warm_start"):  # where things lay is of no interest later
            del settings[key]
        on = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "device": on,
            "torch": str(torch.__version__),
            "settings": settings,
        }

    def save(self) -> None:
        """Write the state beside its place, then move it there."""
        path = self.settings.state
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(self.state(), part)
        part.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        if state["sizes"] != self.sizes:
            sys.exit(f"{self.settings.state}: made with sizes {state['sizes']}, not {self.sizes}")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.stage_steps, self.stage = state["counters"]
        self.seconds, self.history = state["seconds"], list(state["history"])
        self._prepare_stage()

    def begin(self) -> None:
        """Resume, warm-start or start anew, and say which."""
        s = self.settings
        if s.state.exists():
            state = torch.load(s.state, map_location=self.device, weights_only=True)
            self.restore(state)
            self.runs = state["runs"]
            log(f"resumed {s.state}: step {self.steps}, {self.seconds:.0f} s of training done")
        elif s.warm_start is not None:
            started = vlm.load(s.warm_start, self.device, torch.float32)
            self.model.load_state_dict(started.state_dict())
            self.heads.load_state_dict(load_file(s.warm_start / HEADS_FILE, str(self.device)))
            report = json.loads((s.warm_start / REPORT_FILE).read_text())
            self.seconds, self.steps = report["seconds"], report["steps"]
            self.history, self.runs = report["history"], report["runs"]
            log(f"warm start from {s.warm_start}: {self.seconds:.0f} s of training done")
        else:
            log("starting anew")
        # after a resume other pictures than before; never those of the fixed sets
        self.draws.manual_seed(10_000 * s.seed + self.steps % 9_999)
        self.dice.seed(10_000 * s.seed + self.steps)

    # ------------------------------------------------------------------ schedule
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * self.settings.minutes))

    def _enter_stage(self) -> float:
        """Freeze and reset at the change of stage; the share of the current stage that is over."""
        s, p = self.settings, self.progress()
        ends = (0.0, s.tower_share, 1 - s.foretell_share, 1.0)
        stage = next(i for i in (1, 2, 3) if p < ends[i] or i == 3)
        if stage != self.stage:
            self.stage, self.stage_steps, self.queue = stage, 0, []
            log(f"stage {stage}")
            self._prepare_stage()
        return (p - ends[stage - 1]) / max(ends[stage] - ends[stage - 1], 1e-9)

    def _prepare_stage(self) -> None:
        self.model.model.vision_tower.requires_grad_(self.stage == 1)
        if self.stage == 3:
            make_watchable(self.model)

    def _next(self, part: float) -> Samples:
        s = self.settings
        if not self.queue:
            fewest, most = next(cards for end, cards in CURRICULUM if part <= end or end == 1.0)
            if self.stage != 2:
                fewest, most = (3, 8) if self.stage == 1 else (4, 8)
            rounds = 1 if self.stage == 1 else s.rounds
            drawn = self.world.samples(s.batch * s.chunk, self.draws, fewest, most, rounds)
            self.queue = list(in_chunks(drawn, s.batch))
        return self.queue.pop()

    # ------------------------------------------------------------------ losses
    def _amp(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _see(self, batch: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Features, pooled class token, visual tokens; no gradients to a frozen tower."""
        frozen = torch.no_grad() if self.stage != 1 else contextlib.nullcontext()
        with frozen:
            features, pooled = vlm.see(self.model, vlm.normalised(batch.pictures))
        return features, pooled, vlm.project(self.model, features)

    def _tower_loss(self, batch: Samples) -> Tensor:
        targets = make_targets(batch)
        with self._amp():
            features, pooled, visual = self._see(batch)
            presence = self.heads.presence_loss(pooled, targets.presence)
            patch = self.heads.patch_loss(features, targets.notes)
            words = self.model.get_input_embeddings().weight
            alignment, _ = self.heads.alignment(visual, words, targets.notes)
        return self.settings.presence * presence + patch + alignment

    def _kept(self, covered: Tensor) -> Tensor | None:
        """Indices of the visual tokens this batch keeps, or None for all."""
        s = self.settings
        if self.dice.random() >= s.drop_share:
            return None
        count = round(covered.shape[1] * self.dice.uniform(s.drop_fewest, 1.0))
        score = torch.rand(covered.shape, device=self.device, generator=self.draws)
        if self.dice.random() < 0.5:
            score = score + 0.7 * covered
        return score.topk(count, 1).indices.sort(1).values

    def _retrieved(self) -> int | None:
        """How many visual tokens a layer retrieves for this batch's answers, or None for all."""
        s = self.settings
        if self.dice.random() >= s.retrieve_share:
            return None
        return round(PATCHES * self.dice.uniform(s.retrieve_fewest, s.retrieve_most))

    def _text_loss(self, batch: Samples) -> Tensor:
        targets, talk = make_targets(batch), batch.dialogues.trimmed()
        with self._amp():
            _, _, visual = self._see(batch)
            words = self.model.get_input_embeddings().weight
            alignment, _ = self.heads.alignment(visual, words, targets.notes)
            kept = self._kept(batch.covered)
            foretelling = self.stage == 3 and kept is None
            seen = self._retrieved() if foretelling else None
            with watched(talk, seen) if foretelling else contextlib.nullcontext() as watch:
                logits = vlm.text_logits(self.model, visual, talk.text, kept, dtype=torch.bfloat16)
        loss = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), talk.text[:, 1:].flatten(), reduction="none"
        )
        asked = talk.is_answer[:, 1:].flatten()
        total = (loss * asked).sum() / asked.sum() + self.settings.text_alignment * alignment
        if watch is not None:
            total = total + self.settings.foretell * foretelling_loss(watch)
        return total

    def step(self) -> tuple[Tensor, float]:
        """One update; the loss and the learning rate."""
        s, part = self.settings, self._enter_stage()
        peak = (s.tower_lr, s.text_lr, s.foretell_lr)[self.stage - 1]
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part))
        lr = peak * fall * min(1.0, (self.stage_steps + 1) / s.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self._next(part)
        loss = self._tower_loss(batch) if self.stage == 1 else self._text_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.stage_steps += 1
        return loss.detach(), lr

    # ------------------------------------------------------------------ watching
    @torch.no_grad()
    def validate(self, fixed: Samples) -> str:
        """Stage 1: share of right notes and of right presence; then turn accuracy by type."""
        self.model.eval()
        targets = make_targets(fixed)
        with self._amp():
            _, pooled, visual = self._see(fixed)
            words = self.model.get_input_embeddings().weight
            _, right = self.heads.alignment(visual, words, targets.notes)
            found = self.heads.presence(pooled) > 0
            talk = fixed.dialogues
            with watched(talk) as watch:
                logits = vlm.text_logits(self.model, visual, talk.text, dtype=torch.bfloat16)
        self.model.train()
        notes = dict(zip(NOTES, (100 * right).tolist(), strict=True))
        notes["neighbours"] = sum(notes.pop(k) for k in NEIGHBOURS) / 4
        told = " ".join(f"{k} {v:.0f}" for k, v in notes.items())
        if self.stage == 1:
            missed = (found != (targets.presence > 0.5)).float().mean().item()
            return f"presence wrong {100 * missed:.1f} % | notes right: {told}"
        scores = by_type(exact_turns(logits, fixed.dialogues), fixed.dialogues)
        report = f"turns right: {line(scores)} | neighbours {notes['neighbours']:.0f}"
        if self.stage == 3:
            report += f" | foretelling {foretelling_loss(watch).item():.3f}"
        return report

    def train(self) -> bool:
        """Train until the schedule or this call ends; True when the schedule is over."""
        s = self.settings
        fixed = fixed_set(s.validation, VALIDATION_SEED, self.device)
        count = sum(p.numel() for p in self.model.parameters())
        log(
            f"{count / 1e6:.2f}M parameters, {count * 2 / 1e6:.1f} MB in bf16; {self.device}; "
            f"loaded for {time.monotonic() - STARTED:.0f} s"
        )
        end = s.stop_at or math.inf
        self.stopped = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))
        before, begun = self.seconds, time.monotonic()
        logged = saved = begun
        since, total = 0, torch.zeros((), device=self.device)
        kept = False  # whether a state was saved in this call
        self.model.train()
        while self.seconds < 60 * s.minutes and time.time() < end and not self.stopped:
            loss, lr = self.step()
            total += loss
            since += 1
            self.seconds = before + time.monotonic() - begun
            if time.monotonic() - logged < s.log_seconds:
                continue
            mean = (total / since).item()  # waits for the device
            now = time.monotonic()
            if not math.isfinite(mean):
                if not kept:
                    sys.exit("the loss is not finite from the start: lower the learning rates")
                log("the loss is not finite: back to the last saved state, other pictures")
                seconds = self.seconds
                self.restore(torch.load(s.state, map_location=self.device, weights_only=True))
                self.seconds, self.queue = seconds, []
                self.draws.manual_seed(10_000 * s.seed + self.steps % 9_000 + int(seconds) % 999)
            else:
                rate = since * s.batch / (now - logged)
                told = f"{self.seconds:4.0f} s, step {self.steps}, {rate:.0f} pictures/s, "
                told += f"lr {lr:.1e}, loss {mean:.3f} | {self.validate(fixed)}"
                self.history.append(told)
                log(told)
                if now - saved > s.save_seconds or not kept:
                    self.save()
                    kept, saved = True, time.monotonic()
            logged, since = time.monotonic(), 0
            total.zero_()
        self.seconds = before + time.monotonic() - begun
        self.save()
        done = self.seconds >= 60 * s.minutes
        log(f"{'finished' if done else 'paused'} at {self.seconds:.0f} s, step {self.steps}")
        return done

    def export(self, done: bool) -> None:
        """The model and what is needed for a warm start."""
        out = self.settings.out
        vlm.export(self.model, out)
        heads = {k: v.detach().cpu().contiguous() for k, v in self.heads.state_dict().items()}
        save_file(heads, out / HEADS_FILE)
        report = {
            "finished": done,
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "runs": [*self.runs, self._run()],
            "history": self.history,
        }
        vlm.write_json(out / REPORT_FILE, report)


def main(arguments: list[str] | None = None) -> bool:
    settings = parse(arguments, __doc__)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(settings)
    trainer.begin()
    done = trainer.progress() >= 1.0 or trainer.train()
    trainer.export(done)
    log(f"exported to {settings.out}")
    return done


if __name__ == "__main__":
    main()
