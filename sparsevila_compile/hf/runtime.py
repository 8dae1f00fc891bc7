"""What running needs of transformers: host-side inputs, positions, generation settings."""

from __future__ import annotations

from typing import Any

import torch

from sparsevila_compile.errors import UserError

from .checkpoints import explain
from .tracing import base_model


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
            raise UserError(f"generate: {explain(error)}") from error
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
            ("num_beam_groups", 1),
            ("dola_layers", None),
            ("assistant_early_exit", None),
            ("token_healing", False),
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
        try:
            return self._shell._get_logits_processor(
                self.config,
                input_ids_seq_length=input_ids.shape[1],
                encoder_input_ids=input_ids,
                logits_processor=extra or [],
                device=input_ids.device,
                model_kwargs={},
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"generate: {explain(error)}") from error

    def criteria(self, extra: Any, tokenizer: Any) -> Any:
        """Stopping criteria (end-of-sequence, length, time, stop strings, and the caller's)."""
        try:
            return self._shell._get_stopping_criteria(self.config, extra or [], tokenizer=tokenizer)
        except ValueError as error:
            raise UserError(f"generate: {explain(error)}") from error
        except TypeError as error:
            raise UserError(
                f"generate: stop_strings, eos_token_id or max_time is of a wrong type: {explain(error)}"
            ) from error

    @staticmethod
    def plain_stop(criteria: Any, device: torch.device) -> tuple[torch.Tensor | None, int | None]:
        """End tokens (int64) and length limit, where ``criteria`` are nothing but those; else None."""
        from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

        ends = torch.empty(0, dtype=torch.int64, device=device)
        limits: list[int] = []
        for one in criteria:
            if type(one) is MaxLengthCriteria:
                limits.append(int(one.max_length))
            elif type(one) is EosTokenCriteria:
                ends = torch.cat([ends, one.eos_token_id.to(ends).reshape(-1)])
            else:
                return None, None
        return ends, min(limits, default=None)
