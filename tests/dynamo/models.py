"""Tiny models behind ``model.compile(backend="sparsevila")``, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from tests import tiny

SPARSE: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.5}),
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.25, "when": "always"}),
)
RECIPES: dict[str, tuple[tiny.Spec, ...]] = {
    "dense": tiny.DENSE,
    "full": tiny.FULL,
    "sparse": SPARSE,
}
NEW = 10


def passes(specs: Sequence[tiny.Spec]) -> list[Any]:
    """Specs as a recipe has them."""
    return [s if isinstance(s, str) else {s[0]: s[1]} for s in specs]


def compiled(name: str, specs: Sequence[tiny.Spec], inner: str = "eager", **options: Any) -> Any:
    """A fresh stock model with the one line added."""
    model = tiny.build(name)
    recipe = {"passes": passes(specs)}
    model.compile(backend="sparsevila", options={"recipe": recipe, "inner": inner, **options})
    return model


@cache
def shared(name: str, recipe: str) -> Any:
    """A compiled model that several tests ask; each asks with caches of its own."""
    return compiled(name, RECIPES[recipe])


def ask(
    model: Any, prompt: dict[str, torch.Tensor], new: int = NEW, **more: Any
) -> list[list[int]]:
    """Greedy answers of stock ``generate``."""
    out = model.generate(**prompt, **tiny.greedy(new, **more))
    return tiny.answers_of(prompt, out)


class Dialogue:
    """Turns over one stock cache, and the same turns over an artifact's conversation."""

    def __init__(self, name: str, recipe: str, batch: int = 1) -> None:
        self.name = name
        self.model = shared(name, recipe)
        self.artifact = tiny.compiled(name, *RECIPES[recipe])
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.conversation = self.artifact.conversation(batch)

    def turn(self, rows: Sequence[tiny.Row], fresh: Sequence[tiny.Item] = ()) -> list[list[int]]:
        """Ask whole prompts, of which the pictures in ``fresh`` are new; both must agree."""
        whole = tiny.inputs(self.name, rows)
        expected = self.artifact.generate(
            conversation=self.conversation, **whole, **tiny.greedy(NEW)
        )
        pictured = tiny.inputs(self.name, [list(fresh)])
        given = {k: v for k, v in whole.items() if "pixel" not in k and "grid" not in k}
        given |= {k: v for k, v in pictured.items() if "pixel" in k or "grid" in k}
        answers = ask(self.model, given, past_key_values=self.cache)
        assert answers == tiny.answers_of(whole, expected)
        return answers
