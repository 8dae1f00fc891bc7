"""Loading configurations, weights and processors.

Everything goes through transformers' own loaders with safetensors only, so checkpoint renames,
sharding and tied weights are its business; nothing is unpickled.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.hf.quantized import (
    awq_format,
    local_files,
    make_room,
    make_room_by_rule,
    quantizer_config,
    read_headers,
)


def quiet() -> None:
    """Keep transformers' advisory log lines off the user's terminal; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def _where(path: str) -> str:
    if not Path(path).is_dir():
        looks_local = path.startswith((".", "/", "~")) or (
            os.sep in path.rstrip(os.sep) and path.count("/") != 1
        )
        if looks_local or Path(path).exists():
            raise UserError(
                f"{path}: no such checkpoint directory; give a directory with config.json or a hub id"
            )
    elif not (Path(path) / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json in this directory; a Hugging Face checkpoint has one"
        )
    return path


def explain(error: BaseException) -> str:
    """A third party's error on one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's configuration.

    Raises:
        UserError: there is no such checkpoint, or its config.json is damaged.
    """
    from transformers import AutoConfig

    _where(path)
    try:
        return AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise UserError(f"{path}: cannot read the model configuration: {explain(error)}") from error


def load_model(
    path: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model with its weights (``dtype`` None keeps the checkpoint's).

    Raises:
        UserError: weights are missing, damaged, or do not belong to the configuration.
    """
    from transformers import AutoModelForImageTextToText

    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    form = awq_format(config, f"{path}: config.json")
    if form is not None:
        config.quantization_config = quantizer_config(form)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (torch.cuda.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot load the weights: {explain(error)}") from error
    model, info = loaded
    for key, what in (("missing_keys", "has no"), ("mismatched_keys", "has another shape for")):
        names = sorted(str(n) for n in info.get(key) or ())
        if names:
            raise UserError(
                f"{path}: the checkpoint {what} {names[0]}"
                + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")
                + "; it does not belong to this config.json"
            )
    return model.to(device).eval().requires_grad_(False)


def empty_model(config: Any, dtype: torch.dtype | None = None, path: str = "") -> Any:
    """The model's structure without weights (on the meta device): enough to trace and to plan.

    Args:
        path: the checkpoint. Which linears it has quantized, the headers of its files say; where
            these are not on this machine, the rule by which AWQ tools choose.

    Raises:
        UserError: the checkpoint is quantized in a way that is not read, or is not whole.
    """
    from transformers import AutoModelForImageTextToText

    form = awq_format(config, f"{path}: config.json")
    if form is not None:
        config = copy.deepcopy(config)
        for part in (config, config.get_text_config()):
            part.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    if dtype is not None:
        model = model.to(dtype)
    if form is not None:
        files = local_files(path)
        if files:
            make_room(model, form, read_headers(files))
        else:
            make_room_by_rule(model, form)
    return model.eval().requires_grad_(False)


def load_processor(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The checkpoint's processor (pictures and text).

    Video processors need torchvision, which has no CPU build: without it, a processor of that kind
    comes back for images only.

    Raises:
        UserError: there is none, or it needs a package that is not installed.
    """
    from transformers import AutoProcessor

    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoProcessor.from_pretrained(path, **where)
    except ImportError as error:
        if "VideoProcessor" in str(error) and "orchvision" in str(error):
            return _images_only(path, where)
        raise UserError(
            f"{path}: its processor needs a package that is not installed: {explain(error)}"
        ) from error
    except Exception as error:
        if _saved_for_images(path):
            return _images_only(path, where)
        raise UserError(f"{path}: cannot load the processor: {explain(error)}") from error


IMAGES_ONLY = "images_only.json"
"""Marks a processor that was saved without its video part."""


def _saved_for_images(path: str) -> bool:
    return (Path(path) / IMAGES_ONLY).is_file()


def _images_only(path: str, where: dict[str, Any]) -> Any:
    """A processor without its video part, built from its image processor and tokenizer."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        images = AutoImageProcessor.from_pretrained(path, **where)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        saved = ProcessorMixin.get_processor_dict(path, **where)[0]
        pictures = ImageProcessingMixin.get_image_processor_dict(path, **where)[0]
        name = str(saved.get("processor_class") or pictures.get("processor_class"))
    except Exception as error:
        raise UserError(f"{path}: cannot load the processor: {explain(error)}") from error
    base = getattr(transformers, name, None)
    if not isinstance(base, type) or not issubclass(base, ProcessorMixin):
        raise UserError(
            f"{path}: its processor {name} takes videos and needs torchvision; install it"
        )

    class ImagesOnly(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [a for a in super().get_attributes() if a != "video_processor"]

        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
            saved = super().save_pretrained(save_directory, **kwargs)
            (Path(save_directory) / IMAGES_ONLY).write_text("{}\n")
            return saved

    ImagesOnly.__name__ = name
    return ImagesOnly(images, tokenizer, None, chat_template=tokenizer.chat_template)
