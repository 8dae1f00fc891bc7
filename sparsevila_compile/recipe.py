"""Recipes: one YAML file that says which model, which passes in which order, and where it goes.

:func:`load_recipe` reports every mistake at once, each on a line of its own as
``file:line:column key.path: what is wrong``, and looks at nothing but the recipe; whether files
that it names exist is for the commands to say, at the same places (:meth:`Recipe.blame`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sparsevila_compile.errors import UserError
from sparsevila_compile.onnx.limits import pass_problems
from sparsevila_compile.recipe_problems import problems_of, suggestion
from sparsevila_compile.recipe_sections import (
    AskSection,
    EmitSection,
    ModelSection,
    RecipeSections,
    check_ask,
    check_emit,
)
from sparsevila_compile.yaml_position import (
    Document,
    KeyPath,
    Problem,
    dotted,
    parse_yaml,
    printable,
    read_text,
)

if TYPE_CHECKING:
    from sparsevila_compile.pass_base import Pass, PassConfig

Registry = Mapping[str, "type[Pass[Any]]"]


class RecipeError(UserError):
    """Mistakes in a recipe, one line each, every line starting with the file's name."""


@dataclass(frozen=True)
class PassItem:
    """A pass of the list with its resolved options."""

    name: str
    config: PassConfig


@dataclass(frozen=True)
class Recipe:
    """A recipe without mistakes.

    Attributes:
        file: the name that error messages start with.
        directory: what relative paths start from: the recipe file's directory.
    """

    file: str
    directory: Path
    model: ModelSection
    passes: tuple[PassItem, ...]
    emit: EmitSection
    ask: AskSection | None
    document: Document = field(repr=False, compare=False, default_factory=Document)

    def resolve(self, path: str) -> Path:
        """A path of the recipe: ``~`` expanded, relative ones from the recipe's directory."""
        return (self.directory / os.path.expanduser(path)).resolve()

    def checkpoint(self) -> str:
        """``model.path`` for transformers: an absolute directory, or the hub id as it stands."""
        return self.model.path if self.is_hub_id() else str(self.resolve(self.model.path))

    def is_hub_id(self) -> bool:
        """Whether ``model.path`` is ``org/name`` with no directory ``org`` here to mean instead."""
        org, slash, name = self.model.path.partition("/")
        if not (org and slash and name) or "/" in name or org.startswith((".", "~")):
            return False
        return not os.path.exists(self.resolve(org))

    def build(self, registry: Registry | None = None) -> list[Pass[Any]]:
        """The passes, ready to run."""
        known = _registry(registry)
        return [known[item.name](item.config) for item in self.passes]

    def lowering(self, registry: Registry | None = None) -> Pass[Any]:
        """The pass that ends the compilation, where the recipe does not list it: for the format."""
        if self.emit.format == "onnx":
            from sparsevila_compile.onnx.lowering import LowerToOnnx

            emit = self.emit
            return LowerToOnnx.of(emit.dtype, emit.pure, emit.int8_activations)
        last = _registry(registry)["lower_ops"]
        return last(last.config_type())

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with every default written out and absolute paths."""
        ask = self.ask.model_dump(mode="json") if self.ask else None
        if ask:
            ask["file"] = ask["file"] and str(self.resolve(ask["file"]))
            for picture in ask["pictures"]:
                picture["image"] = str(self.resolve(picture["image"]))
        return {
            "version": 1,
            "model": {**self.model.model_dump(mode="json"), "path": self.checkpoint()},
            "passes": [{p.name: p.config.model_dump(mode="json")} for p in self.passes],
            "emit": {
                **self.emit.model_dump(mode="json"),
                "path": str(self.resolve(self.emit.path)),
            },
            "ask": ask,
        }

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """An error at a key of this recipe."""
        return _error(self.file, self.document, [Problem(path, message)])

    @contextlib.contextmanager
    def blame(self, *path: str | int) -> Iterator[None]:
        """Within this context a UserError is reported at the place of that key.

        An error that carries the index of a pass is reported at that pass of the list, and at its
        option where the message starts with the option's name.
        """
        try:
            yield
        except RecipeError:
            raise
        except UserError as error:
            index = getattr(error, "index", None)
            message = str(error)
            where: KeyPath = path
            if isinstance(index, int) and index < len(self.passes):
                where, message = _pass_place(index, self.passes[index], message)
            raise self.error(where, message) from error


def _pass_place(index: int, item: PassItem, message: str) -> tuple[KeyPath, str]:
    path: KeyPath = ("passes", index, item.name)
    key, colon, rest = message.partition(": ")
    if colon and key in type(item.config).model_fields:
        return (*path, key), rest
    return path, message.removeprefix(item.name).lstrip(": ")


def load_recipe(path: str | Path, registry: Registry | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        registry: passes by name; the compiler's own by default.

    Raises:
        RecipeError: lists everything that is wrong with it.
    """
    file = Path(path)
    text, problem = read_text(file)
    if problem is not None:
        raise _error(str(path), Document(), [problem])
    document = parse_yaml(text)
    return _check(document, str(path), file.absolute().parent, registry)


