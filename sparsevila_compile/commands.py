"""What each command does, once its arguments are known."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from sparsevila_compile.errors import UserError
from sparsevila_compile.recipe import Recipe, load_recipe


def _quiet_libraries() -> None:
    """No advice and no progress bars of other libraries between our own lines."""
    from transformers.utils import logging

    from sparsevila_compile import hf

    hf.quiet()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def compile_command(options: argparse.Namespace) -> int:
    """``compile RECIPE``: compile, show the report, ask."""
    recipe = load_recipe(options.recipe)

    from sparsevila_compile import display
    from sparsevila_compile.asking import rehearse
    from sparsevila_compile.compiler import compile_recipe
    from sparsevila_compile.dialogues import read_dialogues
    from sparsevila_compile.progress import observer

    _quiet_libraries()
    out = display.console()
    dialogues = [] if options.no_ask else read_dialogues(recipe)
    ask = recipe.ask

    def check(program: Any, processor: Any) -> None:
        if ask is not None:
            with recipe.blame("ask"):
                rehearse(program, processor, dialogues, ask.max_new_tokens)

    with observer(quiet=options.quiet, bars=not options.no_progress) as watch:
        result = compile_recipe(
            recipe,
            output=options.output,
            overwrite=options.overwrite or None,
            device=options.device,
            observer=watch,
            before_write=check,
        )
    if not options.json:
        display.show_result(out, result)
    sizes = (result.weight_bytes, result.program.weight_bytes())
    path, reports, seconds = result.path, result.reports, result.seconds
    device = result.program.device
    del result  # the models that are asked need its memory
    answers = _ask(recipe, path, device, dialogues, options) if dialogues else []
    if options.json:
        _print_json(
            {
                "artifact": str(path),
                "seconds": seconds,
                "weight_bytes": sizes,
                "passes": [r.model_dump(mode="json") for r in reports],
                "answers": [{**dataclasses.asdict(a), "path": str(a.path)} for a in answers],
            }
        )
        return 0
    if answers:
        display.show_answers(out, answers)
        out.print()
        for line in display.summary_lines(answers, sizes):
            out.print(line, markup=False, soft_wrap=True)
    where = display.near(path)
    picture = display.near(dialogues[0].path) if dialogues else "PICTURE"
    out.print(f"\nartifact: {where}", markup=False, soft_wrap=True)
    command = shlex.join(["sparsevila-compile", "run", where, "--image", picture])
    out.print(f"chat with it: {command}", markup=False, soft_wrap=True)
    return 0


def _ask(
    recipe: Recipe, path: Path, device: Any, dialogues: list[Any], options: argparse.Namespace
) -> list[Any]:
    """Ask the dense model, then the artifact as it lies on disk."""
    import gc

    import sparsevila_compile
    from sparsevila_compile import hf
    from sparsevila_compile.asking import DenseModel, ask_all, compare
    from sparsevila_compile.compiler import load_dense
    from sparsevila_compile.progress import observer, timed

    ask = recipe.ask
    assert ask is not None
    section = recipe.model
    with observer(quiet=options.quiet, bars=not options.no_progress) as watch, recipe.blame("ask"):
        watch.total(1 + ask.dense)
        dense = None
        if ask.dense:
            with timed(watch, "ask the dense model"):
                processor = hf.load_processor(
                    recipe.checkpoint(),
                    revision=section.revision,
                    trust_remote_code=section.trust_remote_code,
                )
                model = DenseModel(load_dense(recipe, device), processor)
                dense = ask_all(model, dialogues, ask.max_new_tokens, watch.progress)
                del model
                gc.collect()
        with timed(watch, "ask the compiled model"):
            compiled = sparsevila_compile.load(path, device=device)
            return compare(compiled, dialogues, dense, ask.max_new_tokens, watch.progress)


def plan_command(options: argparse.Namespace) -> int:
    """``plan RECIPE``: what every pass would match; exit code 2 where compiling would fail."""
    recipe = load_recipe(options.recipe)

    from sparsevila_compile import display
    from sparsevila_compile.planning import plan

    steps = plan(recipe)
    if options.json:
        _print_json(
            [
                {
                    "name": s.pass_.name,
                    "index": s.index,
                    "error": s.error,
                    "report": s.report and s.report.model_dump(mode="json"),
                }
                for s in steps
            ]
        )
    else:
        display.show_plan(display.console(), steps)
    return 2 if any(s.error for s in steps) else 0


def explain_command(options: argparse.Namespace) -> int:
    """``explain RECIPE PASS``: one pass, node by node."""
    recipe = load_recipe(options.recipe)

    from sparsevila_compile import display
    from sparsevila_compile.planning import explain

    out = display.console()
    for looked in explain(recipe, options.pass_name):
        display.show_nodes(out, looked)
    return 0


def schema_command(options: argparse.Namespace) -> int:
    """``schema``: the recipe format, for editors or for the documentation."""
    from sparsevila_compile.recipe_schema import recipe_schema, recipe_tables

    if options.markdown:
        print(recipe_tables())
    else:
        _print_json(recipe_schema())
    return 0


def run_command(options: argparse.Namespace) -> int:
    """``run ARTIFACT``: ask a compiled model, or chat with it."""
    import sparsevila_compile
    from sparsevila_compile.session import open_picture

    _quiet_libraries()
    pictures = [open_picture(name) for name in options.image]
    device = None if options.device == "auto" else options.device
    model = sparsevila_compile.load(options.artifact, device=device, provider=options.provider)
    if options.seed is not None:
        import torch

        torch.manual_seed(options.seed)
    session = model.chat(system=options.system, evict_history=options.evict_history)
    for picture in pictures:
        session.add_image(picture)
    arguments = _sampling(options)
    if not options.prompt:
        return _chat(session, model, arguments)
    for prompt in options.prompt:
        if len(options.prompt) > 1:
            print(f"> {prompt}")
        _answer(session, model, prompt, arguments)
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    chosen = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
    }
    given = {k: v for k, v in chosen.items() if v is not None}
    if not given and options.seed is not None:
        raise UserError(
            "--seed: has no effect on a greedy answer; give --temperature, --top-p or --top-k"
        )
    return {"max_new_tokens": options.max_new_tokens, "do_sample": bool(given), **given}


def _answer(session: Any, model: Any, text: str, arguments: dict[str, Any]) -> None:
    """Ask, printing the answer as it comes."""
    from transformers import TextStreamer

    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    session.ask(text, streamer=streamer, **arguments)
    sys.stdout.flush()
    if session.usage.dense_because:
        print(f"decoded densely: {session.usage.dense_because}", file=sys.stderr, flush=True)


CHAT_HELP = "/image PATH adds a picture, /forget starts over, /quit ends; anything else is asked"


def _chat(session: Any, model: Any, arguments: dict[str, Any]) -> int:
    """Questions from stdin until it ends; what goes wrong with one ends only that one."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(CHAT_HELP)
    failed = False
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        text = line.strip()
        if text == "/quit":
            break
        try:
            _line(session, model, text, arguments)
        except UserError as error:
            failed = True
            print(f"sparsevila-compile: error: {error}", file=sys.stderr, flush=True)
    # A script that pipes questions in must notice that one was not answered.
    return 2 if failed and not terminal else 0


def _line(session: Any, model: Any, text: str, arguments: dict[str, Any]) -> None:
    word, _, rest = text.partition(" ")
    if not text:
        return
    if word == "/image":
        if not rest.strip():
            raise UserError("/image: which file? /image PATH")
        session.add_image(Path(rest.strip()).expanduser())
    elif word == "/forget":
        session.forget()
    elif word == "/help":
        print(CHAT_HELP)
    elif word.startswith("/"):
        raise UserError(f"{word}: no such command; {CHAT_HELP}")
    else:
        _answer(session, model, text, arguments)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))
