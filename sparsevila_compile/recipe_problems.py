"""pydantic's validation errors as problems at key paths, with suggestions for misspelt words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sparsevila_compile.yaml_position import KeyPath, Problem, printable


def suggestion(word: str, known: Iterable[str]) -> str:
    """``, did you mean x?``, or nothing where no known word is close."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def problems_of(
    error: ValidationError,
    prefix: KeyPath,
    model: type[BaseModel],
    extra_keys: tuple[str, ...] = (),
) -> list[Problem]:
    """One problem a wrong value (a union's branches together), in the order pydantic found them.

    Args:
        prefix: key path of the data that was validated.
        model: what it was validated as.
        extra_keys: further keys that the data may have.
    """
    found: dict[KeyPath, list[str]] = {}
    meant: set[KeyPath] = set()
    for detail in error.errors(include_url=False, include_context=True):
        kind = detail["type"]
        path, annotations = _walk(model, detail["loc"], kind)
        if kind == "extra_forbidden":
            known = [*_keys(annotations), *(extra_keys if len(path) == 1 else ())]
            word = str(path[-1])
            hint = suggestion(word, known)
            if hint:
                meant.add((*path[:-1], hint.removeprefix(", did you mean ").removesuffix("?")))
            message = f"unknown key{hint or '; the keys here are ' + ', '.join(known)}"
        elif kind == "missing":
            message = "is required"
        else:
            message = _message(detail, annotations)
        messages = found.setdefault(path, [])
        if message not in messages:
            messages.append(message)
    # A misspelt required key is one mistake, not two.
    return [
        Problem((*prefix, *path), _join(messages))
        for path, messages in found.items()
        if not (messages == ["is required"] and path in meant)
    ]


def _join(messages: list[str]) -> str:
    first, *rest = messages
    return " or ".join([first, *(m.removeprefix("must be ") for m in rest)])


def _message(detail: Any, annotations: list[Any]) -> str:
    if detail["type"] == "value_error":
        return printable(str(detail["ctx"]["error"]))
    text = str(detail["msg"]).replace("Input should be", "must be")
    text = text.replace("must be a valid ", "must be a ").replace("a integer", "an integer")
    value = detail["input"]
    if detail["type"] == "literal_error":
        words = [str(w) for a in annotations if get_origin(a) is Literal for w in get_args(a)]
        hint = suggestion(value, words) if isinstance(value, str) else ""
        return f"must be one of {', '.join(words)}, not {_shown(value)}{hint}"
    return f"{text[0].lower()}{text[1:]}, not {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = printable(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def flat_types(annotation: Any) -> list[Any]:
    """The branches of a union, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return flat_types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [f for a in get_args(annotation) for f in flat_types(a)]
    return [annotation]


def _keys(annotations: list[Any]) -> list[str]:
    models = [a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)]
    return list(dict.fromkeys(k for m in models for k in m.model_fields))


def _walk(
    model: type[BaseModel], loc: tuple[int | str, ...], kind: str
) -> tuple[KeyPath, list[Any]]:
    """The key path of a pydantic location, and what may stand there.

    pydantic puts names of union branches between the keys; they are no keys of the recipe. For an
    unknown key the annotations are those of the mapping that holds it.
    """
    annotations: list[Any] = [model]
    path: list[int | str] = []
    for i, part in enumerate(loc):
        if kind == "extra_forbidden" and i == len(loc) - 1:
            return (*path, part), annotations
        inner = [f for a in annotations for f in _step(a, part)]
        if not inner:
            continue
        path.append(part)
        annotations = inner
    return tuple(path), annotations


def _step(annotation: Any, part: int | str) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return flat_types(field.annotation) if field else []
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple, set, frozenset) and isinstance(part, int) and args:
        chosen = (
            args[part] if origin is tuple and args[-1] is not ... and part < len(args) else args[0]
        )
        return flat_types(chosen)
    if origin is dict and isinstance(part, str):
        return flat_types(args[1])
    return []
