"""ONNX bundles on ONNX Runtime: sparse against dense, dense against transformers' own export.

``python -m benchmarks.onnx --model random --out FILE`` measures one decode step over a long cache
and one prompt, all sides in turn in one process, so that a machine whose speed drifts drifts for
all. Before a side is timed its logits are compared with the dense bundle's. Needs ``onnxscript``
for transformers' exporter; without it those sides are left out, and the result says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from benchmarks.onnx_agreement import CARDS, relative
from benchmarks.onnx_sides import (
    Bundle,
    Load,
    Stock,
    decode_bytes,
    open_bundle,
    timed,
    write_bundle,
    write_stock,
)
from benchmarks.timing import commit
from sparsevila_compile import hf

LOADS = {
    "cards": Load(visual=512, text=64, prompt=288, prune=0.25, retrieve=0.25),
    "random": Load(visual=4608, text=64, prompt=576, prune=0.5, retrieve=0.1),
}
MOST_ERROR = 1e-3
"""Relative error of logits beyond which a side is not timed."""


def random_model(dtype: torch.dtype) -> Any:
    """A LLaVA of 0.5B parameters, as many key and value heads as heads, weights drawn at random."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **vision, num_attention_heads=4, image_size=336, patch_size=14
        ),
        text_config=LlamaConfig(**text, **heads, vocab_size=32064, max_position_embeddings=65536),
        image_token_index=32000,
        image_seq_length=576,
    )
    torch.manual_seed(1)
    return LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)


def card_model(dtype: torch.dtype) -> Any:
    """The trained card model."""
    return hf.load_model(str(CARDS / "checkpoint"), dtype=dtype, device=torch.device("cpu"))


