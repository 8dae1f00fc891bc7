"""Tracing: what comes out of a model, that it computes the same, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlavaConfig, MistralConfig
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from sparsevila_compile import hf
from sparsevila_compile.engine import Engine
from sparsevila_compile.errors import UserError
from sparsevila_compile.families import FAMILIES, family_of
from sparsevila_compile.graph_json import component_to_json
from sparsevila_compile.ops import ATTENTION
from sparsevila_compile.program import Program
from sparsevila_compile.trace import TAP, trace
from sparsevila_compile.verify import verify
from tests import tiny
from tests.tiny import Image, Video, words


def attentions(program: Program, component: str) -> list[Any]:
    return [n for n in program.component(component).graph.nodes if n.target is ATTENTION]


def engine_of(program: Program) -> Engine:
    return Engine(program, family_of(program.config))


@pytest.mark.parametrize(
    "name,tower",
    [
        ("llava", [f"model.vision_tower.encoder.layers.{i}.self_attn" for i in range(3)]),
        ("llava_siglip", [f"model.vision_tower.encoder.layers.{i}.self_attn" for i in range(3)]),
        ("qwen", [f"model.visual.blocks.{i}.attn" for i in range(4)]),
    ],
)
def test_every_attention_is_canonical_and_knows_its_module(name: str, tower: list[str]) -> None:
    program = tiny.traced(name)
    assert [n.meta["module_path"] for n in attentions(program, "vision")] == tower
    text = [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    language = attentions(program, "language")
    assert [n.meta["module_path"] for n in language] == text
    assert all(n.args[5] is True for n in language), "causal"
    assert not any(n.args[5] for n in attentions(program, "vision"))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_components(name: str) -> None:
    program = tiny.traced(name)
    verify(program)
    assert program.stage == "trace"
    assert program.taps == (TAP,)
    assert program.component("embed").inputs == ("input_ids",)
    assert program.component("language").inputs == ("inputs_embeds", "position_ids", "logit_rows")
    assert program.component("language").outputs == ("logits",)
    assert program.component("vision").outputs == ("visual_tokens", TAP)
    host = FAMILIES[program.family].precomputed
    assert program.component("vision").inputs == ("pixel_values", *host)
    assert program.prune is None
    assert program.retrieval is None
    assert not program.caches


def test_layouts() -> None:
    clip, siglip, qwen = (tiny.traced(n).layout for n in tiny.FAMILIES)
    assert (clip.packed, clip.prefix_tokens, clip.merge_unit, clip.tokens_per_picture) == (
        False,
        1,
        1,
        16,
    )
    assert (siglip.prefix_tokens, siglip.tokens_per_picture) == (0, 16)
    assert (qwen.packed, qwen.prefix_tokens, qwen.merge_unit) == (True, 0, 4)
    assert (qwen.permutation, qwen.full_attention_input) == ("window_index", "cu_seqlens")
    bounds = [n.args[3].target for n in attentions(tiny.traced("qwen"), "vision")]
    windows, full = "cu_window_seqlens", "cu_seqlens"
    assert bounds == [windows, full, windows, full]


def test_windows_of_the_text_model() -> None:
    assert [n.args[6] for n in attentions(tiny.traced("llava_windowed"), "language")] == [9, 9]
    assert [n.args[6] for n in attentions(tiny.traced("qwen_windowed"), "language")] == [0, 9, 0]


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "llava_tied"])
def test_weights_are_the_models_own(name: str) -> None:
    program, model = tiny.traced(name), tiny.model(name)
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert "lm_head.weight" in program.weights
    for key, weight in program.weights.items():
        assert weight.data_ptr() == state[key].data_ptr(), key
    used = set().union(*(c.weight_names() for c in program.components.values()))
    assert used == set(program.weights)
    one_each = {w.data_ptr(): w.numel() * w.element_size() for w in program.weights.values()}
    assert program.weight_bytes() == sum(one_each.values()), "tied weights count once"
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    assert tied == (name == "llava_tied")


# ---------------------------------------------------------------------- it computes the same


@pytest.mark.parametrize("batch,length", [(1, 1), (1, 9), (2, 7), (3, 40)])
@pytest.mark.parametrize("name", [*tiny.FAMILIES, "qwen_windowed", "llava_windowed"])
def test_language_of_any_size(name: str, batch: int, length: int) -> None:
    g = torch.Generator().manual_seed(length)
    embeds = torch.randn(batch, length, 64, generator=g)
    positions = torch.arange(length).expand(batch, -1) + torch.arange(batch)[:, None]
    if tiny.is_qwen(name):
        positions = torch.stack([positions, positions // 2, positions % 5])
    rows = torch.randint(0, length, (batch, 2), generator=g)
    inputs = {"inputs_embeds": embeds, "position_ids": positions, "logit_rows": rows}
    got = engine_of(tiny.traced(name)).run("language", inputs)["logits"]
    model = tiny.model(name)
    causal = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    if "windowed" in name:
        near = causal & torch.ones(length, length, dtype=torch.bool).triu(-8)
        kinds = {"full_attention": causal, "sliding_attention": near}
        mask: Any = kinds if tiny.is_qwen(name) else near
    else:
        mask = causal
    out = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    )
    expected = model.lm_head(out.last_hidden_state)
    expected = expected.gather(1, rows[:, :, None].expand(-1, -1, expected.shape[-1]))
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["llava", "llava_siglip", "llava_two_layers"])
def test_vision_of_any_number(name: str, count: int) -> None:
    pixels = torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(count))
    got = engine_of(tiny.traced(name)).run("vision", {"pixel_values": pixels})["visual_tokens"]
    expected = torch.cat(list(tiny.model(name).model.get_image_features(pixels).pooler_output))
    assert got.shape == expected.shape == (16 * count, 64)
    assert (got - expected).norm() < 1e-5 * expected.norm()


GRIDS: list[list[Image | Video]] = [
    [Image(1, (2, 2))],
    [Image(1, (4, 4))],
    [Image(1, (2, 14)), Image(2, (10, 6)), Image(3, (4, 4))],
    [Video(1, (3, 4, 6))],
    [Video(1, (2, 6, 10)), Video(2, (1, 2, 4))],
]


@pytest.mark.parametrize("pictures", GRIDS, ids=str)
def test_vision_of_any_resolution(pictures: list[Image | Video]) -> None:
    prompt = tiny.inputs("qwen", [pictures])
    kind = "video" if isinstance(pictures[0], Video) else "image"
    pixels = prompt["pixel_values_videos" if kind == "video" else "pixel_values"]
    grid = prompt[f"{kind}_grid_thw"]
    program = tiny.traced("qwen")
    host = hf.host_vision_inputs(program.config, FAMILIES["qwen2_5_vl"].precomputed, grid)
    got = engine_of(program).run("vision", {"pixel_values": pixels, **host})["visual_tokens"]
    expected = tiny.model("qwen").model.visual(pixels, grid_thw=grid).pooler_output
    assert got.shape == expected.shape
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_bfloat16() -> None:
    model = tiny.build("qwen").to(torch.bfloat16)
    program = trace(model)
    assert program.dtype == torch.bfloat16
    pixels = tiny.inputs("qwen", [[Image(1)]])["pixel_values"].to(torch.bfloat16)
    grid = torch.tensor([[1, 4, 6]])
    host = hf.host_vision_inputs(program.config, FAMILIES["qwen2_5_vl"].precomputed, grid)
    got = engine_of(program).run("vision", {"pixel_values": pixels, **host})["visual_tokens"]
    expected = model.model.visual(pixels, grid_thw=grid).pooler_output
    assert got.dtype == torch.bfloat16
    assert (got - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_without_weights(name: str) -> None:
    """Planning traces an empty model: the same graphs, no tensor in memory."""
    empty = trace(hf.empty_model(tiny.CONFIGS[name]()))
    full = tiny.traced(name)
    assert all(w.is_meta for w in empty.weights.values())
    assert set(empty.weights) == set(full.weights)
    for key, component in full.components.items():
        assert component_to_json(empty.component(key)) == component_to_json(component)


def test_the_model_is_as_before() -> None:
    model = tiny.build("llava")
    prompt = tiny.inputs("llava", [[Image(1), *words(5)]])
    before = model.generate(**prompt, **tiny.greedy(8))
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    trace(model)
    assert names == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert hf.TRACE_ATTENTION not in names
    assert torch.equal(model.generate(**prompt, **tiny.greedy(8)), before)


# ---------------------------------------------------------------------- what is refused


def _config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = tiny.CONFIGS["llava"]().to_dict()
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[part][name] = value
        else:
            config[key] = value
    return config


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "blip-2"}, "'blip-2' is not supported.*llava, qwen2_5_vl"),
    "no family": ({"model_type": None}, "'None' is not supported"),
    "encoder": (
        {"vision_config__model_type": "dinov2"},
        "vision encoder 'dinov2'.*clip_vision_model",
    ),
    "soft caps": ({"text_config__final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "chunked attention": (
        {"text_config__layer_types": ["chunked_attention", "full_attention"]},
        "chunked_attention layers, which are unchecked",
    ),
    "dynamic positions": (
        {"text_config__rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic': its frequencies change",
    ),
    "long positions, one kind of layer": (
        {"text_config__rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
        "rope_type 'longrope'",
    ),
    "linear attention": (
        {"text_config__layer_types": ["linear_attention", "full_attention"]},
        "linear_attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_configurations(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        family_of(_config(**changes))
    assert "\n" not in str(caught.value)


def test_training_mode_is_refused() -> None:
    model = tiny.build("llava", "meta").train()
    with pytest.raises(UserError, match="training mode"):
        trace(model)


def test_unsupported_models_are_refused_by_trace() -> None:
    config = LlavaConfig(
        vision_config=tiny.CONFIGS["llava"]().vision_config,
        text_config=Gemma2Config(
            vocab_size=120, hidden_size=64, intermediate_size=64, num_hidden_layers=1
        ),
        image_token_index=tiny.IMAGE,
    )
    with pytest.raises(UserError, match="softcap"):
        trace(hf.empty_model(config))


@pytest.mark.parametrize("name,strategy", [("llava", "full"), ("llava_siglip", "default")])
def test_feature_selection_that_cannot_be_placed(name: str, strategy: str) -> None:
    config = tiny.CONFIGS[name]()
    config.vision_feature_select_strategy = strategy
    with pytest.raises(UserError, match="vision_feature_select_strategy"):
        trace(hf.empty_model(config))


def _sdpa(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    h = hidden_states[:, None]
    return torch.nn.functional.scaled_dot_product_attention(h, h, h)[:, 0], None


def _masked(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    h = hidden_states[:, None]
    return attend(self, h, h, h, torch.zeros(1), scaling=1.0)[0][:, :, 0], None


@pytest.mark.parametrize(
    "module,forward,message",
    [
        (CLIPAttention, _sdpa, "calls attention directly"),
        (LlamaAttention, _sdpa, "calls attention directly"),
        (LlamaAttention, _masked, "attention mask of its own"),
    ],
)
def test_attention_that_goes_around_the_interface(
    module: Any, forward: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "forward", forward)
    model = tiny.build("llava")
    with pytest.raises(UserError, match=message):
        trace(model)
    names = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert hf.TRACE_ATTENTION not in names


def test_missing_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava", "meta")
    projector = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    model.model.other = projector
    with pytest.raises(UserError, match="no projector where transformers keeps it"):
        trace(model)


def test_windows_everywhere_need_no_position_trick() -> None:
    """A Mistral text model without a window is traced as plain causal attention."""
    config = tiny.CONFIGS["llava"]()
    config.text_config = MistralConfig(**tiny._text_sizes(), head_dim=16, sliding_window=None)
    program = trace(hf.empty_model(config))
    assert [n.args[6] for n in attentions(program, "language")] == [0, 0]
