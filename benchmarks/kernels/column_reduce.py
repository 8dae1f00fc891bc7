"""Attention column reduction against flash-colsum, all in one run.

    python -m benchmarks.kernels.column_reduce --out column_reduce.json [--only TEXT] [--limit SECONDS]

Ours is timed alone and with the rows' log-sum-exp given, as an attention's forward has it. A
setting whose error against float64 exceeds that of eager code in bfloat16 is not timed. The floor
is the greatest of: one product of queries and keys at the matrix rate of a large bf16 product, one
exponential per score at 16 a clock and processor, and reading the keys once at the speed of a large
device copy; rates and clock are measured or read in the same run. flash-colsum takes neither packed
pictures nor shared keys: it gets pictures of one size as a batch, and keys repeated beforehand.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_speed, relative_error, save, time_graph, within
from sparsevila_compile.ops import COLUMN_REDUCE

DEVICE = torch.device("cuda")
L2_TIMES_THREE = 150e6


@dataclass(frozen=True)
class Setting:
    """Rows are a picture's patches (``keys`` 0) or the last rows of a prompt (causal)."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    rows: int
    dim: int
    keys: int = 0
    packed: bool = False
    chosen: bool = False
    """Report the middle 90 % of the keys, by index, and weight the rows: as retrieval does."""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.batch}x{self.rows}x{self.length} "
            f"{self.heads}/{self.kv_heads} D={self.dim}"
        )

    @property
    def length(self) -> int:
        return self.keys or self.rows

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.rows * self.length


SETTINGS = [
    Setting("encoder", 1, 16, 16, 4096, 80),
    Setting("encoder", 64, 16, 16, 1024, 80),
    Setting("encoder packed", 64, 16, 16, 1024, 80, packed=True),
    Setting("encoder", 256, 16, 16, 729, 72),
    Setting("encoder packed", 256, 16, 16, 729, 72, packed=True),
    Setting("encoder", 16, 16, 16, 577, 64),
    Setting("encoder", 1, 16, 16, 16_384, 80),
    Setting("encoder", 4, 12, 12, 2501, 96),
    Setting("encoder", 5, 25, 25, 1025, 128),
    Setting("encoder", 1, 16, 16, 3333, 80),
    Setting("encoder packed", 24, 16, 16, 1000, 80, packed=True),
    Setting("retrieval", 1, 28, 4, 32, 128, 50_000),
    Setting("retrieval chosen", 1, 28, 4, 32, 128, 50_000, chosen=True),
    Setting("retrieval", 1, 28, 4, 128, 128, 100_000),
    Setting("retrieval chosen", 1, 28, 4, 128, 128, 100_000, chosen=True),
    Setting("retrieval chosen", 8, 28, 4, 48, 128, 12_345, chosen=True),
    Setting("retrieval chosen 3B", 1, 16, 2, 48, 128, 12_345, chosen=True),
    Setting("retrieval chosen 32B", 1, 40, 8, 48, 128, 49_173, chosen=True),
    Setting("retrieval chosen MHA", 1, 32, 32, 48, 128, 9216, chosen=True),
]


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    weights: Tensor | None
    cu_seqlens: Tensor | None
    q_start: Tensor | None
    columns: Tensor | None

    def call(self, lse: Tensor | None = None) -> Tensor:
        middle = (self.weights, self.cu_seqlens, self.q_start, None, self.columns, lse)
        scale, causal = self.q.shape[3] ** -0.5, self.q_start is not None
        return COLUMN_REDUCE(self.q, self.k, *middle, scale, causal, "mean", impl="triton")


