"""ONNX bundles on ONNX Runtime: sparse against dense, dense against transformers' own export.

``python -m benchmarks.onnx --model random --out FILE`` measures one decode step over a long cache
and one prompt, all sides in turn in one process, so that a machine whose speed drifts drifts for
all. Before a side is timed its logits are compared with those of transformers itself, in torch on the
same device. A side that fails or differs is left out, the result says why, and the exit code is 1.
``--provider cuda`` also says which nodes ran where and what crossed the bus. Needs ``onnxscript`` for
transformers' exporter.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from benchmarks.onnx_agreement import CARDS
from benchmarks.onnx_run import Run
from benchmarks.onnx_sides import Load, TorchModel, decode_bytes, write_bundle, write_stock
from benchmarks.onnx_steps import DecodeStep, Prompt
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


def measure(name: str, a: argparse.Namespace, folder: Path, run: Run) -> None:
    """All sides of one model."""
    device = torch.device(a.provider)
    dtype = getattr(torch, a.dtype)
    load = LOADS[name]
    model = {"cards": card_model, "random": random_model}[name](dtype)
    error_limit = MOST_ERROR * (1 if dtype == torch.float32 else 30)
    paths = {}
    for title, given in (("dense", None), ("sparse", load)):
        at = folder / f"{name} {title}"
        paths[title] = run.step(
            f"{name}, {title}: export", lambda at=at, given=given: write_bundle(model, given, at)
        )
    loads = [replace(load, visual=n - load.text) for n in a.cached] if name == "random" else []
    loads = loads or [load]
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt tokens": {"dense": load.prompt, "sparse": sum(load.pruned_prompt())},
    }
    run.put("model", facts, name)
    truth = None
    if dtype == torch.float32 or device.type != "cpu":
        truth = TorchModel(model, device)
    sides = {k: p for k, p in paths.items() if p is not None}

    def steps(which: dict[str, Path], title: str) -> None:
        sessions: dict[str, Any] = {}
        for one in loads:
            caches = random_caches(model, one.visual + one.text, device)
            key = f"decode step over {one.visual + one.text} tokens{title}"
            step = DecodeStep(
                which, one, device, error_limit, caches, truth, run, f"{name}, {key}", sessions
            )
            sizes = {
                "dense": decode_bytes(model, one.visual + one.text),
                "sparse": decode_bytes(model, one.text + one.attended()),
            }
            found = run.step(f"{name}, {key}", lambda step=step: step.measure(a.rounds))
            if found is not None:
                run.put(key, {"load": asdict(one), "bytes a step reads": sizes, **found}, name)
            if one is loads[0] and (title or device.type == "cpu"):
                run.put(f"{key}: nodes", run.step(f"{name}, {key}: nodes", step.placement), name)
            del caches, step
            gc.collect()

    def prompts(which: dict[str, Path], title: str) -> None:
        g = torch.Generator().manual_seed(3)
        width = model.config.text_config.hidden_size
        embeds = (torch.randn(1, load.prompt, width, generator=g) * 0.02).to(device, dtype)
        caches = random_caches(model, load.prompt, device)
        key = f"prompt of {load.prompt} tokens{title}"
        prompt = Prompt(which, load, device, error_limit, caches, truth, run, f"{name}, {key}", {})
        found = run.step(f"{name}, {key}", lambda: prompt.measure(embeds, a.prompt_rounds))
        run.put(key, found, name)
        gc.collect()

    if device.type != "cpu":  # what needs the slow exports below comes last
        steps(sides, ", ours alone")
        prompts(sides, ", ours alone")
    for title, fusions in (("stock, fused", a.provider), ("stock", None)):
        at = folder / f"{name} {title}"
        made = run.step(
            f"{name}, {title}: export",
            lambda at=at, fusions=fusions: (
                at if at.exists() else write_stock(model, sample_inputs(model), at, fusions)
            ),
        )
        if made is not None:
            sides[title] = made
    steps(sides, "")
    prompts(sides, "")


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
    p.add_argument(
        "--cached",
        type=int,
        nargs="+",
        default=[4672],
        help="tokens in the cache of the random model's decode steps, one table each",
    )
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after these")
    p.add_argument("--work", type=Path, help="keep what is exported here; stock exports are reused")
    p.add_argument("--out", type=Path, help="JSON file, written after every step")
    a = p.parse_args(arguments)
    torch.set_num_threads(a.threads)
    hf.quiet()
    if a.provider == "cuda":  # the libraries of torch's packages, for sessions that are not ours
        onnxruntime.preload_dlls()
    run = Run({"environment": environment(a)}, a.out, a.seconds)
    for name in LOADS if a.model == "all" else [a.model]:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            run.step(name, lambda name=name, at=a.work or Path(folder): measure(name, a, at, run))
    run.write()
    return run.report


if __name__ == "__main__":
    sys.exit("left out" in main())
