"""The model: a LLaVA of 12M parameters in plain Hugging Face form, and its forward parts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from examples.cards.render import PATCH, PATCHES, SIDE
from examples.cards.vocabulary import BOS, EOS, IMAGE, PAD, WORDS

HEAD_DIM = 64
#: sizes of the released checkpoint; a smaller set trains in seconds for tests
SIZES = {
    "tower_width": 256,
    "tower_layers": 8,
    "text_width": 256,
    "text_layers": 8,
    "text_heads": 4,
    "text_mlp": 640,
}
TINY_SIZES = {
    "tower_width": 64,
    "tower_layers": 3,
    "text_width": 64,
    "text_layers": 2,
    "text_heads": 2,
    "text_mlp": 128,
}
FEATURE_LAYER = -2  # as LLaVA does; the last layer serves the class token alone


def build(sizes: dict[str, int]) -> LlavaForConditionalGeneration:
    """A freshly initialised float32 model; `sizes` as in :data:`SIZES`."""
    tower = CLIPVisionConfig(
        hidden_size=sizes["tower_width"],
        intermediate_size=4 * sizes["tower_width"],
        num_hidden_layers=sizes["tower_layers"],
        num_attention_heads=sizes["tower_width"] // HEAD_DIM,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=sizes["tower_width"],
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=sizes["text_width"],
        intermediate_size=sizes["text_mlp"],
        num_hidden_layers=sizes["text_layers"],
        num_attention_heads=sizes["text_heads"],
        num_key_value_heads=max(1, sizes["text_heads"] // 2),
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, PAD
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = BOS, EOS, PAD
    return model.float()


def normalised(pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pictures as the processor gives them to the tower: mean 0.5, deviation 0.5."""
    return pictures.float().div_(127.5).sub_(1).to(dtype)


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features [n, PATCHES, tower width] and the pooled class token [n, tower width]."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return out.hidden_states[FEATURE_LAYER][:, 1:], out.pooler_output


def project(model: LlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """Visual tokens [n, PATCHES, text width]."""
    return model.model.multi_modal_projector(features)


def text_logits(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    text: Tensor,
    kept: Tensor | None = None,
    compact: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits at the text positions of [<s>, visual tokens, text].

    visual: [n, PATCHES, width]; text: int64 [n, t]; kept: int64 [n, k] ascending indices of the
    visual tokens that stay (None: all), at their original positions or, with `compact`, at
    consecutive ones. Padding follows the text, so causality alone hides it. Returns [n, t, vocab].
    """
    decoder = model.model.language_model
    n, t = text.shape
    positions = mask = None
    if kept is not None:
        visual = visual.gather(1, kept[:, :, None].expand(-1, -1, visual.shape[2]))
        length = 1 + kept.shape[1] + t
        if compact:
            positions = torch.arange(length, device=text.device).expand(n, -1)
        else:
            after = 1 + PATCHES + torch.arange(t, device=text.device)
            start = torch.zeros_like(kept[:, :1])
            positions = torch.cat([start, 1 + kept, after.expand(n, -1)], 1)
        # explicit, because without a mask gaps in position_ids would be read as packed sequences
        mask = torch.ones(length, length, dtype=torch.bool, device=text.device).tril()
        mask = mask.expand(n, 1, -1, -1)
    start = decoder.embed_tokens(torch.full_like(text[:, :1], BOS))
    x = torch.cat([start, visual.to(start.dtype), decoder.embed_tokens(text)], 1)
    out = decoder(
        inputs_embeds=x if dtype is None else x.to(dtype),
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state[:, -t:])


def export(model: LlavaForConditionalGeneration, folder: Path, shard: str = "14MB") -> None:
    """Write config and bf16 weights in safetensors shards of at most `shard`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    copy = LlavaForConditionalGeneration._from_config(model.config).to(torch.bfloat16)
    copy.generation_config = model.generation_config
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder, max_shard_size=shard)
    written = sorted(p.name for p in folder.iterdir())
    if not any(name.endswith(".safetensors") for name in written):
        raise RuntimeError(f"{folder}: no weights were written, only {written}")


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """An exported model, in evaluation mode."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.to(device).eval()


def write_json(path: Path, value: object) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
