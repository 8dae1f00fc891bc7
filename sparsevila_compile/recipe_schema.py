"""The recipe format as JSON Schema (for editors) and as Markdown tables (for the documentation).

Both are made from the pydantic models that check recipes, so they say what the loader does.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from sparsevila_compile.pass_base import PASSES, Pass
from sparsevila_compile.program import STAGES
from sparsevila_compile.recipe import Registry
from sparsevila_compile.recipe_sections import (
    AskSection,
    Dialogue,
    EmitSection,
    ModelSection,
    RecipeSections,
    Turn,
)


def _ordered(registry: Registry) -> list[type[Pass[Any]]]:
    return sorted(registry.values(), key=lambda p: (STAGES.index(p.stage), p.name))


def _needs_options(kind: type[Pass[Any]]) -> bool:
    return any(f.is_required() for f in kind.config_type.model_fields.values())


def recipe_schema(registry: Registry | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, with the options of every pass."""
    import sparsevila_compile.passes  # noqa: F401  (registers them)

    passes = _ordered(PASSES if registry is None else registry)
    models: list[type[BaseModel]] = [RecipeSections, *(p.config_type for p in passes)]
    refs, merged = models_json_schema(
        [(m, "validation") for m in models], ref_template="#/$defs/{model}"
    )
    definitions: dict[str, Any] = merged["$defs"]
    top = definitions.pop(refs[(RecipeSections, "validation")]["$ref"].rpartition("/")[2])
    options: dict[str, Any] = {}
    for kind in passes:
        ref = refs[(kind.config_type, "validation")]
        given = ref if _needs_options(kind) else {"anyOf": [ref, {"type": "null"}]}
        options[kind.name] = {"description": f"{kind.summary} (stage {kind.stage})", **given}
    bare = [p.name for p in passes if not _needs_options(p)]
    item = {
        "anyOf": [
            {"enum": bare},
            {
                "type": "object",
                "properties": options,
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    top["properties"]["passes"] = {
        "description": "The passes, in order.",
        "type": "array",
        "minItems": 1,
        "items": item,
    }
    top["required"] = [*top["required"], "passes"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "title": "sparsevila-compile recipe",
        "description": "Which model to compile, by which passes, and where the result goes.",
        "$defs": definitions,
    }


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "mapping"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(s) for s in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object":
        return "mapping"
    low = [f"> {schema['exclusiveMinimum']:g}"] if "exclusiveMinimum" in schema else []
    low += [f"≥ {schema['minimum']:g}"] if "minimum" in schema else []
    high = [f"≤ {schema['maximum']:g}"] if "maximum" in schema else []
    high += [f"< {schema['exclusiveMaximum']:g}"] if "exclusiveMaximum" in schema else []
    return " ".join([kind, ", ".join(low + high)]).strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return f"`{json.dumps(plain)}`"


def _table(model: type[BaseModel], prefix: str = "") -> list[str]:
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    rows = []
    nested: list[str] = []
    for name, field in model.model_fields.items():
        shape = schema["properties"][name]
        said = (field.description or "").replace("|", "\\|")
        kind = _type(shape).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {kind} | {_default(field)} | {said} |")
        refs = [shape, *shape.get("anyOf", ())]
        for ref in (r["$ref"].rpartition("/")[2] for r in refs if "$ref" in r):
            if definitions[ref].get("type") == "object":
                inner = _model_of(field, ref)
                nested += _table(inner, f"{prefix}{name}.")[2:] if inner else []
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows, *nested]


def _model_of(field: FieldInfo, name: str) -> type[BaseModel] | None:
    from sparsevila_compile.recipe_problems import flat_types

    for kind in flat_types(field.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__name__ == name:
            return kind
    return None


def recipe_tables(registry: Registry | None = None) -> str:
    """Markdown tables of every key, as docs/recipe.md holds them."""
    import sparsevila_compile.passes  # noqa: F401  (registers them)

    parts: list[str] = []
    sections = (
        ("`model`", ModelSection),
        ("`emit`", EmitSection),
        ("`ask`", AskSection),
        ("An entry of `ask.pictures`, or a line of `ask.file`", Dialogue),
        ("An entry of `turns`", Turn),
    )
    for title, model in sections:
        parts += [f"### {title}", "", (model.__doc__ or "").strip(), "", *_table(model), ""]
    for kind in _ordered(PASSES if registry is None else registry):
        parts += [f"### pass `{kind.name}`", "", f"Stage {kind.stage}: {kind.summary}.", ""]
        parts += [*_table(kind.config_type), ""]
    return "\n".join(parts)
