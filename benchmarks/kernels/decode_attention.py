"""Decode attention, one token a row, against PyTorch's own kernels, all in one run.

    python -m benchmarks.kernels.decode_attention --out decode_attention.json [--only TEXT]

A call of ours includes writing the new key and value to the cache; the rivals only attend. Rivals
read the whole cache, or, named "packed", a contiguous copy of the chosen keys that was made for
them beforehand. The floor is the time to read the attended keys and values once at the speed of a
large device copy, measured in the same run. A setting whose result is off is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import copy_speed, environment, relative_error, time_graph
from sparsevila_compile.ops import CACHED_ATTENTION, RETRIEVAL_ATTENTION

DEVICE = torch.device("cuda")
TAIL = 64
L2_TIMES_THREE = 150e6
RIVALS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Setting:
    """``chosen`` cache positions of ``cached`` and a tail of TAIL more; 0: all of them, no index."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    cached: int
    chosen: int = 0
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    slots: int = 0
    """Width of the index, where it is wider than ``chosen``."""

    @property
    def attended(self) -> int:
        return (self.chosen + TAIL if self.chosen else self.cached) + 1

    @property
    def bytes(self) -> int:
        row = self.dim * torch.finfo(self.dtype).bits // 8
        index = 4 * (self.slots or self.chosen)
        return self.batch * self.kv_heads * (2 * row * self.attended + index)


