"""What a user has today: transformers' own ``generate`` in bf16, timed by hooks.

Weights are random, attention is SDPA; nothing is compiled, quantised or captured.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.headline_types import Measured, ModelShape, Setting

IMAGE = 5  # the placeholder's token id; text stays above it
SIDE = "transformers generate, bf16"


def build(shape: ModelShape, device: torch.device) -> Any:
    """The model of a shape with random bf16 weights, straight on the device."""
    import transformers

    language, vision = shape.language, shape.vision
    text: dict[str, Any] = {
        "vocab_size": language.vocab,
        "hidden_size": language.hidden,
        "intermediate_size": language.inter,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_dim,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
    }
    config: Any
    model_type: Any
    if vision.kind == "qwen2_5_vl":
        text["rope_parameters"] |= {"mrope_section": list(language.mrope_section or ())}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config={
                "depth": vision.layers,
                "hidden_size": vision.hidden,
                "intermediate_size": vision.inter,
                "num_heads": vision.heads,
                "out_hidden_size": vision.out,
                "fullatt_block_indexes": list(vision.full_attention),
                "window_size": vision.window * 14,
                "patch_size": 14,
                "spatial_merge_size": vision.merge,
            },
            image_token_id=IMAGE,
            vision_start_token_id=3,
            vision_end_token_id=4,
        )
        model_type = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        config = transformers.LlavaConfig(
            text_config={**text, "model_type": "llama"},
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": vision.hidden,
                "intermediate_size": vision.inter,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
                "image_size": 336,
                "patch_size": 14,
            },
            image_token_index=IMAGE,
        )
        model_type = transformers.LlavaForConditionalGeneration
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_type._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def prompt(shape: ModelShape, setting: Setting, device: torch.device) -> dict[str, Tensor]:
    """What a processor hands over for the setting, on the device; random pixels and text.

    Two pictures need a token between them here: one more than the setting has for each after the
    first.
    """
    batch, vision = setting.batch, shape.vision
    low, high = 10, min(30_000, shape.language.vocab)  # placeholders and markers lie above
    text = torch.randint(low, high, (setting.text_tokens,)).tolist()
    ids = text[:16]
    for height, width in setting.pictures:
        ids += [*[IMAGE] * (height * width // setting.merge**2), 3]
    ids = ids[:-1] + text[16:]
    given = {"input_ids": torch.tensor([ids] * batch)}
    pictures = len(setting.pictures) * batch
    if vision.kind == "qwen2_5_vl":
        given["image_grid_thw"] = torch.tensor([[1, h, w] for h, w in setting.pictures] * batch)
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).long()
        size: tuple[int, ...] = (setting.patches * batch, vision.patch_dim)
    else:
        size = (pictures, 3, 336, 336)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    on = {name: t.to(device) for name, t in given.items()}
    return on | {"pixel_values": torch.randn(*size, device=device, dtype=torch.bfloat16)}


class _Clock:
    """Host times, synchronised, of each token and around the vision tower."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[float] = []
        self.seen = 0.0
        self.begun = 0.0
        inner = model.model
        tower = inner.visual if hasattr(inner, "visual") else inner.vision_tower
        self.hooks = [
            tower.register_forward_pre_hook(self._before),
            tower.register_forward_hook(self._after),
        ]

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _before(self, *_: Any) -> None:
        self.begun = self.now()

    def _after(self, *_: Any) -> None:
        self.seen += self.now() - self.begun

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """As a stopping criterion: notes the time and never stops."""
        self.tokens.append(self.now())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def run(
    shape: ModelShape,
    setting: Setting,
    *,
    new_tokens: int,
    repeats: int,
    model: Any = None,
    warm: bool = True,
) -> Measured:
    """Baseline (a). ``model``: from :func:`build`, to measure several settings with one;
    ``warm``: run once before (a model that has run other settings needs it less)."""
    from transformers import StoppingCriteriaList

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    notes = [
        "geometry (positions, window order) is computed by generate, inside the time",
        "one more prompt token between two pictures",
    ]
    model = model if model is not None else build(shape, device)
    given = prompt(shape, setting, device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    visions, firsts, each, totals = [], [], [], []
    for attempt in range(repeats + warm):
        clock = _Clock(model)
        start = clock.now()
        try:
            out = model.generate(
                **given,
                max_new_tokens=2 if warm and attempt == 0 else new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        finally:
            clock.remove()
        if warm and attempt == 0:
            continue
        assert out.shape[1] == given["input_ids"].shape[1] + new_tokens, "generate stopped early"
        assert len(clock.tokens) == new_tokens, "not every token was timed"
        assert clock.seen > 0, "the vision tower was not timed"
        visions.append(clock.seen)
        firsts.append(clock.tokens[0] - start)
        totals.append(clock.tokens[-1] - start)
        each += [1e3 * (b - a) for a, b in zip(clock.tokens, clock.tokens[1:], strict=False)]
        del out
    if not warm:
        notes.append("no warm-up with this setting")
    each.sort()
    last = len(each) - 1
    vision_s, ttft_s, total = median(visions), median(firsts), median(totals)
    return Measured(
        side=SIDE,
        shape=shape.name,
        setting=setting.name,
        batch=setting.batch,
        visual_tokens=setting.visual_tokens,
        new_tokens=new_tokens,
        vision_s=vision_s,
        llm_prefill_s=ttft_s - vision_s,
        ttft_s=ttft_s,
        decode_ms=median(each),
        decode_ms_p20=each[round(0.2 * last)],
        decode_ms_p80=each[round(0.8 * last)],
        tokens_per_s=setting.batch * (new_tokens - 1) / (total - ttft_s),
        end_to_end_s=total,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        idle_host_ms=None,
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        cache_bytes=setting.batch * shape.language.cache_bytes(setting.prompt_tokens + new_tokens),
        repeats=repeats,
        shares={
            "vision": vision_s / total,
            "llm prefill": (ttft_s - vision_s) / total,
            "decode": (total - ttft_s) / total,
        },
        chosen={"attention": "transformers' sdpa"},
        notes=notes,
    )
