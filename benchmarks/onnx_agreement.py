"""Whether an ONNX bundle answers as the module artifact does, on the trained card model.

``python -m benchmarks.onnx_agreement --dialogues 100`` compiles the example's checkpoint in float32,
dense and sparse, as module and as bundle, asks both the same held-out dialogues (every answer goes
into the next question's history) and compares greedy tokens and the logits of every step; then the
same checkpoint in int4, both against float32. With ``--provider cuda`` the bundles run there, and the
modules, which they are compared with, on the CPU.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.onnx_run import Run, relative
from examples.cards.evaluate import LONGEST_ANSWER
from examples.cards.model import normalised
from examples.cards.render import PATCHES
from examples.cards.vocabulary import BOS, EOS, IMAGE
from examples.cards.world import HELD_OUT_SEED, Samples, fixed_set
from sparsevila_compile import hf
from sparsevila_compile.compiler import compile_recipe
from sparsevila_compile.model import CompiledModel, load
from sparsevila_compile.onnx.runner import provider_device
from sparsevila_compile.recipe import recipe_from_dict

CARDS = Path(__file__).resolve().parent.parent / "examples" / "cards"
FUSING = ["merge_linears", "fuse_rms_norm", "fuse_rotary", "fuse_silu_mul", "trim_last_layer"]
DENSE: list[Any] = ["insert_kv_cache"]
SPARSE: list[Any] = [
    {"prune_visual_tokens": {"keep_ratio": 0.25}},
    "insert_kv_cache",
    {"sparsify_decode_attention": {"keep_ratio": 0.25, "when": "always"}},
]
INT4 = {
    "quantize_linear": {
        "group_size": 64,
        "calibration": {"path": str(CARDS / "calibration" / "conversations.jsonl"), "samples": 16},
    }
}


def compiled(
    passes: list[Any],
    form: str,
    folder: Path,
    dtype: str = "float32",
    provider: str | None = None,
    **emit: Any,
) -> CompiledModel:
    """The card model after these passes, written as ``module`` or ``onnx`` and loaded again.

    Args:
        provider: of the bundle; a module stays on the CPU.
    """
    recipe = recipe_from_dict(
        {
            "version": 1,
            "model": {"path": str(CARDS / "checkpoint"), "dtype": dtype, "device": "cpu"},
            "passes": passes,
            "emit": {"format": form, "path": str(folder), **emit},
        }
    )
    return load(compile_recipe(recipe).path, provider=provider)


@contextmanager
def logits_seen(model: CompiledModel) -> Iterator[list[torch.Tensor]]:
    """Collects the logits of every run of the decoder, float32 on the CPU."""
    seen: list[torch.Tensor] = []
    engine: Any = model.engine
    run = engine.run

    def watched(component: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = run(component, inputs)
        if "logits" in out:
            seen.append(out["logits"].float().cpu().clone())
        return out

    engine.run = watched
    try:
        yield seen
    finally:
        del engine.run


def held_out(count: int) -> Samples:
    """Dialogues that the model was not trained on."""
    return fixed_set(count, HELD_OUT_SEED, torch.device("cpu"))


def answers(model: CompiledModel, samples: Samples, i: int, truth: bool = False) -> list[list[int]]:
    """Greedy answers of dialogue i, turn by turn over one cache, token ids.

    Args:
        truth: ask for one token a turn, and put the true answers into the history.
    """
    talk, pixels = samples.dialogues, normalised(samples.pictures[i : i + 1])
    conversation = model.conversation()
    history, said = [BOS, *[IMAGE] * PATCHES], []
    for turn in range(talk.kind.shape[1]):
        history += talk.turn_ids(i, turn, answer=False)
        ids = torch.tensor([history])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            conversation=conversation,
            max_new_tokens=1 if truth else LONGEST_ANSWER,
            do_sample=False,
        )
        said.append(out[0, len(history) :].tolist())
        new = talk.turn_ids(i, turn, answer=True) if truth else said[-1]
        history += [t for t in new if t != EOS] + [EOS]
    return said


@dataclass(frozen=True)
class Agreement:
    """How two models agree on dialogues.

    Attributes:
        dialogues, turns, tokens: how many were compared.
        equal_dialogues: those in which every token is the same.
        worst_logits: largest relative difference of one step's logits, where tokens were the same.
    """

    dialogues: int
    turns: int
    tokens: int
    equal_dialogues: int
    worst_logits: float


def agree(one: CompiledModel, other: CompiledModel, samples: Samples) -> Agreement:
    """Ask both the same dialogues."""
    turns = tokens = equal = 0
    worst = 0.0
    for i in range(len(samples)):
        with logits_seen(one) as left:
            a = answers(one, samples, i)
        with logits_seen(other) as right:
            b = answers(other, samples, i)
        turns, tokens = turns + len(a), tokens + sum(map(len, a))
        if a == b:
            equal += 1
            assert len(left) == len(right) > 0
            worst = max(worst, *(relative(y, x) for x, y in zip(left, right, strict=True)))
    return Agreement(len(samples), turns, tokens, equal, worst)


def error_against(model: CompiledModel, exact: CompiledModel, samples: Samples) -> float:
    """Median relative error of a question's logits, the same history for both."""
    errors = []
    for i in range(len(samples)):
        with logits_seen(exact) as reference:
            answers(exact, samples, i, truth=True)
        with logits_seen(model) as found:
            answers(model, samples, i, truth=True)
        errors += [relative(y, x) for x, y in zip(reference, found, strict=True)]
    return statistics.median(errors)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dialogues", type=int, default=100)
    p.add_argument("--provider", default="cpu", help="of the bundles: cpu, cuda or cuda:N")
    p.add_argument("--dtypes", nargs="+", choices=["float32", "float16"], default=["float32"])
    p.add_argument("--brief", action="store_true", help="neither pure bundles nor int4")
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after these")
    p.add_argument("--out", type=Path, help="JSON file, written after every comparison")
    a = p.parse_args(arguments)
    import onnxruntime
    from transformers.utils import logging

    hf.quiet()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    samples = held_out(a.dialogues)
    device = provider_device(a.provider)
    report: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "machine": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "provider": a.provider,
    }
    run = Run(report, a.out, a.seconds)
    with tempfile.TemporaryDirectory() as name:
        for dtype in a.dtypes:
            for title, passes in (
                ("dense", DENSE),
                ("sparse", SPARSE),
                ("sparse, fused", [*SPARSE, *FUSING]),
            ):
                key = f"{dtype}, {title}"
                at = Path(name) / key
                run.step(
                    key,
                    lambda a=a, at=at, key=key, passes=passes: floats(
                        a, run, samples, at, key, passes
                    ),
                )
        if not a.brief:
            run.step("int4", lambda: int4(a, run, samples, Path(name)))
    run.write()
    return report


