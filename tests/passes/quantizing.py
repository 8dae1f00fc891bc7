"""Quantizing tiny models: calibration data for any family, and outputs to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sparsevila_compile.conversation import Conversation
from sparsevila_compile.engine import Engine
from sparsevila_compile.families import family_of
from sparsevila_compile.manager import _run
from sparsevila_compile.pass_base import Context
from sparsevila_compile.passes.quantize_linear import QuantizeLinear, QuantizeLinearConfig
from sparsevila_compile.program import Program
from sparsevila_compile.prompt import PromptReader
from sparsevila_compile.report import PassReport
from tests import tiny

SAMPLES = 6


def row(seed: int) -> list[tiny.Item]:
    """Text, one or two pictures, more text; another length for every seed."""
    pictures: list[tiny.Item] = [tiny.Image(seed, (4, 4 + 2 * (seed % 3)))]
    if seed % 3 == 0:
        pictures += [*tiny.words(2, seed + 50), tiny.Image(seed + 100)]
    return [*tiny.words(3, seed), *pictures, *tiny.words(7 + seed % 4, seed + 200)]


class Prompts:
    """Stands in for a processor: a conversation's text is the seed of its prompt."""

    def __init__(self, name: str, rows: Callable[[int], list[tiny.Item]] = row) -> None:
        self.name, self.rows = name, rows

    def apply_chat_template(self, messages: list[Any], tokenize: bool) -> str:
        assert not tokenize
        return str(messages[0]["content"])

    def __call__(self, text: list[str], return_tensors: str) -> dict[str, torch.Tensor]:
        return tiny.inputs(self.name, [self.rows(int(text[0]))])


def data(folder: Path, seeds: Iterable[int] = range(SAMPLES)) -> dict[str, Any]:
    """The option ``calibration``, with its file written for :class:`Prompts`."""
    lines = [json.dumps({"messages": [{"role": "user", "content": str(s)}]}) for s in seeds]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return {"path": "data.jsonl"}


def awq(
    program: Program, name: str, folder: Path, **options: Any
) -> tuple[PassReport, QuantizeLinear]:
    """Calibrate and quantize a tiny model."""
    options = {
        "group_size": 32,
        "calibration": options.get("calibration") or data(folder),
    } | options
    return quantize(program, Context(processor=Prompts(name), base=str(folder)), **options)


def rtn(program: Program, **options: Any) -> tuple[PassReport, QuantizeLinear]:
    return quantize(program, Context(), **{"group_size": 32, "method": "rtn", **options})


def quantize(
    program: Program, context: Context, **options: Any
) -> tuple[PassReport, QuantizeLinear]:
    pass_ = QuantizeLinear(QuantizeLinearConfig(**options))
    return _run(program, pass_, 0, context), pass_


def outputs(
    program: Program, component: str, prompt: dict[str, torch.Tensor], language: str = "language"
) -> torch.Tensor:
    """What a component puts out for one prompt: visual tokens, or the logits of every token."""
    family = family_of(program.config)
    engine, reader = Engine(program, family), PromptReader(program, family)
    if component == "vision":
        inputs = engine.vision_inputs([r.pictures for r in reader.read(prompt)])
        return engine.run("vision", inputs)["visual_tokens"]
    inputs = Conversation(engine, reader, 1, program.max_length).first_inputs(prompt)
    inputs["logit_rows"] = torch.arange(inputs["inputs_embeds"].shape[1])[None]
    return engine.run(language, inputs)["logits"]


def prompt(name: str, seed: int = 77) -> dict[str, torch.Tensor]:
    """A prompt that calibration has not seen."""
    return tiny.inputs(name, [row(seed)])


def smooth(
    program: Program, name: str, folder: Path, **options: Any
) -> tuple[PassReport, QuantizeLinear]:
    """Calibrate with SmoothQuant and quantize a tiny model to int8."""
    options = {"scheme": "w8a8", "calibration": data(folder)} | options
    return quantize(program, Context(processor=Prompts(name), base=str(folder)), **options)


def fp8(program: Program, **options: Any) -> tuple[PassReport, QuantizeLinear]:
    return quantize(program, Context(), **{"scheme": "fp8", **options})
