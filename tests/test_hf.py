"""The adapter to transformers: what it refuses, and processors without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsevila_compile import hf
from sparsevila_compile.errors import UserError
from tests import tiny

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>"]
WORDS = ["<pad>", "<unk>", "user", "assistant", "hi", *SPECIAL]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def _qwen_processor_files(folder: Path) -> None:
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _ask(processor: Any) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": "hi"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    picture = Image.new("RGB", (56, 84), (200, 30, 30))
    return dict(processor(text=[text], images=[picture], return_tensors="pt"))


def test_video_processor_without_torchvision(tmp_path: Path) -> None:
    """A processor whose video part cannot be loaded serves images, and survives saving."""
    _qwen_processor_files(tmp_path)
    processor = hf.load_processor(str(tmp_path))
    made = _ask(processor)
    assert made["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert (made["input_ids"] == WORDS.index("<|image_pad|>")).sum() == 6
    assert made["pixel_values"].shape == (24, 3 * 2 * 14 * 14)
    saved = tmp_path / "saved"
    processor.save_pretrained(str(saved))
    again = _ask(hf.load_processor(str(saved)))
    assert all(torch.equal(made[k], again[k]) for k in ("input_ids", "pixel_values"))


def _load(path: str) -> Any:
    hf.load_config(path)
    return hf.load_model(path, dtype=None, device=torch.device("cpu"))


@pytest.mark.parametrize("damage", ["missing", "empty", "no json", "weights cut", "weights no"])
def test_checkpoint_errors_name_the_path(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "checkpoint"
    if damage != "missing":
        folder.mkdir()
    if damage == "no json":
        (folder / "config.json").write_text("{")
    if damage.startswith("weights"):
        tiny.model("llava").save_pretrained(folder)
        file = folder / "model.safetensors"
        if damage == "weights no":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as caught:
        _load(str(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model(tmp_path: Path) -> None:
    """A checkpoint that lacks a weight is refused, not filled in at random."""
    from safetensors.torch import load_file, save_file

    tiny.model("llava").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    gone = next(n for n in held if "q_proj" in n)
    save_file({n: t for n, t in held.items() if n != gone}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="q_proj"):
        _load(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    """Only safetensors: a pickle, which could run code, is not even opened."""
    tiny.model("llava").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny.model("llava").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        _load(str(tmp_path))
