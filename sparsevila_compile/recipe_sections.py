"""The keys of a recipe: what pydantic checks, section by section."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sparsevila_compile.yaml_position import Problem


def _path_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path may")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError("starts with ~, but there is no such user")
    return text


def _device_text(text: str) -> str:
    if text in ("auto", "cpu", "cuda"):
        return text
    kind, _, number = text.partition(":")
    if kind == "cuda" and number.isascii() and number.isdigit() and len(number) < 4:
        return text
    raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")


def _number_as_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


PathText = Annotated[str, AfterValidator(_path_text)]
DeviceText = Annotated[str, AfterValidator(_device_text)]
AnswerText = Annotated[
    str, BeforeValidator(_number_as_text, json_schema_input_type=str | int | float)
]


class Section(BaseModel):
    """Base of a recipe's sections; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The checkpoint to compile."""

    path: PathText = Field(description="Checkpoint directory, or a hub id such as org/name.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights; auto keeps the checkpoint's."
    )
    device: DeviceText = Field(
        default="auto",
        description="auto, cpu, cuda or cuda:N; what it is compiled for. auto takes CUDA if there.",
        json_schema_extra={"pattern": r"^(auto|cpu|cuda(:[0-9]{1,3})?)$"},
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub id; null takes the default."
    )
    trust_remote_code: bool = Field(
        default=False, description="Let transformers run Python code that the checkpoint brings."
    )


class EmitSection(Section):
    """What is written."""

    format: Literal["module", "onnx"] = Field(
        default="module",
        description="module: a directory for this package's own engine; onnx: a bundle that "
        "ONNX Runtime runs. sparsevila_compile.load takes both.",
    )
    path: PathText = Field(description="Directory to make.")
    overwrite: bool = Field(default=False, description="Replace an artifact that is there.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of the bundle's tensors (onnx); auto keeps the compiled program's.",
    )
    pure: bool = Field(
        default=False, description="Use ops of the standard domain ai.onnx only (onnx)."
    )
    int8_activations: bool = Field(
        default=False,
        description="Let 4-bit linears round their inputs to int8 (onnx): several times faster on a "
        "CPU, a little less exact.",
    )


class Turn(Section):
    """One question of a dialogue."""

    question: str = Field(min_length=1, description="The question.")
    answer: AnswerText | None = Field(
        default=None, description="The right answer, shown beside the models' answers."
    )


class Dialogue(Section):
    """Questions about one picture, asked one after the other in one chat session."""

    image: PathText = Field(description="The picture.")
    turns: tuple[Turn, ...] = Field(min_length=1, description="The questions, in order.")


class AskSection(Section):
    """What to ask the compiled and the dense model after compiling."""

    max_new_tokens: int = Field(
        default=64, ge=1, le=100_000, description="Length of an answer at most, in tokens."
    )
    dense: bool = Field(
        default=True, description="Ask the model as it was before compiling, too, to compare."
    )
    pictures: tuple[Dialogue, ...] = Field(default=(), description="Pictures with their questions.")
    file: PathText | None = Field(
        default=None,
        description="JSON Lines file, one such picture a line; other keys of a line are ignored.",
    )


class RecipeSections(Section):
    """A recipe without its passes, which are checked one by one."""

    version: Literal[1] = Field(description="Version of the recipe format.")
    model: ModelSection
    emit: EmitSection
    ask: AskSection | None = None


def check_ask(ask: AskSection) -> list[Problem]:
    """What pydantic cannot say of an ``ask`` section."""
    if ask.file is None and not ask.pictures:
        return [Problem(("ask",), "says nothing to ask; give pictures or file")]
    if ask.file is not None and ask.pictures:
        return [Problem(("ask", "file"), "and pictures are both given; give one of them")]
    return []


def check_emit(emit: EmitSection) -> list[Problem]:
    """What pydantic cannot say of an ``emit`` section."""
    if emit.format == "onnx":
        if emit.pure and emit.int8_activations:
            why = "has no op in ai.onnx, which pure: true asks for; give one of the two"
            return [Problem(("emit", "int8_activations"), why)]
        return []
    return [
        Problem(("emit", key), "is an option of format: onnx; remove it, or set that format")
        for key in ("dtype", "pure", "int8_activations")
        if getattr(emit, key) != EmitSection.model_fields[key].default
    ]
