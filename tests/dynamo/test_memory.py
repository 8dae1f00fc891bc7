"""Weights that were replaced are gone, and what is left of the model cannot pass for whole."""

from __future__ import annotations

import gc

import pytest
import torch

from sparsevila_compile import dynamo
from sparsevila_compile.errors import UserError
from tests import tiny
from tests.dynamo import models
from tests.tiny import Image, words

QUANTIZED: tuple[tiny.Spec, ...] = (
    ("prune_visual_tokens", {"keep_ratio": 0.5}),
    "insert_kv_cache",
    ("sparsify_decode_attention", {"keep_ratio": 0.25, "when": "always"}),
    ("quantize_linear", {"method": "rtn", "group_size": 32}),
)
ROWS: list[tiny.Row] = [[*words(3), Image(1), *words(8, 1)]]


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors that are in memory."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    held = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and not found.is_meta:
            storage = found.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _weights(model: torch.nn.Module) -> int:
    """Bytes of the linears that quantization replaces."""
    layers = model.model.language_model.layers
    linears = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.weight.numel() * m.weight.element_size() for m in linears)


def test_quantized_weights_leave_the_device(device: torch.device) -> None:
    model = models.compiled("llava", QUANTIZED)
    expected = tiny.compiled("llava", *QUANTIZED)
    prompt = tiny.inputs("llava", ROWS)
    answers = tiny.answers_of(prompt, expected.generate(**prompt, **tiny.greedy(models.NEW)))
    assert answers != tiny.dense_rows("llava", ROWS, models.NEW)
    replaced = _weights(model)
    model.to(device)
    before = live_bytes(device)
    got = models.ask(model, {k: v.to(device) for k, v in prompt.items()})
    if device.type == "cpu":
        assert got == answers
    after = live_bytes(device)
    report = dynamo.report(model)
    assert replaced > 250_000, "too small to measure"
    assert report.freed_bytes >= replaced
    left = sum(p.untyped_storage().nbytes() for p in model.model.language_model.layers.parameters())
    assert left < replaced / 20, "parameters still hold the values"
    quantized = next(p for p in report.passes if p.name == "quantize_linear")
    smaller = quantized.bytes_before - quantized.bytes_after
    assert smaller > 0.7 * replaced
    # Caches of the finished call and constants of the graphs may stay: far less than the weights.
    assert before - after > 0.9 * smaller, f"{before} bytes before, {after} after"
    # What is left cannot pass for the model.
    assert model.model.language_model.layers[0].mlp.up_proj.weight.isnan().all()
    with pytest.raises(UserError, match="cannot be saved"):
        model.state_dict()
