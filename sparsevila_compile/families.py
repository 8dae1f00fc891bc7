"""What a model family needs beyond transformers' own accessors: one declarative entry each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsevila_compile.errors import UserError
from sparsevila_compile.program import VisionLayout


@dataclass(frozen=True)
class Modality:
    """How one kind of picture comes out of the processor and stands in the prompt.

    Attributes:
        name: ``image`` or ``video``; also transformers' name for the encoder's modality.
        token: config attribute with the placeholder's token id.
        pixels: processor output with the pixels.
        grid: processor output with (time, height, width) in patches a picture, or None.
    """

    name: Literal["image", "video"]
    token: str
    pixels: str
    grid: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of vision-language models that shares one Hugging Face architecture.

    Attributes:
        model_type: ``config.model_type``.
        encoders: the ``vision_config.model_type`` values that have been checked.
        projector: attribute of the base model whose output is the visual tokens, or None where
            the encoder returns them as ``pooler_output``.
        precomputed: inputs of a packed encoder that are computed on the host from the grid, in
            the order of the traced signature; empty for one-resolution encoders.
        rope: ``1d`` positions, or ``mrope`` (time, height, width).
        modalities: kinds of pictures, in the order in which the encoder gets them.
    """

    model_type: str
    encoders: tuple[str, ...]
    projector: str | None
    precomputed: tuple[str, ...]
    rope: Literal["1d", "mrope"]
    modalities: tuple[Modality, ...]


IMAGE = Modality("image", "image_token_id", "pixel_values")
FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            model_type="llava",
            encoders=("clip_vision_model", "siglip_vision_model"),
            projector="multi_modal_projector",
            precomputed=(),
            rope="1d",
            modalities=(IMAGE,),
        ),
        Family(
            model_type="qwen2_5_vl",
            encoders=("qwen2_5_vl", "qwen2_5_vl_vision"),
            projector=None,
            precomputed=("position_ids", "cu_seqlens", "window_index", "cu_window_seqlens"),
            rope="mrope",
            modalities=(
                Modality("image", "image_token_id", "pixel_values", "image_grid_thw"),
                Modality("video", "video_token_id", "pixel_values_videos", "video_grid_thw"),
            ),
        ),
    )
}


def family_of(config: dict[str, Any]) -> Family:
    """The entry for a model configuration.

    Raises:
        UserError: the family, its vision encoder or its text decoder is not supported; says why.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise UserError(
            f"model_type {name!r} is not supported: no family entry says where its visual tokens "
            f"come out; supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    encoder = str(config.get("vision_config", {}).get("model_type"))
    if encoder not in family.encoders:
        raise UserError(
            f"{name} with the vision encoder {encoder!r} is not supported: its attention and "
            f"token layout are unchecked; supported are {', '.join(family.encoders)}"
        )
    text = config.get("text_config", {})
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if text.get(key):
            raise UserError(
                f"{name}: text_config.{key} is set; soft-capped attention or logits are not supported"
            )
    for kind in sorted(
        set(text.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    ):
        why = "keep no KV cache to retrieve from" if kind == "linear_attention" else "are unchecked"
        raise UserError(f"{name}: text_config.layer_types has {kind} layers, which {why}")
    for kind in sorted(_rope_types(text) & {"dynamic", "longrope"}):
        raise UserError(
            f"{name}: text_config.rope_parameters has the rope_type {kind!r}: its frequencies change "
            "with the prompt's length, so keys that are cached would no longer be right"
        )
    return family


def _rope_types(text: dict[str, Any]) -> set[str]:
    """Kinds of rotary positions; a text model may have one for each kind of layer."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    parts = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return {str(p.get("rope_type") or p.get("type") or "default") for p in parts}


def patch_values(vision: dict[str, Any]) -> int:
    """Numbers that describe one patch to a packed encoder."""
    channels = int(vision.get("in_channels") or vision.get("in_chans") or 3)
    return channels * int(vision["temporal_patch_size"]) * int(vision["patch_size"]) ** 2


def layout_of(family: Family, config: dict[str, Any]) -> VisionLayout:
    """Where the visual tokens of this configuration stand in its encoder's sequence."""
    vision = config["vision_config"]
    if family.precomputed:
        return VisionLayout(
            packed=True,
            prefix_tokens=0,
            merge_unit=int(vision["spatial_merge_size"]) ** 2,
            tokens_per_picture=None,
            permutation="window_index" if "window_index" in family.precomputed else None,
            full_attention_input="cu_seqlens",
        )
    cls = 1 if vision["model_type"] == "clip_vision_model" else 0
    patches = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy == "default" and not cls:
        raise UserError(
            f"{family.model_type}: vision_feature_select_strategy is 'default', which drops the "
            f"first patch of a {vision['model_type']} encoder without CLS token; set it to 'full'"
        )
    if strategy == "full" and cls:
        raise UserError(
            f"{family.model_type}: vision_feature_select_strategy 'full' with a CLS token makes "
            "CLS a visual token, which pruning cannot place; set it to 'default'"
        )
    return VisionLayout(packed=False, prefix_tokens=cls, merge_unit=1, tokens_per_picture=patches)