def floats(
    a: argparse.Namespace, run: Run, samples: Samples, folder: Path, key: str, passes: list[Any]
) -> None:
    """Module and bundle, with and without ``pure``."""
    dtype = key.partition(",")[0]
    module = compiled(passes, "module", folder / "module", dtype)
    for pure in (False,) if a.brief else (False, True):
        at = folder / f"onnx {pure}"
        bundle = compiled(passes, "onnx", at, dtype, a.provider, pure=pure)
        run.put(f"{key}{', pure ai.onnx' if pure else ''}", asdict(agree(module, bundle, samples)))


def int4(a: argparse.Namespace, run: Run, samples: Samples, folder: Path) -> None:
    """Both against float32."""
    dense = compiled(DENSE, "module", folder / "dense")
    quantized = [*DENSE, INT4]
    module = compiled(quantized, "module", folder / "int4 module")
    given: dict[str, Any] = {"provider": a.provider}
    bundle = compiled(quantized, "onnx", folder / "int4 onnx", **given)
    given["int8_activations"] = True
    fast = compiled(quantized, "onnx", folder / "int4 int8", **given)
    for key, one in (("int4", bundle), ("int4, int8 activations", fast)):
        found = {
            "module against float32": error_against(module, dense, samples),
            "bundle against float32": error_against(one, dense, samples),
            "bundle against module": error_against(one, module, samples),
            **asdict(agree(module, one, samples)),
        }
        run.put(key, found)


if __name__ == "__main__":
    sys.exit("left out" in main())
