"""This package's side of the headline benchmark: a compiled model of a given shape, timed.

The weights are random (int4 codes of random matrices), so tokens mean nothing; what is timed is the
whole path that users run: prompt layout, vision, pruning, prefill, retrieval, captured decode.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.headline_types import Measured, ModelShape, Setting
from benchmarks.stock.transformers_generate import build, prompt
from sparsevila_compile import hf
from sparsevila_compile.decoding import Decoder
from sparsevila_compile.manager import run_passes
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.pass_base import PASSES, Context
from sparsevila_compile.trace import trace

Spec = tuple[str, dict[str, Any]]

INT4: Spec = ("quantize_linear", {"method": "rtn", "group_size": 128, "ignore": ()})
PADDED: Spec = ("pad_linears", {"optional": True})
FUSED: list[Spec] = [
    ("conv_to_linear", {"optional": True}),
    PADDED,
    ("merge_linears", {}),
    ("fuse_rms_norm", {}),
    ("fuse_rotary", {}),
    ("fuse_silu_mul", {}),
    ("trim_last_layer", {}),
]
FP8_PREFILL: Spec = ("fp8_prefill", {})
RECIPES: dict[str, list[Spec]] = {
    "dense": [("insert_kv_cache", {"max_length": 131072}), INT4, *FUSED],
    "sparse": [
        ("prune_visual_tokens", {"keep_ratio": 0.25}),
        ("insert_kv_cache", {"max_length": 131072}),
        ("sparsify_decode_attention", {"keep_ratio": 0.1}),
        INT4,
        *FUSED,
    ],
}


def with_vision(recipe: list[Spec], scheme: str) -> list[Spec]:
    """The recipe with the vision component's linears in 8 bits; with fp8, the prompt's products too."""
    extra = [FP8_PREFILL] if scheme == "fp8" else []
    at = recipe.index(INT4)
    options = {"scheme": scheme, "component": "vision", "method": "rtn", "ignore": ()}
    return [*recipe[:at], ("quantize_linear", options), *recipe[at:], *extra]


@dataclass
class Side:
    """A compiled model and what compiling it took."""

    name: str
    model: CompiledModel
    compile_s: float
    compile_peak_bytes: int
    checkpoint_bytes: int


def compile_side(name: str, shape: ModelShape, recipe: list[Spec], device: str = "cuda") -> Side:
    """Trace and rewrite a random model of a shape; the model itself is freed."""
    torch.manual_seed(0)
    model = build(shape, torch.device(device))
    checkpoint = sum(p.numel() * p.element_size() for p in model.parameters())
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    program = trace(model)
    defaults = model.generation_config
    del model
    passes = [PASSES[n](PASSES[n].config_type(**o)) for n, o in recipe]
    traced = torch.cuda.max_memory_allocated() if on_gpu else 0
    reports = run_passes(program, passes, Context())  # which measures each pass's peak
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = max(traced, *(r.peak_memory_bytes for r in reports))
    compiled = CompiledModel(program, None, defaults)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return Side(name, compiled, seconds, peak, checkpoint)


def _generate(model: CompiledModel, inputs: dict[str, Any], new: int) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)


@contextmanager
def _timed(owner: Any, name: str, into: list[float]) -> Iterator[None]:
    """Collect the synchronised seconds of every call of a method."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = real(*args, **kwargs)
        torch.cuda.synchronize()
        into.append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def _events(into: list[tuple[Any, Any]]) -> Iterator[None]:
    """Record an event before and after every decode step; nothing is waited for."""
    real = Decoder.step

    def step(self: Decoder, greedy: bool) -> torch.Tensor:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        out = real(self, greedy)
        after.record()
        into.append((before, after))
        return out

    Decoder.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Decoder.step = real  # type: ignore[method-assign]


