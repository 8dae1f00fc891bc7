"""Tiny models of every supported kind, prompts for them, and transformers' own answers.

The weights are random but scaled so that attention is selective and greedy answers vary: a model
that repeats one token would let a broken cache pass. Tracing takes seconds, so traced programs and
compiled models are kept for the whole test run; programs are handed out as snapshots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from sparsevila_compile import hf
from sparsevila_compile.manager import _run, run_passes
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.pass_base import PASSES, Context, Pass
from sparsevila_compile.program import Program
from sparsevila_compile.report import PassReport
from sparsevila_compile.trace import trace

hf.quiet()

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 5, 6, 7, 8
FIRST_WORD, WORDS = 10, 120
"""Ids from FIRST_WORD to WORDS - 1 are text; below are the special tokens."""
MERGE = 2
NEW = 64

Spec = str | tuple[str, dict[str, Any]]
"""A pass, with its options where it has any."""

DENSE: tuple[Spec, ...] = ("insert_kv_cache",)
FULL: tuple[Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 1.0}),
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 1.0, "when": "always"}),
)


# ---------------------------------------------------------------------- models


def _text_sizes(layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def _llava_clip(**text: Any) -> Any:
    tower = CLIPVisionConfig(**_VISION, projection_dim=64)
    return LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(**_text_sizes(), head_dim=16, **text),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def _llava_siglip() -> Any:
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=LlamaConfig(**_text_sizes(), head_dim=16),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_select_strategy="full",
    )


def _llava_windowed() -> Any:
    config = _llava_clip()
    config.text_config = MistralConfig(**_text_sizes(), head_dim=16, sliding_window=9)
    return config


def _qwen(**text: Any) -> Any:
    return Qwen2_5_VLConfig(
        text_config={
            **_text_sizes(),
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
            **text,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
            "window_size": 56,
            "patch_size": 14,
            "spatial_merge_size": MERGE,
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _qwen_windowed() -> Any:
    return _qwen(
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )


def _llava_rope(**rope: Any) -> Any:
    config = _llava_clip()
    config.text_config = LlamaConfig(**_text_sizes(), head_dim=16, rope_scaling=rope)
    return config


def _llava_two_layers() -> Any:
    config = _llava_clip()
    config.vision_feature_layer = [-2, -3]
    return config


CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": _llava_clip,
    "llava_two_layers": _llava_two_layers,
    "llava_yarn": lambda: _llava_rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32
    ),
    "llava_tied": lambda: _llava_clip(tie_word_embeddings=True),
    "llava_siglip": _llava_siglip,
    "llava_windowed": _llava_windowed,
    "qwen": _qwen,
    "qwen_windowed": _qwen_windowed,
}
FAMILIES = ("llava", "llava_siglip", "qwen")


def is_qwen(name: str) -> bool:
    return name.startswith("qwen")


def build(name: str, device: str = "cpu") -> Any:
    """A fresh model of that kind, in evaluation mode; weights are the same every time."""
    config = CONFIGS[name]()
    kind = Qwen2_5_VLForConditionalGeneration if is_qwen(name) else LlavaForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(20)
        with torch.device(device):
            model = kind(config)
        model = model.eval().requires_grad_(False)
        if device != "meta":
            _season(model)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = BOS, None, PAD
    return model


def _season(model: torch.nn.Module) -> None:
    """Random biases and norms too (zeros and ones hide errors); attention that picks out tokens."""
    seen = set()
    for name, p in model.named_parameters():
        if p.data_ptr() in seen:
            continue
        seen.add(p.data_ptr())
        if p.ndim == 1:
            p.add_(0.2 * torch.randn_like(p))
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "attn.qkv"))
            p.mul_(14.0 if sharp else 8.0)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head.data_ptr() != table.data_ptr():
        head[:FIRST_WORD] = 0  # never the best: an answer with a placeholder in it has no next turn


@cache
def model(name: str) -> Any:
    """The shared model of that kind: not to be changed."""
    return build(name)


@cache
def _traced(name: str) -> Program:
    return trace(model(name))


def traced(name: str) -> Program:
    """A traced program to do as one likes with; the weights are the shared model's."""
    return _traced(name).snapshot()


# ---------------------------------------------------------------------- compiling


def make_passes(*specs: Spec | Pass[Any]) -> list[Pass[Any]]:
    found: list[Pass[Any]] = []
    for spec in specs:
        if isinstance(spec, Pass):
            found.append(spec)
            continue
        name, options = (spec, {}) if isinstance(spec, str) else spec
        found.append(PASSES[name](PASSES[name].config_type(**options)))
    return found


def run(program: Program, *specs: Spec) -> list[PassReport]:
    return run_passes(program, make_passes(*specs), Context())


def step(program: Program, *specs: Spec | Pass[Any]) -> list[PassReport]:
    """Run these passes and no others: the compiler adds none."""
    return [_run(program, p, i, Context()) for i, p in enumerate(make_passes(*specs))]


def at_stage(name: str, *specs: Spec) -> Program:
    """A traced program after these passes and no others."""
    program = traced(name)
    step(program, *specs)
    return program


_COMPILED: dict[str, CompiledModel] = {}


def compiled(name: str, *specs: Spec) -> CompiledModel:
    """A compiled tiny model, shared by all tests that ask for the same passes.

    It has the processor of the LLaVA models: for the others, of use for its tokenizer alone.
    """
    key = json.dumps([name, specs])
    if key not in _COMPILED:
        program = traced(name)
        run(program, *specs)
        _COMPILED[key] = CompiledModel(program, processor(), model(name).generation_config)
    return _COMPILED[key]


