"""Chat sessions: add pictures, ask, ask again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from PIL import Image

from sparsevila_compile.errors import UserError

if TYPE_CHECKING:
    from sparsevila_compile.model import CompiledModel


def open_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A picture from a path (or one that is open already), as RGB.

    Raises:
        UserError: no such file, or no picture in it.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    path = Path(picture)
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large a picture: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a picture that can be read: {error}") from error


class Session:
    """One dialogue about a growing set of pictures.

    ``[system | visual]`` stays in the KV cache; every question retrieves anew. History is kept
    unless ``evict_history`` is set, as benchmarks with independent questions want it (SparseVILA,
    Alg. 4): then each question sees the pictures and itself alone.
    """

    def __init__(
        self, model: CompiledModel, system: str | None = None, evict_history: bool = False
    ) -> None:
        self._model = model
        self._system = system
        self._evict = evict_history
        self.forget()

    def forget(self) -> None:
        """Start over: no pictures, no history."""
        self._messages: list[dict[str, Any]] = []
        if self._system is not None:
            text = [{"type": "text", "text": self._system}]
            self._messages.append({"role": "system", "content": text})
        self._pictures: list[Image.Image] = []
        self._pending = 0
        self._conversation = self._model.conversation(1)

    def evict(self) -> None:
        """Forget questions and answers, keep system prompt and pictures."""
        head = self._messages[:1] if self._system is not None else []
        self._messages = head
        self._pending = len(self._pictures)

    def add_image(self, picture: str | Path | Image.Image) -> None:
        """Add a picture; it goes in front of the next question."""
        self._pictures.append(open_picture(picture))
        self._pending += 1

    @property
    def usage(self) -> Any:
        """What the last question cost (:class:`~sparsevila_compile.conversation.Usage`)."""
        return self._conversation.usage

    def ask(self, text: str, **arguments: Any) -> str:
        """Ask a question; returns the answer.

        Args:
            text: the question.
            arguments: as for :meth:`CompiledModel.generate` (``max_new_tokens``, ``streamer``, …).

        Raises:
            UserError: the processor has no chat template, or the prompt does not fit.
        """
        if self._evict:
            self.evict()
        content: list[dict[str, Any]] = [{"type": "image"} for _ in range(self._pending)]
        question = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        inputs = self._prompt([*self._messages, question])
        sequence = self._model.generate(conversation=self._conversation, **inputs, **arguments)
        new = sequence[0, inputs["input_ids"].shape[1] :]
        answer = str(self._model.tokenizer.decode(new, skip_special_tokens=True)).strip()
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self._messages += [question, reply]
        self._pending = 0
        return answer

    def _prompt(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        processor = self._model.processor
        try:
            text = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (ValueError, AttributeError, TemplateError) as error:
            if getattr(processor, "chat_template", None) is None:
                raise UserError(
                    "this checkpoint's processor has no chat template; call generate() with prompts of your own"
                ) from error
            raise UserError(f"the chat template refused the dialogue: {error}") from error
        arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if self._pictures:
            arguments["images"] = self._pictures
        return dict(processor(**arguments))
