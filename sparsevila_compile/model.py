"""The object that users hold: a compiled model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsevila_compile import artifact, hf
from sparsevila_compile.conversation import Conversation, Usage
from sparsevila_compile.engine import Engine
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import family_of
from sparsevila_compile.manifest import ONNX, kind_of
from sparsevila_compile.program import Program
from sparsevila_compile.prompt import PromptReader
from sparsevila_compile.running import Runner

DEFAULT_NEW_TOKENS = 256


class CompiledModel:
    """A compiled vision-language model.

    Attributes:
        processor: the checkpoint's processor.
        program: the lowered program (without graphs and weights where ONNX Runtime holds them).
        usage: what the last ``generate`` cost.
    """

    def __init__(
        self,
        program: Program,
        processor: Any,
        generation_config: Any = None,
        runner: Runner | None = None,
    ) -> None:
        from transformers import GenerationConfig

        family = family_of(program.config)
        self.program = program
        self.processor = processor
        self.generation_config = generation_config or GenerationConfig()
        self.engine = Engine(program, family, runner)
        self.reader = PromptReader(program, family)
        self.usage = Usage()

    @property
    def device(self) -> torch.device:
        return self.program.device

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def generate(
        self,
        *,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        query_start: list[int] | None = None,
        conversation: Conversation | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Answer prompts; takes what the processor returns and transformers' generation arguments.

        Args:
            generation_config, logits_processor, stopping_criteria, streamer: transformers' objects.
            query_start: see :meth:`Conversation.generate`.
            conversation: reuse and extend this cache (see :meth:`conversation`).
            inputs: processor outputs (``input_ids`` ``[batch, length]``, ``attention_mask``,
                ``pixel_values``, …) and any of ``max_new_tokens``, ``do_sample``, ``temperature``, …

        Returns:
            int64 ``[batch, prompt + new]`` on the model's device, as transformers returns it.

        Raises:
            UserError: unknown arguments, or prompt, pictures and cache do not fit together.
        """
        known = self.reader.known_inputs
        prompt = {k: v for k, v in inputs.items() if k in known}
        arguments = {k: v for k, v in inputs.items() if k not in known}
        if not {"max_new_tokens", "max_length"} & set(arguments) and _no_length(generation_config):
            arguments["max_new_tokens"] = (
                self.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
            )
        tools = hf.GenerationTools(
            self.program.config, self.generation_config, generation_config, arguments
        )
        self._check_streamer(streamer, prompt)
        if conversation is None:
            ids = prompt.get("input_ids")
            rows = len(ids) if isinstance(ids, torch.Tensor) else 1
            conversation = self.conversation(rows)
        result = conversation.generate(
            prompt,
            tools,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            tokenizer=self.tokenizer,
            query_start=query_start,
        )
        self.usage = conversation.usage
        return result

    @staticmethod
    def _check_streamer(streamer: Any, prompt: dict[str, Any]) -> None:
        ids = prompt.get("input_ids")
        if streamer is not None and isinstance(ids, torch.Tensor) and len(ids) > 1:
            raise UserError("generate: a streamer takes one prompt, not a batch")

    def conversation(self, batch: int = 1) -> Conversation:
        """A cache that later prompts extend: pass it to :meth:`generate` with each whole prompt."""
        return Conversation(self.engine, self.reader, batch, self.program.max_length)

    def chat(self, system: str | None = None, evict_history: bool = False) -> Any:
        """A dialogue about pictures: see :class:`~sparsevila_compile.session.Session`."""
        from sparsevila_compile.session import Session

        return Session(self, system=system, evict_history=evict_history)


def _no_length(config: Any) -> bool:
    """Whether a GenerationConfig (or None) leaves the answer's length open."""
    if config is None:
        return True
    default = type(config)().max_length
    return config.max_new_tokens is None and config.max_length in (None, default)


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    provider: str | None = None,
) -> CompiledModel:
    """Load an artifact, or an ONNX bundle, which ONNX Runtime runs.

    Args:
        path: the directory.
        device: of an artifact: a device of the kind that it was compiled for; that kind's first by
            default. Of a bundle: means the provider of that device.
        provider: of a bundle: ``cpu``, ``cuda`` or ``cuda:N``; by default that of the device that
            it was compiled on.

    Raises:
        UserError: the directory is missing or damaged, compiled for another kind of device, or
            its provider is not here.
    """
    from transformers import GenerationConfig

    folder = Path(path)
    try:
        where = torch.device(device) if device else None
    except RuntimeError as error:
        raise UserError(
            f"device {device!r} is not one that torch knows; take cpu or cuda"
        ) from error
    program, runner = _load_program(folder, where, provider)
    processor = hf.load_processor(str(folder / "processor"))
    defaults = None
    if (folder / "generation_config.json").is_file():
        defaults = GenerationConfig.from_pretrained(str(folder))
    return CompiledModel(program, processor, defaults, runner)


def _load_program(
    folder: Path, device: torch.device | None, provider: str | None
) -> tuple[Program, Runner | None]:
    """The program, and the runner where torch does not run it."""
    if kind_of(folder) is not ONNX:
        if provider is not None:
            raise UserError(
                f"{folder}: is no ONNX bundle, so it takes a device, not the provider {provider!r}"
            )
        return artifact.load_program(folder, device), None
    from sparsevila_compile.onnx.bundle import load_bundle
    from sparsevila_compile.onnx.runner import OnnxRunner, provider_device

    if provider is None and device is not None:
        provider = str(device)
    where = provider_device(provider) if provider else None
    if where is not None and device is not None and device.type != where.type:
        raise UserError(f"{folder}: provider {provider} does not run on device {device}")
    program, manifest = load_bundle(folder)
    if where is None:
        where = provider_device(str(manifest["device"]))
    program.device = where
    return program, OnnxRunner(folder, manifest, where)
