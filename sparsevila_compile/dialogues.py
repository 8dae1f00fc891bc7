"""The dialogues that a recipe asks: checked, pictures opened, before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import ConfigDict, Field, ValidationError

from sparsevila_compile.errors import UserError
from sparsevila_compile.recipe import Recipe, RecipeError
from sparsevila_compile.recipe_problems import problems_of
from sparsevila_compile.recipe_sections import Dialogue, Turn
from sparsevila_compile.session import open_picture
from sparsevila_compile.yaml_position import dotted, printable


class _LineTurn(Turn):
    # Datasets carry more than is asked: types of questions, scenes.
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Line(Dialogue):
    model_config = ConfigDict(extra="ignore", frozen=True)
    turns: tuple[_LineTurn, ...] = Field(min_length=1)


@dataclass(frozen=True)
class AskedPicture:
    """A picture, opened, and the questions about it."""

    path: Path
    picture: Image.Image
    turns: tuple[Turn, ...]


def read_dialogues(recipe: Recipe) -> list[AskedPicture]:
    """The dialogues of the recipe's ``ask`` section; empty where it has none.

    Raises:
        RecipeError: lists every line that is no dialogue and every picture that cannot be read.
    """
    ask = recipe.ask
    if ask is None:
        return []
    problems: list[str] = []
    found: list[AskedPicture] = []

    def take(dialogue: Dialogue, path: Path, complain: Callable[[str], None]) -> None:
        try:
            found.append(AskedPicture(path, open_picture(path), dialogue.turns))
        except UserError as error:
            complain(str(error))

    for i, dialogue in enumerate(ask.pictures):
        place = ("ask", "pictures", i, "image")
        take(
            dialogue,
            recipe.resolve(dialogue.image),
            lambda said, place=place: problems.append(str(recipe.error(place, said))),  # type: ignore[misc]
        )
    if ask.file is not None:
        file = recipe.resolve(ask.file)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "is not UTF-8 text"
            raise recipe.error(("ask", "file"), f"{file}: cannot be read: {why}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parsed = _line(line, f"{file}:{number}:1", problems)
            if parsed is not None:
                at = f"{file}:{number}:1 image: "
                place_of = (file.parent / Path(parsed.image).expanduser()).resolve()
                take(parsed, place_of, lambda said, at=at: problems.append(at + said))  # type: ignore[misc]
        if not found and not problems:
            raise recipe.error(("ask", "file"), f"{file}: holds no dialogue")
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def _line(line: str, where: str, problems: list[str]) -> Dialogue | None:
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.append(f"{where} is not JSON: {printable(str(error))}")
        return None
    try:
        return _Line.model_validate_json(line, strict=True)
    except ValidationError as error:
        for problem in problems_of(error, (), _Line):
            key = f"{dotted(problem.path)}: " if problem.path else ""
            problems.append(f"{where} {key}{problem.message}")
        return None
