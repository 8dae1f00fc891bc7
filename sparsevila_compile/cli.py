"""The ``sparsevila-compile`` command: arguments, and errors as one line with an exit code.

Exit codes: 0 done; 1 an internal error; 2 something that the user can put right; 130 interrupted.
Nothing heavy is imported before the arguments are known, so ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsevila_compile import __version__
from sparsevila_compile.errors import UserError

PROGRAM = "sparsevila-compile"

EXAMPLES = """\
examples:
  sparsevila-compile recipes/quickstart.yaml
      compile, and ask what the recipe's `ask:` section asks
  sparsevila-compile plan recipes/quickstart.yaml
      what every pass would match and miss; needs no weights, writes nothing
  sparsevila-compile explain recipes/quickstart.yaml prune_visual_tokens
      one pass, node by node
  sparsevila-compile run out/quickstart --image picture.png --prompt "how many cards are there ?"
      ask a compiled model; without --prompt it is a chat
  sparsevila-compile schema > recipe.schema.json
      JSON Schema of recipes, for editors
"""

RUN_EXAMPLES = """\
examples:
  sparsevila-compile run out/quickstart --image a.png --prompt "how many cards are there ?"
  sparsevila-compile run out/quickstart --image a.png --prompt "first question" --prompt "second"
  sparsevila-compile run out/quickstart --image a.png
      a chat: type questions; /image PATH adds a picture, /forget starts over, /quit ends

temperature, top-p and top-k draw the answer at random; without them it is greedy.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    main = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compile Hugging Face vision-language models into sparse, quantized ones. "
        "`sparsevila-compile RECIPE` is short for `sparsevila-compile compile RECIPE`.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    main.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument(
            "--debug", action="store_true", help="show warnings, and tracebacks of errors"
        )
        return sub

    _compile_arguments(command("compile", "compile a recipe's model and write the artifact"))
    plan = command("plan", "show what each pass would match, and what it would miss and why")
    plan.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _run_arguments(command("run", "ask a compiled model about pictures", RUN_EXAMPLES))
    explain = command("explain", "show what one pass looks at, node by node")
    explain.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    explain.add_argument("pass_name", metavar="PASS", help="a pass that the recipe runs")
    schema = command("schema", "print the JSON Schema of recipes, for editors")
    schema.add_argument(
        "--markdown", action="store_true", help="print tables of all keys instead (Markdown)"
    )
    return main


def _compile_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    sub.add_argument("--output", metavar="DIR", help="where to write, instead of emit.path")
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an artifact, as emit.overwrite: true does"
    )
    sub.add_argument(
        "--device",
        type=_device,
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N, not the recipe's",
    )
    sub.add_argument("--no-ask", action="store_true", help="do not ask what `ask:` asks")
    sub.add_argument("--no-progress", action="store_true", help="a line a stage instead of bars")
    sub.add_argument("--quiet", action="store_true", help="no progress at all; results only")
    sub.add_argument("--json", action="store_true", help="print the report as JSON, not as tables")


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "artifact", metavar="ARTIFACT", help="directory that compiling made (or an ONNX bundle)"
    )
    sub.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
    sub.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a question; repeated, they are turns of one dialogue; without it a chat starts",
    )
    sub.add_argument("--system", metavar="TEXT", help="system prompt")
    sub.add_argument("--device", type=_device, metavar="DEVICE", help="device to run on")
    sub.add_argument(
        "--provider",
        metavar="PROVIDER",
        help="of an ONNX bundle: ONNX Runtime's execution provider, cpu, cuda or cuda:N",
    )
    sub.add_argument(
        "--max-new-tokens", type=_positive, default=256, metavar="N", help="answer length at most"
    )
    sub.add_argument("--temperature", type=_temperature, metavar="T", help="above 0; sampling")
    sub.add_argument("--top-p", type=_share, metavar="P", help="in (0, 1]; sampling")
    sub.add_argument("--top-k", type=_positive, metavar="K", help="at least 1; sampling")
    sub.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")
    sub.add_argument(
        "--evict-history",
        action="store_true",
        help="forget earlier questions and answers at each question; pictures stay",
    )


def _number(
    text: str, kind: Callable[[str], float], good: Callable[[float], bool], want: str
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not good(value):
        raise argparse.ArgumentTypeError(f"must be {want}, not {text!r}")
    return value


def _positive(text: str) -> int:
    return int(_number(text, int, lambda v: v >= 1, "a whole number above 0"))


def _temperature(text: str) -> float:
    return _number(text, float, lambda v: 0 < v < float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _number(text, float, lambda v: 0 < v <= 1, "a number in (0, 1]")


def _device(text: str) -> str:
    kind, colon, number = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and number.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")


COMMANDS = ("compile", "plan", "run", "explain", "schema")


def with_command(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``compile`` in front where they name no command.

    Raises:
        UserError: the first word is neither a recipe nor a command, but nearly a command.
    """
    words = list(arguments)
    if not words or words[0] in (*COMMANDS, "-h", "--help", "--version"):
        return words
    first = words[0]
    if not first.startswith("-") and not Path(first).suffix and not Path(first).exists():
        close = difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.6)
        if close:
            raise UserError(f"{first}: no such command or recipe, did you mean {close[0]}?")
    return ["compile", *words]


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. Errors are raised."""
    options = parser().parse_args(with_command(arguments))
    if not options.debug:
        warnings.simplefilter("ignore")
    from sparsevila_compile import commands

    code: int = getattr(commands, f"{options.command}_command")(options)
    return code


def _say(message: str) -> None:
    """Print an error; lines that name a file and a place stand as they are, for editors to find."""
    for line in message.splitlines() or ["unknown error"]:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        placed = re.match(r".+?:\d+:\d+ ", text)
        print(text if placed else f"{PROGRAM}: error: {text}", file=sys.stderr)


def _os_error(error: OSError) -> str | None:
    """One line for what a user can put right, or None."""
    codes = (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EFBIG,
    )
    if error.errno not in codes:
        return None
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror}"


def run(arguments: Sequence[str]) -> int:
    """Run the command; every error becomes a line on stderr and an exit code."""
    debug = "--debug" in arguments
    try:
        code = main(arguments)
        sys.stdout.flush()  # a reader that has gone shows here, not at exit
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep Python from saying so once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = _os_error(error) if isinstance(error, OSError) else None
        if said is None and isinstance(error, MemoryError):
            said = "out of memory; compile on a machine with more, or take a smaller dtype"
        if said is None and type(error).__name__ == "OutOfMemoryError":
            said = "out of GPU memory; take model.device: cpu, a smaller dtype, or shorter prompts"
        if said is not None:
            _say(said)
            return 2
        detail = " ".join(str(error).split())[:300]
        print(
            f"{PROGRAM}: internal error: {type(error).__name__}: {detail}; "
            "run with --debug for the traceback",
            file=sys.stderr,
        )
        return 1


def entry_point() -> int:
    """The console script."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run(sys.argv[1:])