def sample_inputs(model: Any) -> dict[str, Any]:
    """A prompt with one picture, for transformers' exporter to trace with."""
    config = model.config
    size = config.vision_config.image_size
    patches = config.image_seq_length
    ids = torch.tensor([[1, *[config.image_token_index] * patches, 20, 21, 22]])
    pixels = torch.randn(1, 3, size, size, dtype=model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def random_caches(model: Any, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Keys and values ``[1, heads, tokens, dim]`` by the names of the bundle's inputs."""
    text = model.config.text_config
    g = torch.Generator().manual_seed(2)
    shape = (1, text.num_key_value_heads, tokens, text.head_dim)
    return {
        f"{kind}_cache_{i}": torch.randn(shape, generator=g).to(device, model.dtype)
        for i in range(text.num_hidden_layers)
        for kind in "kv"
    }


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    p20, p80 = (round(ordered[round(q * last)], 4) for q in (0.2, 0.8))
    return {"median": round(statistics.median(values), 4), "p20": p20, "p80": p80}


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of every side, one call a round, the first to go another one each round."""
    names = list(calls)
    times: dict[str, list[float]] = {n: [] for n in names}
    for call in calls.values():
        call()
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(timed(calls[name], device))
    ratios = {
        f"{n} / dense": summary([t / d for t, d in zip(times[n], times["dense"], strict=True)])
        for n in names
        if n != "dense"
    }
    return {"ms": {n: summary(t) for n, t in times.items()}, "ratio": ratios, "rounds": rounds}


def measure(name: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides of one model."""
    device = torch.device(a.provider)
    dtype = getattr(torch, a.dtype)
    load = LOADS[name]
    model = {"cards": card_model, "random": random_model}[name](dtype)
    parameters = sum(p.numel() for p in model.parameters())
    held = load.visual + load.text
    left: dict[str, str] = {}
    stock: dict[str, Path] = {}
    for title, fusions in (("stock", None), ("stock, fused", a.provider)):
        try:
            at = folder / f"{name} {title}"
            stock[title] = (
                at if at.exists() else write_stock(model, sample_inputs(model), at, fusions)
            )
        except ImportError as error:
            left[title] = " ".join(str(error).split())
    dense_at = write_bundle(model, None, folder / f"{name} dense")
    sparse_at = write_bundle(model, load, folder / f"{name} sparse")
    sizes = {
        "dense": decode_bytes(model, held),
        "sparse": decode_bytes(model, load.text + load.attended()),
    }
    caches = random_caches(model, held, device)
    width = model.config.text_config.hidden_size
    del model
    gc.collect()
    error_limit = MOST_ERROR * (1 if dtype == torch.float32 else 30)
    decoding = decode_step(dense_at, sparse_at, stock, load, caches, device, error_limit, a.rounds)
    gc.collect()
    few = {n: c[:, :, : load.prompt].contiguous() for n, c in caches.items()}
    del caches
    gc.collect()
    g = torch.Generator().manual_seed(3)
    embeds = (torch.randn(1, load.prompt, width, generator=g) * 0.02).to(device, dtype)
    prompt = prompts(dense_at, sparse_at, stock, load, few, embeds, error_limit, a.prompt_rounds)
    return {
        "parameters": parameters,
        "load": asdict(load),
        "cached tokens": {"dense": held, "sparse": load.text + load.kept()},
        "attended tokens": {"dense": held, "sparse": load.text + load.attended()},
        "prompt tokens": {"dense": load.prompt, "sparse": sum(load.pruned_prompt())},
        "bytes a decode step reads": sizes,
        "bytes, sparse / dense": round(sizes["sparse"] / sizes["dense"], 4),
        "decode step": decoding,
        "prompt": prompt,
        "left out": left,
    }


def decode_step(
    dense_at: Path,
    sparse_at: Path,
    stock: dict[str, Path],
    load: Load,
    caches: dict[str, torch.Tensor],
    device: torch.device,
    error_limit: float,
    rounds: int,
) -> dict[str, Any]:
    """One token behind a long cache, all sides."""
    held, head = load.visual + load.text, load.text // 2
    token = torch.tensor([[11]], device=device)
    sides: dict[str, Any] = {"dense": Bundle(open_bundle(dense_at, device, ("language",)), caches)}
    for title, at in stock.items():
        sides[title] = Stock(at, device, caches, ("decode",))
    sparse = open_bundle(sparse_at, device, ("decode",))
    found = {n: s.decode(token, held) for n, s in sides.items()}
    everything = Bundle(sparse, caches, torch.arange(held), held)
    found["sparse, reading all"] = everything.decode(token, held)
    del everything
    errors = checked(found, error_limit)
    # After pruning: the first of the visual tokens stay, and of those the first are retrieved.
    stay = torch.cat([torch.arange(head + load.kept()), torch.arange(head + load.visual, held)])
    pruned = {n: c[:, :, stay.to(device)] for n, c in caches.items()}
    index = torch.arange(head + load.attended())
    sides["sparse"] = Bundle(sparse, pruned, index, head + load.kept())
    calls = {n: lambda s=s: s.decode(token, held) for n, s in sides.items()}
    return {"relative error of logits": errors, **in_turn(calls, rounds, device)}


def prompts(
    dense_at: Path,
    sparse_at: Path,
    stock: dict[str, Path],
    load: Load,
    caches: dict[str, torch.Tensor],
    embeds: torch.Tensor,
    error_limit: float,
    rounds: int,
) -> dict[str, Any]:
    """A prompt's embeddings, all sides; the sparse one's is pruned, and it scores."""
    device = embeds.device
    sides: dict[str, Any] = {"dense": Bundle(open_bundle(dense_at, device, ("language",)), caches)}
    for title, at in stock.items():
        sides[title] = Stock(at, device, caches, ("language_model", "lm_head"))
    found = {n: s.prefill(embeds, 0) for n, s in sides.items()}
    runner = open_bundle(sparse_at, device, ("turn",))
    sparse = Bundle(runner, caches, torch.arange(1), 1)
    found["sparse, nothing pruned"] = sparse.prefill(embeds, load.pruned_prompt()[1])
    errors = checked(found, error_limit)
    text, visual = load.pruned_prompt()
    fewer = embeds[:, : text + visual].contiguous()
    calls: dict[str, Callable[[], Any]] = {
        n: lambda s=s: s.prefill(embeds, 0) for n, s in sides.items()
    }
    calls["sparse"] = lambda: sparse.prefill(fewer, visual)
    return {"relative error of logits": errors, **in_turn(calls, rounds, device)}


def checked(found: dict[str, torch.Tensor], error_limit: float) -> dict[str, float]:
    """Relative error of each side's logits against the dense bundle's.

    Raises:
        SystemExit: one differs: what computes something else is not timed.
    """
    reference = found["dense"].float()
    errors = {n: relative(x.float(), reference) for n, x in found.items() if n != "dense"}
    wrong = {n: e for n, e in errors.items() if not e < error_limit}
    if wrong:
        raise SystemExit(f"not timed, logits differ from the dense bundle's: {wrong}")
    return errors


def environment(a: argparse.Namespace) -> dict[str, Any]:
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "provider": a.provider,
        "dtype": a.dtype,
        "threads": torch.get_num_threads(),
        "processor": cpu[0].partition(": ")[2] if cpu else platform.processor(),
        "gpu": torch.cuda.get_device_name() if a.provider == "cuda" else None,
        "load average at the start": os.getloadavg()[0],
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", choices=[*LOADS, "all"], default="all")
    p.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    p.add_argument("--threads", type=int, default=1, help="on the CPU")
    p.add_argument("--rounds", type=int, default=15, help="decode steps of every side")
    p.add_argument("--prompt-rounds", type=int, default=5, help="prompts of every side")
    p.add_argument("--work", type=Path, help="keep what is exported here; stock exports are reused")
    p.add_argument("--out", type=Path, help="JSON file to write")
    a = p.parse_args(arguments)
    torch.set_num_threads(a.threads)
    hf.quiet()
    report: dict[str, Any] = {"environment": environment(a)}
    for name in LOADS if a.model == "all" else [a.model]:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            report[name] = measure(name, a, a.work or Path(folder))
        print(name, json.dumps(report[name], indent=1), flush=True)
    if a.out:
        a.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
