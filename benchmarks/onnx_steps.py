"""Steps of ``benchmarks.onnx``: sides are opened, checked, and timed in turn; one that fails is left out."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.onnx_placement import read_profile
from benchmarks.onnx_run import Run, relative
from benchmarks.onnx_sides import Bundle, Load, Stock, TorchModel, open_bundle, open_stock, timed


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    p20, p80 = (round(ordered[round(q * last)], 4) for q in (0.2, 0.8))
    return {"median": round(statistics.median(values), 4), "p20": p20, "p80": p80}


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of every side, one call a round, the first to go another one each round."""
    names = list(calls)
    times: dict[str, list[float]] = {n: [] for n in names}
    for call in calls.values():
        call()
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(timed(calls[name], device))
    dense = times.get("dense", [])
    ratios = {
        f"{n} / dense": summary([t / d for t, d in zip(times[n], dense, strict=True)])
        for n in names
        if n != "dense" and dense
    }
    return {"ms": {n: summary(t) for n, t in times.items()}, "ratio": ratios, "rounds": rounds}


class Comparison:
    """What a decode step and a prompt have in common: sides that are opened, checked and timed."""

    def __init__(
        self,
        paths: dict[str, Path],
        load: Load,
        device: torch.device,
        error_limit: float,
        caches: dict[str, torch.Tensor],
        truth: TorchModel | None,
        run: Run,
        key: str,
        sessions: dict[str, Any],
    ) -> None:
        self.paths, self.load, self.device, self.caches = paths, load, device, caches
        self.error_limit, self.truth, self.run, self.key = error_limit, truth, run, key
        self.sessions = sessions  # what is open already, by side

    def opened(self, title: str, call: Callable[[Path], Any]) -> Any:
        """A side's sessions, or None where there are none or they do not start."""
        path = self.paths.get(title)
        if path is not None and title not in self.sessions:
            self.sessions[title] = self.run.step(f"{self.key}: open {title}", lambda: call(path))
        return self.sessions.get(title)

    def side(self, title: str, stock_graphs: tuple[str, ...]) -> Any:
        """A side that decodes densely, or None."""
        device = self.device
        if title == "dense":
            runner = self.opened(title, lambda at: open_bundle(at, device, ("language",)))
            return None if runner is None else Bundle(runner, self.caches)
        sessions = self.opened(title, lambda at: open_stock(at, device, stock_graphs))
        return None if sessions is None else Stock(sessions, device, self.caches)

    def checked(self, found: dict[str, torch.Tensor]) -> dict[str, float]:
        """Relative error of each side's logits against transformers' own, or the dense bundle's.

        What computes something else is not timed, and is left out.
        """
        against = "transformers" if "transformers" in found else "dense"
        reference = found[against].float()
        errors = {n: relative(x.float(), reference) for n, x in found.items() if n != against}
        for n, e in errors.items():
            if not e < self.error_limit:
                self.run.leave_out(f"{self.key}: {n}", f"logits differ from {against}'s: {e:.2g}")
        return errors

    def timed(
        self, calls: dict[str, Callable[[], Any]], errors: dict[str, float], rounds: int
    ) -> dict[str, Any]:
        right = {n: c for n, c in calls.items() if errors.get(n, 0) < self.error_limit}
        return {"relative error of logits": errors, **in_turn(right, rounds, self.device)}


class DecodeStep(Comparison):
    """One token behind a long cache."""

    token = 11

    def measure(self, rounds: int) -> dict[str, Any]:
        load, device = self.load, self.device
        held, head = load.visual + load.text, load.text // 2
        token = torch.tensor([[self.token]], device=device)
        sides = {n: self.side(n, ("decode",)) for n in ("dense", "stock", "stock, fused")}
        found = {}
        for title, side in sides.items():
            if side is not None:
                key = f"{self.key}: {title}"
                found[title] = self.run.step(key, lambda side=side: side.decode(token, held))
        if self.truth is not None:
            found["transformers"] = self.truth.decode(token, self.caches)
        sparse = self.opened("sparse", lambda at: open_bundle(at, device, ("decode",)))
        if sparse is not None:
            everything = Bundle(sparse, self.caches, torch.arange(held), held)
            found["sparse"] = everything.decode(token, held)  # reading all
            del everything
        found = {n: x for n, x in found.items() if x is not None}
        errors = self.checked(found)
        calls = {n: lambda s=s: s.decode(token, held) for n, s in sides.items() if n in found}
        if sparse is not None:
            # After pruning: the first of the visual tokens stay, and of those the first are read.
            text = torch.arange(head + load.visual, held)
            stay = torch.cat([torch.arange(head + load.kept()), text]).to(device)
            pruned = {n: c[:, :, stay] for n, c in self.caches.items()}
            index = torch.arange(head + load.attended())
            few = Bundle(sparse, pruned, index, head + load.kept())
            calls["sparse"] = lambda: few.decode(token, held)
        return self.timed(calls, errors, rounds)

    def placement(self, runs: int = 3) -> dict[str, Any]:
        """Of a dense step: on which provider its nodes ran, what took longest, what was copied."""
        held = self.load.visual + self.load.text
        token = torch.tensor([[self.token]], device=self.device)
        with tempfile.TemporaryDirectory() as folder:
            runner = open_bundle(
                self.paths["dense"], self.device, ("language",), profile=Path(folder)
            )
            side = Bundle(runner, self.caches)
            for _ in range(runs):
                side.decode(token, held)
            found = {n: read_profile(f, runs) for n, f in runner.end_profiling().items()}
        cache = next(iter(self.caches.values())).numel()
        crossed = [n for n, f in found.items() if f["largest copy"] >= cache]
        if crossed:
            self.run.leave_out(f"{self.key}: copies", f"caches cross the bus in {crossed}")
        return {"on the CPU by plan": {n: dict(c) for n, c in runner.on_host.items()}, **found}


class Prompt(Comparison):
    """A prompt's embeddings; the sparse side's is pruned, and it scores."""

    def measure(self, embeds: torch.Tensor, rounds: int) -> dict[str, Any]:
        device = self.device
        graphs = ("language_model", "lm_head")
        sides = {n: self.side(n, graphs) for n in ("dense", "stock", "stock, fused")}
        found = {}
        for title, side in sides.items():
            if side is not None:
                key = f"{self.key}: {title}"
                found[title] = self.run.step(key, lambda side=side: side.prefill(embeds, 0))
        if self.truth is not None:
            found["transformers"] = self.truth.prefill(embeds)
        runner = self.opened("sparse", lambda at: open_bundle(at, device, ("turn",)))
        text, visual = self.load.pruned_prompt()
        if runner is not None:
            sparse = Bundle(runner, self.caches, torch.arange(1), 1)
            found["sparse"] = sparse.prefill(embeds, visual)  # nothing pruned
        found = {n: x for n, x in found.items() if x is not None}
        errors = self.checked(found)
        calls = {n: lambda s=s: s.prefill(embeds, 0) for n, s in sides.items() if n in found}
        if runner is not None:
            fewer = embeds[:, : text + visual].contiguous()
            calls["sparse"] = lambda: sparse.prefill(fewer, visual)
        return self.timed(calls, errors, rounds)
