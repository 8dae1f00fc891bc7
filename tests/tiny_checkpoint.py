"""The tiny LLaVA of ``tests/tiny.py`` on disk, with a processor that reads pictures and words."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor

from tests import tiny

SIDE, PATCH = 56, 14
VISUAL_TOKENS = (SIDE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w100 "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}w101 {% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w101{% endif %}"
)


@cache
def processor() -> Any:
    """Words are ``w10`` to ``w119``."""
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tiny.tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def write(folder: Path) -> Path:
    """Save model and processor as a Hugging Face checkpoint."""
    tiny.model("llava").save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def picture(path: Path, seed: int) -> Path:
    """A picture of stripes; every seed gives another one."""
    pixels = bytes((x * (seed + 2) + y * seed * 7 + c * 50) % 256
                   for y in range(SIDE) for x in range(SIDE) for c in range(3))  # fmt: skip
    Image.frombytes("RGB", (SIDE, SIDE), pixels).save(path)
    return path
