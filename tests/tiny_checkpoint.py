"""A LLaVA with random weights and a working processor, small enough to compile in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "Q", "A", *"abcdefghijklmnopqrstuvwxyz", "?"]
SIDE, PATCH = 28, 7
VISUAL_TOKENS = (SIDE // PATCH) ** 2
VISION_LAYERS, TEXT_LAYERS = 3, 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}A {% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


def model(seed: int = 0) -> Any:
    """The model, float32, with weights large enough that answers are not all alike."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        ),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=VISUAL_TOKENS,
    )
    torch.manual_seed(seed)
    made = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(0, 0.3)
    made.generation_config.eos_token_id = WORDS.index("</s>")
    made.generation_config.pad_token_id = WORDS.index("<pad>")
    return made


def processor() -> Any:
    """Words are single letters."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def write(folder: Path, seed: int = 0) -> Path:
    """Save model and processor as a Hugging Face checkpoint."""
    model(seed).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