SETTINGS = [
    Setting("7B retrieval", 1, 28, 4, 50_000, 5000),
    Setting("7B retrieval", 8, 28, 4, 50_000, 5000),
    Setting("7B retrieval", 32, 28, 4, 12_500, 1250),
    Setting("7B retrieval", 1, 28, 4, 100_000, 10_000),
    Setting("7B retrieval, half the slots empty", 1, 28, 4, 50_000, 5000, slots=10_000),
    Setting("7B dense", 1, 28, 4, 50_000),
    Setting("7B dense", 8, 28, 4, 50_000),
    Setting("7B dense", 1, 28, 4, 100_000),
    Setting("7B dense", 1, 28, 4, 12_500),
    Setting("7B dense", 8, 28, 4, 12_500),
    Setting("7B dense", 32, 28, 4, 12_500),
    *(Setting("7B crossing", 1, 28, 4, n, n // 10) for n in (2000, 4000, 6000, 9000, 12_500)),
    *(Setting("7B crossing", 1, 28, 4, n) for n in (2000, 4000, 6000, 9000)),
    Setting("7B crossing", 8, 28, 4, 1000, 100),
    Setting("7B crossing", 8, 28, 4, 1000),
    Setting("7B dense", 32, 28, 4, 2000),
    Setting("7B dense", 1, 28, 4, 49_173, dtype=torch.float16),
    Setting("MHA 32/32 retrieval", 1, 32, 32, 9216, 922),
    Setting("MHA 32/32 dense", 1, 32, 32, 9216),
    Setting("MHA 32/32 dense", 8, 32, 32, 9216),
    Setting("8B 32/8 retrieval", 1, 32, 8, 50_000, 5000),
    Setting("8B 32/8 dense", 1, 32, 8, 50_000),
    Setting("3B 16/2 retrieval", 1, 16, 2, 50_000, 5000),
    Setting("3B 16/2 retrieval", 8, 16, 2, 50_000, 5000),
    Setting("3B 16/2 dense", 1, 16, 2, 50_000),
    Setting("32B 40/8 retrieval", 1, 40, 8, 50_000, 5000),
    Setting("32B 40/8 dense", 1, 40, 8, 50_000),
    Setting("28/4 D=64 dense", 1, 28, 4, 50_000, dim=64),
    Setting("28/4 D=80 dense", 1, 28, 4, 50_000, dim=80),
    Setting("28/4 D=96 retrieval", 1, 28, 4, 50_000, 5000, dim=96),
]


@dataclass(frozen=True)
class Inputs:
    """One call: the op's tensor arguments, and the keys and values that it attends, packed."""

    args: tuple[torch.Tensor, ...]
    index: torch.Tensor | None
    tail_start: torch.Tensor

    def call(self, scale: float) -> torch.Tensor:
        if self.index is None:
            return CACHED_ATTENTION(*self.args, scale, 0, impl="triton")
        return RETRIEVAL_ATTENTION(*self.args, self.index, self.tail_start, scale, impl="triton")

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, Hkv, attended - 1, D] each: what is attended but the new token."""
        caches, n = self.args[3:5], int(self.args[5][0])
        if self.index is None:
            return caches[0][:, :, :n], caches[1][:, :, :n]
        tail = torch.arange(n - TAIL, n, device=DEVICE).expand(*self.index.shape[:2], TAIL)
        used = int((self.index[0, 0] >= 0).sum())
        at = torch.cat([self.index[..., :used].long(), tail], -1)[..., None]
        at = at.expand(*at.shape[:3], caches[0].shape[-1])
        return caches[0].gather(2, at), caches[1].gather(2, at)


def make(s: Setting, seed: int) -> Inputs:
    g = torch.Generator(device=DEVICE).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=s.dtype, device=DEVICE).normal_(generator=g)

    capacity = s.cached + 128
    q = normal(s.batch, 1, s.heads, s.dim).transpose(1, 2)
    k, v = (normal(s.batch, 1, s.kv_heads, s.dim).transpose(1, 2) for _ in range(2))
    caches = (normal(s.batch, s.kv_heads, capacity, s.dim) for _ in range(2))
    lens = [torch.full((s.batch,), n, dtype=torch.int32, device=DEVICE) for n in (s.cached, 1)]
    index = None
    if s.chosen:
        scores = torch.rand(s.batch, s.kv_heads, s.cached - TAIL, device=DEVICE, generator=g)
        index = scores.topk(s.chosen).indices.sort().values.int()
        empty = max(0, s.slots - s.chosen)
        index = torch.nn.functional.pad(index, (0, empty), value=-1)
    return Inputs((q, k, v, *caches, *lens), index, lens[0] - TAIL)


def errors(s: Setting, inputs: Inputs, out: torch.Tensor) -> tuple[float, float]:
    """Relative error against float64, of ours and of eager attention in the inputs' dtype."""
    q, k, v = inputs.args[:3]
    exact, eager = [], []
    group = s.heads // s.kv_heads
    for b in range(s.batch):
        row = Inputs(
            tuple(t[b : b + 1] for t in inputs.args),
            None if inputs.index is None else inputs.index[b : b + 1],
            inputs.tail_start[b : b + 1],
        )
        keys, values = (
            torch.cat([old, new[b : b + 1]], 2)
            for old, new in zip(row.packed(), (k, v), strict=True)
        )
        grouped = q[b : b + 1].view(1, s.kv_heads, group, s.dim)
        for into, dtype in ((exact, torch.float64), (eager, s.dtype)):
            scores = grouped.to(dtype) @ keys.to(dtype).mT * s.dim**-0.5
            into.append((scores.softmax(-1) @ values.to(dtype)).view(1, 1, s.heads, s.dim))
    wanted = torch.cat(exact)
    return relative_error(out, wanted), relative_error(torch.cat(eager), wanted)


def rival_calls(s: Setting, sets: list[Inputs], packed: bool) -> list[Callable[[], torch.Tensor]]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = []
    for inputs in sets:
        if packed:
            keys, values = inputs.packed()
        else:
            keys, values = (c[:, :, : s.cached] for c in inputs.args[3:5])
        calls.append(
            lambda q=inputs.args[0], k=keys, v=values: sdpa(
                q, k, v, enable_gqa=s.heads != s.kv_heads
            )
        )
    return calls


def measure(s: Setting, speed: float, budget_ms: float) -> dict[str, Any]:
    one = 2 * s.batch * s.kv_heads * (s.cached + 128) * s.dim * 2
    sets_n = int(min(16, max(1, -(-L2_TIMES_THREE // s.bytes)), max(1, 60e9 // one)))
    sets = [make(s, seed) for seed in range(sets_n)]
    scale = s.dim**-0.5
    ours, eager = errors(s, sets[0], sets[0].call(scale))
    floor = s.bytes / speed
    row = {**asdict(s), "dtype": str(s.dtype), "error": ours, "eager_error": eager}
    row |= {"bytes": s.bytes, "floor_us": floor, "sets": sets_n}
    if not ours <= 2 * eager:
        return row | {"failed": f"relative error {ours:.2e}, eager attention has {eager:.2e}"}
    timing = time_graph([lambda i=i: i.call(scale) for i in sets], budget_ms=budget_ms)
    row |= {"ours_us": timing.median, "ours": timing.json(), "of_floor": floor / timing.median}
    for name, backend in RIVALS.items():
        for packed in (False, True) if s.chosen else (False,):
            label = f"{name}_packed_us" if packed else f"{name}_us"
            try:
                with sdpa_kernel(backend):
                    calls = rival_calls(s, sets, packed)
                    row[label] = time_graph(calls, budget_ms=budget_ms).median
            except RuntimeError as error:
                row[label] = None
                row[f"{label}_reason"] = str(error).splitlines()[0][:200]
    return row


def line(row: dict[str, Any]) -> str:
    def us(key: str) -> str:
        value = row.get(key)
        return f"{value:8.1f}" if isinstance(value, float) else f"{'-':>8}"

    what = f"{row['name']}, B={row['batch']}, {row['chosen'] or 'all'} of {row['cached']}"
    if "failed" in row:
        return f"{what:52} NOT TIMED: {row['failed']}"
    numbers = [us(k) for k in ("ours_us", "floor_us")] + [f"{row['of_floor']:6.0%}"]
    rivals = ("cudnn_us", "flash_us", "cudnn_packed_us", "flash_packed_us")
    return f"{what:52}" + " ".join(numbers + [us(k) for k in rivals])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="measuring time a figure")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_attention: needs a CUDA device", file=sys.stderr)
        return 1
    speed = copy_speed()
    print(f"device copy {speed / 1e6:.2f} TB/s; microseconds a call")
    heads = ["ours", "floor", "of it", "cudnn", "flash", "cudnn pk", "flash pk"]
    print(f"{'':52}" + " ".join(f"{h:>{6 if h == 'of it' else 8}}" for h in heads))
    rows = []
    for setting in SETTINGS:
        if args.only in setting.name:
            rows.append(measure(setting, speed, args.budget_ms))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    if not rows:
        print(f"decode_attention: no setting's name holds {args.only!r}", file=sys.stderr)
        return 1
    if args.out:
        result = {"environment": environment(), "copy_bytes_per_us": speed, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
