"""From a recipe to an artifact: load, trace, run the passes, write.

:func:`compile_recipe` is what the command line calls and what library users call.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsevila_compile import artifact, hf
from sparsevila_compile.errors import UserError
from sparsevila_compile.manager import run_passes, steps_for
from sparsevila_compile.manifest import check_target
from sparsevila_compile.pass_base import Context
from sparsevila_compile.program import Program
from sparsevila_compile.recipe import Recipe
from sparsevila_compile.report import PassReport
from sparsevila_compile.trace import trace

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def counts_text(matches: int, misses: int) -> str:
    """``1 match, 2 misses``."""
    return (
        f"{matches} match{'es' if matches != 1 else ''}, {misses} miss{'es' if misses != 1 else ''}"
    )


class Observer:
    """Told what the compiler is doing; this one keeps quiet."""

    def total(self, stages: int) -> None:
        """How many stages there will be."""

    def start(self, stage: str) -> None:
        """A stage begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """The running stage has done so much of ``what``."""

    def end(self, stage: str, seconds: float, detail: str) -> None:
        """A stage is done."""


@dataclass
class Compiled:
    """What :func:`compile_recipe` made.

    Attributes:
        path: the artifact's directory.
        program: the lowered program, still in memory.
        reports: one a pass, in order.
        seconds: wall-clock time of everything.
        weight_bytes: of the weights as loaded.
    """

    path: Path
    program: Program
    reports: list[PassReport]
    seconds: float
    weight_bytes: int


@dataclass
class _Clock:
    observer: Observer
    stage: str = ""
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[list[str]]:
        self.begin(stage)
        detail: list[str] = []
        yield detail
        self.done("".join(detail))

    def begin(self, stage: str) -> None:
        self.stage, self.start = stage, time.perf_counter()
        self.observer.start(stage)

    def done(self, detail: str) -> None:
        self.observer.end(self.stage, time.perf_counter() - self.start, detail)


def choose_device(recipe: Recipe, override: str | None = None) -> torch.device:
    """The device to compile for.

    Args:
        override: instead of ``model.device`` (the command's ``--device``).

    Raises:
        UserError: CUDA is wanted and not there.
    """
    device = wanted_device(recipe, override)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) < count:
        return device
    there = f"there are {count}" if count else "torch sees no CUDA device here; take cpu or auto"
    wrong = f"{device} is wanted, but {there}"
    raise UserError(f"--device: {wrong}") if override else recipe.error(("model", "device"), wrong)


def wanted_device(recipe: Recipe, override: str | None = None) -> torch.device:
    """The device that the recipe (or ``override``) names, whether it is here or not."""
    name = override or recipe.model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_output(recipe: Recipe, output: str | Path | None, overwrite: bool) -> Path:
    """Where the artifact goes; refuses early what could only fail late, or destroy what is needed.

    Raises:
        UserError: the place is taken, cannot be written, or holds the recipe or the checkpoint.
    """
    target = recipe.resolve(recipe.emit.path) if output is None else Path(output).resolve()
    try:
        for what, needed in (
            ("recipe", recipe.directory / Path(recipe.file).name),
            ("checkpoint", Path(recipe.checkpoint())),
        ):
            if needed.exists() and needed.resolve().is_relative_to(target):
                raise UserError(f"{target}: holds the {what}; choose another path")
        return check_target(target, overwrite)
    except UserError as error:
        raise _misplaced(recipe, output, error) from error


def _misplaced(recipe: Recipe, output: str | Path | None, error: UserError) -> UserError:
    if output is None:
        return recipe.error(("emit", "path"), str(error))
    return UserError(f"--output: {error}")


