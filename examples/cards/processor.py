"""Tokenizer, image processor and chat template of the card model in plain Hugging Face form.

The vocabulary is closed: a token a word, words told apart by spaces, "?" and "." tokens of their
own. Upper and lower case differ, because "A" is a card and "a" an article. A conversation reads

    <s> <image> question answer </s> question answer </s> question

with nothing between question and answer: a question ends in "?" or ".".
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from examples.cards.render import PATCH, SIDE
from examples.cards.vocabulary import BOS, EOS, IMAGE, PAD, SPECIAL, TOKEN, UNK

LONGEST = 1024  # tokens, the language model's positions

CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('this model knows the roles user and assistant only') -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- ' ' + message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- ' ' + part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- ' </s>' -}}{%- endif -%}
{%- endfor -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The words of vocabulary.py under their token ids; adds no special token by itself."""
    core = Tokenizer(WordLevel(TOKEN, unk_token=SPECIAL[UNK]))
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation("isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        extra_special_tokens={"image_token": SPECIAL[IMAGE]},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
    )


def make_processor() -> LlavaProcessor:
    """Tokenizer and CLIP image processor (the Pillow one, which needs no torchvision)."""
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size=side,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=SPECIAL[IMAGE],
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(folder: Path) -> None:
    """Write the processor's files beside a model's."""
    make_processor().save_pretrained(folder)
