"""Everything this package takes from transformers that is not plain public API, in one place.

Loading goes through transformers' own loaders with safetensors only, so checkpoint renames,
sharding and tied weights are its business; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsevila_compile.errors import UserError
from sparsevila_compile.families import Family
from sparsevila_compile.ops import ATTENTION

TRACE_ATTENTION = "sparsevila_flash"  # the word "flash" makes packed encoders hand over cu_seqlens


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


def _explain(error: BaseException) -> str:
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
        raise UserError(
            f"{path}: cannot read the model configuration: {_explain(error)}"
        ) from error


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

    _where(path)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype or "auto",
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot load the weights: {_explain(error)}") from error
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


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model's structure without weights (on the meta device): enough to trace and to plan."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    if dtype is not None:
        model = model.to(dtype)
    return model.eval().requires_grad_(False)


def load_processor(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The checkpoint's processor (pictures and text).

    Raises:
        UserError: there is none, or it needs a package that is not installed.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except ImportError as error:
        raise UserError(
            f"{path}: its processor needs a package that is not installed: {_explain(error)}"
        ) from error
    except Exception as error:
        raise UserError(f"{path}: cannot load the processor: {_explain(error)}") from error


def _trace_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    if attention_mask is not None:
        raise UserError(
            f"{name} builds an attention mask of its own; only causal, windowed, packed and full attention are supported"
        )
    for feature in ("softcap", "s_aux", "position_bias", "block_mask"):
        if extra.get(feature) is not None:
            raise UserError(f"{name} uses attention with {feature}, which is not supported")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if scaling is None:
        scaling = float(query.shape[-1]) ** -0.5
    out = ATTENTION(
        query, key, value, cu_seq_lens_q, float(scaling), is_causal, int(sliding_window or 0)
    )
    return out, None


@contextlib.contextmanager
def traceable_attention(model: Any) -> Iterator[None]:
    """Within this context every attention of the model is one ``sparsevila::attention`` call."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(TRACE_ATTENTION, _trace_attention)
    AttentionMaskInterface.register(TRACE_ATTENTION, lambda *args, **kwargs: None)
    # The public setter refuses unknown flash names and does not reach every sub-config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [(c, getattr(c, "_attn_implementation_internal", None)) for c in configs.values()]
    try:
        for config, _ in saved:
            config._attn_implementation_internal = TRACE_ATTENTION
        yield
    finally:
        for config, name in saved:
            config._attn_implementation_internal = name


def base_model(model: Any) -> Any:
    """The model below the language-model head."""
    return model.model


def part(model: Any, family: Family, name: str) -> torch.nn.Module:
    """A named part of the model.

    Raises:
        UserError: the accessor is missing in this transformers version or model.
    """
    base = base_model(model)
    found: Any
    if name == "text model":
        found = getattr(base, "language_model", None)
    elif name == "encoder":
        found = base.get_encoder("image")
    elif name == "projector":
        found = getattr(base, family.projector or "", None)
    elif name == "embedding":
        found = model.get_input_embeddings()
    else:
        found = model.get_output_embeddings()
    if found is None or found is base:
        raise UserError(
            f"{family.model_type}: the model has no {name} where transformers keeps it; this version is not supported"
        )
    return found  # type: ignore[no-any-return]