def pruned(ratio: float, **options: Any) -> tuple[Spec, ...]:
    """Passes that prune and decode densely."""
    return (("prune_visual_tokens", {"keep_ratio": ratio, **options}), "insert_kv_cache")


def retrieving(ratio: float, **options: Any) -> tuple[Spec, ...]:
    """Passes that keep every visual token and decode sparsely."""
    return ("insert_kv_cache", ("sparsify_decode_attention", {"keep_ratio": ratio, **options}))


# ---------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Image:
    """A random picture. ``grid`` is (height, width) in patches, for families of any resolution."""

    seed: int = 0
    grid: tuple[int, int] = (4, 6)


@dataclass(frozen=True)
class Video:
    """A random video of ``grid`` (time, height, width) in patches, ``seconds`` a temporal step."""

    seed: int = 0
    grid: tuple[int, int, int] = (2, 4, 4)
    seconds: float = 1.0


Item = int | Image | Video
Row = Sequence[Item]


def words(count: int, seed: int = 0) -> list[Item]:
    """Random text tokens."""
    g = torch.Generator().manual_seed(1000 + seed)
    return list(torch.randint(FIRST_WORD, WORDS, (count,), generator=g).tolist())


@dataclass
class _Batch:
    ids: list[list[int]] = field(default_factory=list)
    pixels: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    grids: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, key: str, pixels: torch.Tensor, grid: tuple[int, ...]) -> None:
        self.pixels.setdefault(key, []).append(pixels)
        self.grids.setdefault(key, []).append(grid)


def _pixels(name: str, item: Image | Video) -> tuple[torch.Tensor, tuple[int, int, int]]:
    g = torch.Generator().manual_seed(item.seed)
    if not is_qwen(name):
        return torch.randn(1, 3, 56, 56, generator=g), (1, 4, 4)
    t, h, w = item.grid if isinstance(item, Video) else (1, *item.grid)
    return torch.randn(t * h * w, 1176, generator=g), (t, h, w)


def inputs(name: str, rows: Iterable[Row], side: str = "left") -> dict[str, torch.Tensor]:
    """What a processor would return for these prompts, padded on that side."""
    batch = _Batch()
    for row in rows:
        ids = [BOS]
        for item in row:
            if isinstance(item, int):
                ids.append(item)
                continue
            pixels, grid = _pixels(name, item)
            token = VIDEO if isinstance(item, Video) else IMAGE
            count = grid[0] * grid[1] * grid[2]
            if is_qwen(name):
                ids += [VISION_START, *[token] * (count // MERGE**2), VISION_END]
            else:
                ids += [token] * count
            batch.add("video" if isinstance(item, Video) else "image", pixels, grid)
            if isinstance(item, Video):
                batch.seconds.append(item.seconds)
        batch.ids.append(ids)
    return _processed(name, batch, side)


def _processed(name: str, batch: _Batch, side: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, batch.ids))
    ids = torch.full((len(batch.ids), longest), PAD)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(batch.ids):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    out = {"input_ids": ids, "attention_mask": mask}
    if is_qwen(name):
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if kind in batch.pixels:
            out[key] = torch.cat(batch.pixels[kind])
            if is_qwen(name):
                out[f"{kind}_grid_thw"] = torch.tensor(batch.grids[kind])
    if batch.seconds:
        out["second_per_grid_ts"] = torch.tensor(batch.seconds)
    return out


def greedy(new_tokens: int = NEW, **more: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for exactly that many greedy tokens."""
    return {"max_new_tokens": new_tokens, "do_sample": False, **more}


def dense(name: str, prompt: dict[str, torch.Tensor], **arguments: Any) -> torch.Tensor:
    """What transformers' own ``generate`` returns."""
    out: torch.Tensor = model(name).generate(**prompt, **(arguments or greedy()))
    return out


def dense_rows(
    name: str, rows: Sequence[Row], new_tokens: int = NEW, **more: Any
) -> list[list[int]]:
    """transformers' answers, every row asked alone and so without padding."""
    answers = []
    for row in rows:
        prompt = inputs(name, [row])
        out = dense(name, prompt, **greedy(new_tokens, **more))
        answers.append(out[0, prompt["input_ids"].shape[1] :].tolist())
    return answers


def continued(row: Row, answer: Iterable[int], *more: Item) -> list[Item]:
    """The next turn's prompt: the last one, its answer, and something new."""
    return [*row, *(int(t) for t in answer), *more]


def answers_of(prompt: dict[str, torch.Tensor], out: torch.Tensor) -> list[list[int]]:
    """What follows the prompts in a result of ``generate``."""
    new: list[list[int]] = out[:, prompt["input_ids"].shape[1] :].tolist()
    return new


@cache
def tokenizer() -> Any:
    """One word an id: ``w17`` is 17; the special tokens have names of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", IMAGE: "<image>", VIDEO: "<video>"}
    special |= {9: "abcdef"}  # transformers' stop strings measure every word behind this one
    special |= {3: "<unk>", VISION_START: "<vision>", VISION_END: "</vision>"}
    vocabulary = {special.get(i, f"w{i}"): i for i in range(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>", "<vision>", "</vision>"],
    )


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w11 w12 "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}w13 "
    "{% else %}{% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endif %}{% endfor %}"
)


@cache
def processor() -> Any:
    """A working processor for the LLaVA models; a turn is ``w11 w12 <image> question w13 answer``."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