def recipe_from_dict(
    data: dict[str, Any],
    directory: str | Path = ".",
    registry: Registry | None = None,
    file: str = "<recipe>",
) -> Recipe:
    """Check a recipe that is plain data already; relative paths start from ``directory``.

    Raises:
        RecipeError: lists everything that is wrong with it.
    """
    try:
        plain = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}:1:1: is not plain data: {printable(str(error))}") from error
    return _check(Document(data=plain), file, Path(directory).absolute(), registry)


def _check(document: Document, file: str, directory: Path, registry: Registry | None) -> Recipe:
    data = document.data
    if document.problems and data is None:
        raise _error(file, document, document.problems)
    problems = list(document.problems)
    if not isinstance(data, dict):
        keys = ", ".join(RecipeSections.model_fields)
        problems.append(Problem((), f"must be a mapping with the keys {keys} and passes"))
        raise _error(file, document, problems)
    version = data.get("version", 1)
    if type(version) is not int or version != 1:  # True is an int, and equal to 1
        message = f"must be 1, not {_short(version)}: this version reads no other format"
        raise _error(file, document, [*problems, Problem(("version",), message)])
    sections: RecipeSections | None = None
    try:
        rest = {k: v for k, v in data.items() if k != "passes"}
        sections = RecipeSections.model_validate_json(json.dumps(rest), strict=True)
    except ValidationError as error:
        problems += problems_of(error, (), RecipeSections, extra_keys=("passes",))
    if sections is not None and sections.ask is not None:
        problems += check_ask(sections.ask)
    if sections is not None:
        problems += check_emit(sections.emit)
    items = _passes(data, problems, _registry(registry))
    if sections is not None and sections.emit.format == "onnx" and not problems:
        problems += pass_problems((item.name, item.config) for item in items)
    if problems or sections is None:
        raise _error(file, document, problems)
    recipe = Recipe(file, directory, sections.model, items, sections.emit, sections.ask, document)
    from sparsevila_compile.manager import steps_for

    with recipe.blame("passes"):
        steps_for(recipe.build(registry), recipe.lowering(registry))
    return recipe


def _passes(
    data: dict[str, Any], problems: list[Problem], registry: Registry
) -> tuple[PassItem, ...]:
    listed = data.get("passes")
    if "passes" not in data:
        problems.append(Problem((), "passes: is required: the list of passes to run"))
        return ()
    if not isinstance(listed, list) or not listed:
        why = f"must be a list of at least one pass, not {_short(listed)}"
        problems.append(Problem(("passes",), why))
        return ()
    items = []
    for i, entry in enumerate(listed):
        item = _pass(entry, ("passes", i), problems, registry)
        if item is not None:
            items.append(item)
    return tuple(items)


def _pass(
    entry: Any, path: KeyPath, problems: list[Problem], registry: Registry
) -> PassItem | None:
    if isinstance(entry, str):
        name, options = entry, None
    elif isinstance(entry, dict) and len(entry) == 1:
        name, options = next(iter(entry.items()))
    else:
        why = f"must be a pass or {{pass: {{options}}}}, not {_short(entry)}"
        if isinstance(entry, dict) and len(entry) > 1:
            why += "; are the options indented below the pass?"
        problems.append(Problem(path, why))
        return None
    if name not in registry:
        hint = suggestion(name, registry) or f"; there are {', '.join(sorted(registry))}"
        problems.append(Problem(path, f"there is no pass {_short(name)}{hint}"))
        return None
    path = (*path, name)
    if options is not None and not isinstance(options, dict):
        problems.append(Problem(path, f"options must be a mapping, not {_short(options)}"))
        return None
    kind = registry[name].config_type
    try:
        config = kind.model_validate_json(json.dumps(options or {}), strict=True)
    except ValidationError as error:
        problems += problems_of(error, path, kind)
        return None
    except UserError as error:
        problems.append(Problem(path, str(error)))
        return None
    return PassItem(name, config)


def _registry(registry: Registry | None) -> Registry:
    if registry is not None:
        return registry
    # Here, not above: passes import torch, and a recipe that is no YAML should say so at once.
    import sparsevila_compile.passes  # noqa: F401  (registers them)
    from sparsevila_compile.pass_base import PASSES

    return PASSES


def _short(value: Any) -> str:
    """A value as a recipe would have it, words in quotes, cut where long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = printable(text)
    return text if len(text) <= 60 else text[:57] + "..."


def _error(file: str, document: Document, problems: list[Problem]) -> RecipeError:
    lines = []
    unread = {p.path for p in document.problems if p.path}
    for problem in problems:
        above = {problem.path[:end] for end in range(1, len(problem.path) + 1)}
        if above & unread and problem not in document.problems:
            continue  # the value could not even be read: that it is missing is no second mistake
        mark = problem.mark or document.mark(problem.path)
        where = f"{dotted(problem.path)}: " if problem.path else ""
        line = f"{file}:{mark.line}:{mark.column} {where}{printable(problem.message)}"
        lines.append((mark.line, mark.column, line))
    unique = dict.fromkeys(line for _, _, line in sorted(lines))
    return RecipeError("\n".join(unique))
