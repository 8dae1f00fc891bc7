"""Compile a model of Qwen2.5-VL-7B's shape with random weights on one GPU, AWQ included.

    python benchmarks/compile_7b_shape.py --out results.json [--samples 8] [--layers 28]

Answers whether the whole pipeline (trace, prune, cache, sparsify, AWQ calibration, lowering,
generation over two turns) fits one GPU's memory, and how long each pass takes. The weights are
random, so tokens mean nothing; that logits are finite and the artifact's parts agree is checked.
It measures compilation, not inference: no speed is claimed from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparsevila_compile import hf
from sparsevila_compile.manager import run_passes
from sparsevila_compile.model import CompiledModel
from sparsevila_compile.pass_base import PASSES, Context
from sparsevila_compile.trace import trace

IMAGE, START, END = 151655, 151652, 151653


def config(layers: int) -> Any:
    """Qwen2.5-VL-7B's published sizes; ``layers`` shortens both towers for a quick look."""
    from transformers import Qwen2_5_VLConfig

    depth = min(32, layers + 4)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [i for i in (7, 15, 23, 31) if i < depth],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


class RandomProcessor:
    """Stands in for a processor: random text around each picture, random pixels."""

    def __init__(self, side: int, seed: int = 0) -> None:
        self.side = side
        self.generator = torch.Generator().manual_seed(seed)

    def apply_chat_template(self, messages: list[Any], **arguments: Any) -> str:
        return "text"

    def __call__(self, text: list[str], images: list[Any], **arguments: Any) -> dict[str, Any]:
        merged = self.side * self.side // 4
        words = torch.randint(1000, 100000, (64,), generator=self.generator).tolist()
        ids = [*words[:16], START, *[IMAGE] * merged, END, *words[16:]]
        pixels = torch.randn(self.side**2, 3 * 2 * 14 * 14, generator=self.generator)
        return {
            "input_ids": torch.tensor([ids]),
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, self.side, self.side]]),
        }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--layers", type=int, default=28)
    arguments.add_argument("--side", type=int, default=64, help="patches along a picture's side")
    given = arguments.parse_args()
    hf.quiet()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "samples": given.samples,
        "layers": given.layers,
        "visual_tokens_a_picture": given.side**2 // 4,
    }
    clock = time.perf_counter

    from transformers import AutoModelForImageTextToText

    start = clock()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(config(given.layers), dtype=torch.bfloat16)
    model = model.eval().requires_grad_(False)
    result["build_s"] = clock() - start
    start = clock()
    program = trace(model)
    defaults = model.generation_config
    del model
    result["trace_s"] = clock() - start
    result["weight_bytes"] = program.weight_bytes()

    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (8, 8)).save(Path(folder) / "a.png")
        line = json.dumps({"image": "a.png", "messages": []}) + "\n"
        (Path(folder) / "data.jsonl").write_text(line * given.samples)
        specs: list[tuple[str, dict[str, Any]]] = [
            ("prune_visual_tokens", {"keep_ratio": 0.25}),
            ("insert_kv_cache", {}),
            ("sparsify_decode_attention", {"keep_ratio": 0.1}),
            (
                "quantize_linear",
                {
                    "group_size": 128,
                    "calibration": {"path": f"{folder}/data.jsonl", "samples": given.samples},
                },
            ),
        ]
        passes = [PASSES[n](PASSES[n].config_type(**o)) for n, o in specs]
        processor = RandomProcessor(given.side)
        start = clock()
        reports = run_passes(program, passes, Context(processor=processor))
        result["passes_s"] = clock() - start
    result["passes"] = [
        {
            "name": r.name,
            "matches": len(r.matches),
            "seconds": r.seconds,
            "peak_memory_bytes": r.peak_memory_bytes,
            "bytes_before": r.bytes_before,
            "bytes_after": r.bytes_after,
            "notes": {k: v for k, v in r.notes.items() if k != "output_error"},
        }
        for r in reports
    ]
    compiled = CompiledModel(program, processor, defaults)
    conversation = compiled.conversation(1)
    prompt = processor(["text"], [])
    result["turns"] = []
    for turn in range(2):
        torch.cuda.synchronize()
        start = clock()
        out = compiled.generate(
            conversation=conversation,
            **prompt,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
        )
        torch.cuda.synchronize()
        result["turns"].append({"seconds": clock() - start, "usage": vars(compiled.usage)})
        more = torch.randint(1000, 100000, (1, 12))
        prompt = {**prompt, "input_ids": torch.cat([out.cpu(), more], dim=1)}
        assert turn == 0 or compiled.usage.cached_tokens > 0, "the second turn reused nothing"
    assert all(t.isfinite().all() for t in conversation.cache.tensors.values())  # type: ignore[union-attr]
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