def compile_recipe(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool | None = None,
    device: str | None = None,
    observer: Observer | None = None,
    before_write: Callable[[Program, Any], None] = lambda program, processor: None,
) -> Compiled:
    """Compile the recipe's model and write the artifact, whole or not at all.

    Args:
        output: directory instead of ``emit.path`` (relative to the working directory).
        overwrite: instead of ``emit.overwrite``.
        device: instead of ``model.device``.
        observer: told of stages and progress.
        before_write: called with the lowered program and the processor; what it raises ends the
            compilation with nothing written.

    Raises:
        UserError: the recipe asks for what cannot be had; nothing is written.
    """
    watch = observer or Observer()
    clock = _Clock(watch)
    begun = time.perf_counter()
    where = choose_device(recipe, device)
    replace = recipe.emit.overwrite if overwrite is None else overwrite
    target = check_output(recipe, output, replace)
    passes = recipe.build()
    lowering = recipe.lowering()
    hf.quiet()
    with recipe.blame("model", "path"), clock("read configuration") as said:
        config = _config(recipe)
        awq = hf.awq_format(config, f"{recipe.checkpoint()}: config.json") is not None
        watch.total(len(steps_for(passes, lowering, awq=awq)) + 4)
        processor = hf.load_processor(recipe.checkpoint(), **_hub_options(recipe))
        said.append(str(getattr(config, "model_type", "")))
    with clock("load weights") as said:
        model = load_dense(recipe, where)
        said.append(f"{hf.parameter_count(model) / 1e6:,.1f} M parameters, {where}")
    generation_config = getattr(model, "generation_config", None)
    with clock("trace") as said, recipe.blame("model", "path"):
        program = trace(model)
        said.append(f"{program.family}, {program.node_count()} nodes")
    del model
    size = program.weight_bytes()
    context = Context(processor=processor, progress=watch.progress, base=str(recipe.directory))
    with recipe.blame("passes"):
        reports = run_passes(
            program,
            passes,
            context,
            on_start=clock.begin,
            on_report=lambda r: clock.done(counts_text(len(r.matches), r.miss_count)),
            lowering=lowering,
        )
    before_write(program, processor)
    resolved = recipe.resolved()
    resolved["model"]["device"] = str(where)
    resolved["emit"].update(path=str(target), overwrite=replace)
    with clock("write") as said:
        try:
            path = _save(recipe)(
                program, processor, reports, resolved, target, replace, generation_config
            )
        except UserError as error:
            raise _misplaced(recipe, output, error) from error
        said.append(str(path))
    return Compiled(path, program, reports, time.perf_counter() - begun, size)


def _save(recipe: Recipe) -> Callable[..., Path]:
    """What writes the recipe's format."""
    if recipe.emit.format == "module":
        return artifact.save
    from sparsevila_compile.onnx.bundle import save
    from sparsevila_compile.onnx.lowering import export_options

    emit = recipe.emit
    options = export_options(emit.dtype, emit.pure, emit.int8_activations)
    return functools.partial(save, options=options)


def _hub_options(recipe: Recipe) -> dict[str, Any]:
    section = recipe.model
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}


def _config(recipe: Recipe) -> Any:
    try:
        return hf.load_config(recipe.checkpoint(), **_hub_options(recipe))
    except UserError as error:
        if not recipe.is_hub_id():
            raise
        local = recipe.resolve(recipe.model.path)
        raise UserError(f"no such directory ({local}), and as a hub id: {error}") from error


def load_dense(recipe: Recipe, device: torch.device) -> Any:
    """The recipe's model as transformers runs it.

    Raises:
        UserError: its weights are missing or damaged.
    """
    with recipe.blame("model", "path"):
        return hf.load_model(
            recipe.checkpoint(),
            dtype=DTYPES[recipe.model.dtype],
            device=device,
            **_hub_options(recipe),
        )


def trace_empty(recipe: Recipe) -> Program:
    """The recipe's model traced without weights, from its configuration alone.

    Raises:
        UserError: there is no such checkpoint, or the model is not supported.
    """
    hf.quiet()
    with recipe.blame("model", "path"):
        config = _config(recipe)
        empty = hf.empty_model(config, DTYPES[recipe.model.dtype], recipe.checkpoint())
        return trace(empty)
