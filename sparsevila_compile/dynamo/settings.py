"""The backend's options: ``torch.compile(..., options={"recipe": …, "strict": …, "inner": …})``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevila_compile.errors import UserError
from sparsevila_compile.recipe import Recipe, load_recipe, recipe_from_dict
from sparsevila_compile.recipe_problems import suggestion

INNERS = ("inductor", "eager")
KEYS = ("recipe", "strict", "inner")

DEFAULT_PASSES: list[Any] = [
    {"prune_visual_tokens": {"keep_ratio": 0.5}},
    "insert_kv_cache",
    {"sparsify_decode_attention": {"keep_ratio": 0.25}},
]
"""What is done without a recipe: nothing that would need calibration data. The ratios lie in the
ranges that SparseVILA (arXiv 2510.17777) reports for images: 25 to 55 % kept, 5 to 25 % retrieved."""

_ELSEWHERE = {"version": 1, "model": {"path": "."}, "emit": {"path": "."}}
"""Stands in for what a recipe given as a dict may leave out here: the model is at hand."""


@dataclass(frozen=True)
class Settings:
    """Checked options.

    Attributes:
        recipe: whose passes are run.
        named: whether the recipe says where its checkpoint is.
        unused: keys of the recipe that have no meaning here.
    """

    recipe: Recipe
    strict: bool
    inner: str
    named: bool
    unused: tuple[str, ...]

    def same(self, other: Settings) -> bool:
        """Whether both ask for the same."""
        mine, others = self.recipe, other.recipe
        asked = (self.strict, self.inner) == (other.strict, other.inner)
        return asked and mine.passes == others.passes and mine.directory == others.directory


def read_settings(options: Any) -> Settings:
    """Check the options of a ``torch.compile`` call.

    Raises:
        UserError: an unknown option, or a recipe with mistakes.
    """
    given = {} if options is None else options
    if not isinstance(given, dict):
        raise UserError(f"options must be a dict with {', '.join(KEYS)}, not {given!r}")
    for key in given:
        if key not in KEYS:
            hint = suggestion(str(key), KEYS) or f"; there are {', '.join(KEYS)}"
            raise UserError(f"options: there is no option {key!r}{hint}")
    strict, inner = given.get("strict", False), given.get("inner", "inductor")
    if not isinstance(strict, bool):
        raise UserError(f"options: strict must be True or False, not {strict!r}")
    if inner not in INNERS:
        raise UserError(f"options: inner must be {' or '.join(INNERS)}, not {inner!r}")
    recipe, named = _recipe(given.get("recipe"))
    unused = ("emit", *(("ask",) if recipe.ask is not None else ())) if named else ()
    return Settings(recipe, strict, inner, named, unused)


def _recipe(given: Any) -> tuple[Recipe, bool]:
    """A recipe, and whether it came with sections of its own."""
    if given is None:
        return recipe_from_dict({**_ELSEWHERE, "passes": DEFAULT_PASSES}, file="default"), False
    if isinstance(given, Recipe):
        return given, True
    if isinstance(given, dict):
        whole = "model" in given
        return recipe_from_dict({**_ELSEWHERE, **given}, file="<options>"), whole
    if isinstance(given, str | os.PathLike):
        return load_recipe(Path(given)), True
    raise UserError(
        f"options: recipe must be a path, a dict or a Recipe, not a {type(given).__name__}"
    )