def host_vision_inputs(
    config: dict[str, Any], names: tuple[str, ...], grid: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Data-dependent inputs of a packed encoder, from the grid (pictures × [time, height, width]).

    ``names`` are those of the family entry; all results are on the CPU.
    """
    from transformers import vision_utils

    vision = config["vision_config"]
    merge = int(vision["spatial_merge_size"])
    out: dict[str, torch.Tensor] = {}
    if "position_ids" in names:
        out["position_ids"] = vision_utils.get_vision_position_ids(grid, merge)
    if "cu_seqlens" in names:
        out["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)
    if "window_index" in names:
        index, bounds = vision_utils.get_vision_window_index(
            grid, merge, int(vision["window_size"]), int(vision["patch_size"])
        )
        out["window_index"], out["cu_window_seqlens"] = index, bounds
    return {name: out[name] for name in names}


class RopeIndex:
    """transformers' own three-axis position ids (mRoPE), without the model's weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText

        kept = dict(config)
        with torch.device("meta"):
            # One layer of each kind: the positions depend on the configuration alone.
            kept["text_config"] = {**config["text_config"], "num_hidden_layers": 1}
            kept["text_config"].pop("layer_types", None)
            kept["vision_config"] = {**config["vision_config"], "depth": 1}
            model_type = kept.pop("model_type")
            model = AutoModelForImageTextToText.from_config(
                AutoConfig.for_model(model_type, **kept)
            )
        self._base = base_model(model)

    def __call__(
        self,
        input_ids: torch.Tensor,
        token_types: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        second_per_grid_ts: torch.Tensor | None,
    ) -> torch.Tensor:
        """Positions ``[3, batch, length]`` of a prompt without padding.

        Args:
            input_ids: ``[batch, length]``.
            token_types: ``[batch, length]``: 0 text, 1 image, 2 video.
            image_grid_thw: ``[images, 3]`` in patches.
            video_grid_thw: ``[videos, 3]`` in patches.
            second_per_grid_ts: ``[videos]``, seconds a temporal step.
        """
        positions, _ = self._base.get_rope_index(
            input_ids,
            mm_token_type_ids=token_types,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
        )
        return positions  # type: ignore[no-any-return]


class GenerationTools:
    """transformers' own generation settings, logits processors and stopping criteria for a request.

    Raises:
        UserError: unknown arguments, or a strategy that the engine does not have.
    """

    def __init__(
        self, config: dict[str, Any], defaults: Any, given: Any, arguments: dict[str, Any]
    ) -> None:
        from transformers import AutoConfig, GenerationMixin

        kept = dict(config)
        shell = type("_Shell", (GenerationMixin,), {})()
        shell.config = AutoConfig.for_model(kept.pop("model_type"), **kept)
        shell.generation_config = defaults
        self._shell = shell
        try:
            self.config, unknown = shell._prepare_generation_config(given, **arguments)
        except (ValueError, TypeError) as error:
            raise UserError(f"generate: {_explain(error)}") from error
        if unknown:
            raise UserError(f"generate: unknown arguments {', '.join(sorted(unknown))}")
        for name, allowed in (
            ("num_beams", 1),
            ("num_return_sequences", 1),
            ("return_dict_in_generate", False),
            ("output_scores", False),
            ("output_logits", False),
            ("prompt_lookup_num_tokens", None),
            ("penalty_alpha", None),
            ("guidance_scale", None),
        ):
            value = getattr(self.config, name, allowed)
            if value not in (None, allowed):
                raise UserError(
                    f"generate: {name}={value!r} is not supported; the engine decodes one sequence a prompt, greedily or by sampling"
                )

    def special_tokens(self, device: torch.device, batch: int) -> None:
        self._shell._prepare_special_tokens(self.config, True, device=device, batch_size=batch)

    @property
    def pad_token_id(self) -> int:
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def processors(self, input_ids: torch.Tensor, extra: Any) -> Any:
        """Logits processors for a batch of prompts ``[batch, length]``."""
        return self._shell._get_logits_processor(
            self.config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            logits_processor=extra or [],
            device=input_ids.device,
            model_kwargs={},
        )

    def criteria(self, extra: Any, tokenizer: Any) -> Any:
        """Stopping criteria (end-of-sequence, length, time, stop strings, and the caller's)."""
        try:
            return self._shell._get_stopping_criteria(self.config, extra or [], tokenizer=tokenizer)
        except ValueError as error:
            raise UserError(f"generate: {_explain(error)}") from error