def _clock(call: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _parts(side: Side, inputs: dict[str, Any], repeats: int) -> tuple[dict[str, float], float]:
    """Medians of synchronised seconds: of the parts of a first token, and of the whole."""
    engine = side.model.engine
    parts: dict[str, list[float]] = {"vision": [], "prefill": [], "retrieve": []}
    whole = []
    with (
        _timed(engine, "encode", parts["vision"]),
        _timed(engine, "prefill", parts["prefill"]),
        _timed(engine, "retrieve", parts["retrieve"]),
    ):
        for _ in range(repeats):
            whole.append(_clock(lambda: _generate(side.model, inputs, 1)))
    return {k: statistics.median(v) for k, v in parts.items()}, statistics.median(whole)


def _load_kernels(side: Side, shape: ModelShape, setting: Setting) -> None:
    """A short request of the same batch: compiles, loads and warms up what the long one runs."""
    short = replace(setting, pictures=setting.pictures[:4])
    _generate(side.model, prompt(shape, short, torch.device("cuda")), 2)


def run(
    side: Side, shape: ModelShape, setting: Setting, *, new_tokens: int = 128, repeats: int = 3
) -> Measured:
    """Time one setting; every run is a new conversation (its cache and graph are made in it).

    Batches are measured in one run, with a wait between the parts of the first token.
    """
    model = side.model
    inputs = prompt(shape, setting, torch.device("cuda"))
    one_run = setting.batch > 1
    if one_run:
        _load_kernels(side, shape, setting)
    else:
        _generate(model, inputs, 4)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    if not one_run:
        ttft = statistics.median(
            _clock(lambda: _generate(model, inputs, 1)) for _ in range(repeats)
        )
        whole = statistics.median(
            _clock(lambda: _generate(model, inputs, new_tokens)) for _ in range(repeats)
        )
    steps: list[tuple[Any, Any]] = []
    conversation = model.conversation(setting.batch)
    with _events(steps):
        model.generate(
            conversation=conversation,
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    assert conversation.cache is not None
    assert all(t.isfinite().all() for t in conversation.cache.tensors.values()), "not finite"
    cache_bytes = conversation.cache.nbytes()
    steps = steps[2:]  # the first captures the graph
    gaps = sorted(a[0].elapsed_time(b[0]) for a, b in itertools.pairwise(steps))
    busy = statistics.median(before.elapsed_time(after) for before, after in steps)
    decode = statistics.median(gaps)
    usage = model.usage
    del conversation
    parts, waiting = _parts(side, inputs, 1 if one_run else repeats)
    if one_run:
        ttft, whole = waiting, waiting + 1e-3 * decode * (new_tokens - 1)
    vision, prefill, retrieve = parts.values()
    given = sum(t.numel() * t.element_size() for t in inputs.values() if torch.is_tensor(t))
    return Measured(
        side=side.name,
        shape=shape.name,
        setting=setting.name,
        batch=setting.batch,
        visual_tokens=setting.visual_tokens,
        new_tokens=new_tokens,
        vision_s=vision,
        llm_prefill_s=prefill + retrieve,
        ttft_s=ttft,
        decode_ms=decode,
        decode_ms_p20=gaps[len(gaps) // 5],
        decode_ms_p80=gaps[4 * len(gaps) // 5],
        tokens_per_s=1e3 * setting.batch / decode,
        end_to_end_s=whole,
        peak_memory_bytes=peak,
        idle_host_ms=decode - busy,
        weight_bytes=model.program.weight_bytes(),
        cache_bytes=cache_bytes,
        repeats=1 if one_run else repeats,
        shares={
            "vision": vision / whole,
            "prefill": prefill / whole,
            "retrieval": retrieve / whole,
            "layout": (ttft - vision - prefill - retrieve) / whole,
            "decode": (whole - ttft) / whole,
        },
        chosen={f"{n}": str(c) for n, c in _bound(model).items()},
        notes=[
            f"resident before the run {resident} bytes, of which {given} are the inputs",
            f"visual tokens cached {usage.cached_visual}, attended {usage.attended_visual}",
            f"decode: {usage.dense_because or 'as the recipe says'}",
            f"compiled in {side.compile_s:.1f} s, peak {side.compile_peak_bytes} bytes of a "
            f"{side.checkpoint_bytes} byte checkpoint",
            *(["one run; end to end is the first token and the median step"] if one_run else []),
        ],
    )


def _bound(model: CompiledModel) -> dict[str, int]:
    """How many nodes run which implementation."""
    counts: dict[str, int] = {}
    for component in model.program.components.values():
        for node in component.graph.nodes:
            if "impl" in node.kwargs:
                key = f"{component.name} {node.target._opname} {node.kwargs['impl']}"
                counts[key] = counts.get(key, 0) + 1
    return counts


hf.quiet()