def make(s: Setting, seed: int) -> Inputs:
    g = torch.Generator(device=DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Scores of standard deviation 2: rows neither flat nor all on one key.
        return torch.randn(shape, device=DEVICE, generator=g).mul_(math.sqrt(2)).bfloat16()

    q = normal(s.batch, s.rows, s.heads, s.dim).transpose(1, 2)
    if not s.keys:
        k = normal(s.batch, s.rows, s.kv_heads, s.dim).transpose(1, 2)
        cu = None
        if s.packed:
            cu = torch.arange(0, s.batch * s.rows + 1, s.rows, dtype=torch.int32, device=DEVICE)
            q, k = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k))
        return Inputs(q, k, None, cu, None, None)
    k = normal(s.batch, s.kv_heads, s.keys, s.dim)
    start = torch.full((s.batch,), s.keys - s.rows, dtype=torch.int32, device=DEVICE)
    weights = columns = None
    if s.chosen:
        weights = torch.full((s.batch, s.rows), 1 / s.rows, device=DEVICE)
        columns = torch.arange(s.keys // 20, s.keys - s.keys // 20, dtype=torch.int32)
        columns = columns.to(DEVICE).expand(s.batch, -1)
    return Inputs(q, k, weights, None, start, columns)


def exact_lse(s: Setting, i: Inputs) -> Tensor:
    """[B, Hq, M] float32 (packed: [1, Hq, B * M]), from products in float32."""
    q, k = unpacked(s, i)
    lse = torch.empty(q.shape[:3], device=DEVICE)
    for h in range(s.heads):
        lse[:, h] = scores_of(
            s, q[:, h].float(), k[:, h * s.kv_heads // s.heads].float()
        ).logsumexp(-1)
    return lse.transpose(0, 1).reshape(1, s.heads, -1) if s.packed else lse


def unpacked(s: Setting, i: Inputs) -> tuple[Tensor, Tensor]:
    if not s.packed:
        return i.q, i.k
    q, k = (x[0].unflatten(1, (s.batch, s.rows)).transpose(0, 1) for x in (i.q, i.k))
    return q, k


def scores_of(s: Setting, q: Tensor, k: Tensor) -> Tensor:
    """[..., M, N] of one head, in the dtype of q."""
    scores = q @ k.mT * s.dim**-0.5
    if s.keys:
        last = s.keys - s.rows + torch.arange(s.rows, device=DEVICE)
        scores.masked_fill_(torch.arange(s.keys, device=DEVICE) > last[:, None], float("-inf"))
    return scores


def errors(s: Setting, i: Inputs, outs: list[Tensor]) -> list[float]:
    """Relative errors against float64 on the last picture or row of the batch: eager, then outs."""
    q, k = unpacked(s, i)
    exact = torch.zeros(s.length, dtype=torch.float64, device=DEVICE)
    eager = torch.zeros(s.length, device=DEVICE)
    for h in range(s.heads):
        mine, keys = q[-1, h], k[-1, h * s.kv_heads // s.heads]
        for rows in (
            torch.arange(s.rows, device=DEVICE).split(1024) if not s.keys else [slice(None)]
        ):
            exact += scores_of(s, mine[rows].double(), keys.double()).softmax(-1).sum(0)
            eager += scores_of(s, mine[rows], keys).softmax(-1).sum(0).float()
    reported = slice(None) if i.columns is None else i.columns[-1].long()
    results = [(eager / (s.rows * s.heads))[reported]]
    for out in outs:
        last = out[0, 0].view(s.batch, -1)[-1] if s.packed else out.flatten(0, -2)[-1]
        results.append(last)
    wanted = (exact / (s.rows * s.heads))[reported]
    return [relative_error(r, wanted) for r in results]


def rival(s: Setting, i: Inputs) -> Callable[[], Tensor] | None:
    """flash-colsum on the same work (all columns, uniform rows), or None where it cannot."""
    try:
        from flash_colsum import flash_colsum
    except ImportError:
        return None
    if s.packed or s.chosen or (s.keys and s.batch > 1):
        return None
    k = i.k.repeat_interleave(s.heads // s.kv_heads, 1)
    return lambda: flash_colsum(i.q, k, s.dim**-0.5, is_causal=bool(s.keys))


def rates() -> dict[str, float]:
    """Per second: operations of a bf16 product, exponentials, bytes of a copy."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = time_graph([lambda: a @ b], budget_ms=50).median
    properties = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(properties, "clock_rate", 1_980_000)
    return {
        "flops": 2 * 8192**3 / product * 1e6,
        "exps": 16 * properties.multi_processor_count * clock,
        "bytes": 1e6 * copy_speed(),
    }


def measure(s: Setting, speed: dict[str, float]) -> dict[str, Any]:
    keys_bytes = 2 * s.batch * s.kv_heads * s.length * s.dim
    sets = max(1, math.ceil(L2_TIMES_THREE / (2 * keys_bytes)))
    inputs = [make(s, seed) for seed in range(min(sets, 8))]
    lse = [exact_lse(s, i) for i in inputs]
    first = inputs[0]
    outs = [first.call(), first.call(lse[0])]
    other, refused = rival(s, first), None
    if other is not None:
        try:
            outs.append(other())
        except (RuntimeError, ValueError, AssertionError) as error:  # a shape that it cannot do
            other, refused = None, f"{type(error).__name__}: {error}"[:200]
    eager, ours, with_lse, *theirs = errors(s, first, outs)
    result: dict[str, Any] = asdict(s) | {
        "name": str(s),
        "error": ours,
        "error_with_lse": with_lse,
        "error_eager_bf16": eager,
        "error_flash_colsum": theirs[0] if theirs else None,
        "refused_by_flash_colsum": refused,
        "floor_us": 1e6
        * max(
            2 * s.scores * s.dim / speed["flops"],
            s.scores / speed["exps"],
            keys_bytes / speed["bytes"],
        ),
    }
    if max(ours, with_lse) > eager:
        return result | {"failed": "error above that of eager bf16"}
    if not torch.equal(outs[0], first.call()):
        return result | {"failed": "not the same twice"}
    result["ours_us"] = time_graph([i.call for i in inputs]).median
    known = [lambda i=i, x=x: i.call(x) for i, x in zip(inputs, lse, strict=True)]  # type: ignore[misc]
    result["ours_with_lse_us"] = time_graph(known).median
    if other is not None:
        others = [rival(s, i) for i in inputs]
        result["flash_colsum_us"] = time_graph([o for o in others if o is not None]).median
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="settings whose printed name contains this")
    parser.add_argument("--limit", type=float, default=0, help="begin no setting after SECONDS")
    arguments = parser.parse_args()
    speed = rates()
    print(
        f"bf16 product {speed['flops'] / 1e12:.0f} TFLOP/s, exponentials {speed['exps'] / 1e12:.2f} T/s, "
        f"copy {speed['bytes'] / 1e12:.2f} TB/s"
    )
    print(
        f"{'setting':44} {'ours':>9} {'with lse':>9} {'rival':>9} {'floor':>8}  errors, eager bf16"
    )
    results, failed = [], 0
    for s in within(arguments.limit, [s for s in SETTINGS if arguments.only in str(s)]):
        title = str(s)
        r = measure(s, speed)
        torch.cuda.empty_cache()
        results.append(r)
        save(arguments.out, {"rates": speed, "results": results})
        if "failed" in r:
            failed += 1
            print(f"{title:44} FAILED: {r['failed']}: {r['error']:.1e} {r['error_eager_bf16']:.1e}")
            continue
        other = r.get("flash_colsum_us")
        print(
            f"{title:44} {r['ours_us']:9.1f} {r['ours_with_lse_us']:9.1f} "
            f"{other if other is None else round(other, 1)!s:>9} {r['floor_us']:8.1f}  "
            f"{r['error']:.1e} {r['error_with_lse']:.1e} {r['error_eager_bf16']:.1e} "
            f"{r['floor_us'] / r['ours_with_lse_us']:.0%} of the floor's rate",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
