"""Attention of many rows: chunks of a prompt against a KV cache, and packed or dense pictures.

    python -m benchmarks.kernels.prefill_attention --out prefill_attention.json [--only TEXT] [--limit SECONDS]

All sides in one run. A call of ours on a cache includes writing the new keys and values; its
lengths, and the bounds of packed segments, stay on the device. The rivals are told their lengths on
the host and only attend; scaled_dot_product_attention has no mask for a chunk behind cached keys
in cuDNN, so there cuDNN attends all keys ("all keys": more work, counted as such). The floor is the
larger of operations at the rate of a large bf16 product and bytes at copy speed, both measured
here. A setting whose result is off is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import Timing, relative_error, save, time_events, time_graph, within
from sparsevila_compile.ops import ATTENTION, CACHED_ATTENTION

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
SAMPLED_ROWS = 64
LONG_FLOP = 3e11
"""From here on a call is timed by itself: launching it takes no time to speak of."""


@dataclass(frozen=True)
class Setting:
    """``rows`` new tokens behind ``cached`` ones; or pictures (``cached`` None): packed or dense.

    Packed pictures are batch segments of ``rows`` tokens in one sequence, dense ones a batch.
    """

    name: str
    batch: int
    rows: int
    cached: int | None = None
    packed: bool = False
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128

    @property
    def flop(self) -> float:
        pairs = self.rows * self.rows if self.cached is None else 0.0
        if self.cached is not None:
            pairs = self.rows * (self.cached + (self.rows + 1) / 2)
        return 4.0 * self.dim * self.heads * self.batch * pairs

    @property
    def bytes(self) -> int:
        keys = self.rows + (self.cached or 0)
        per_row = 2 * self.heads * self.rows + 2 * self.kv_heads * keys
        if self.cached is not None:  # read and written again, into the cache
            per_row += 4 * self.kv_heads * self.rows
        return 2 * self.batch * self.dim * per_row


SETTINGS = [
    Setting("7B chunk 8192 behind 49152", 1, 8192, 49_152),
    Setting("7B chunk 4096 behind 8192", 1, 4096, 8192),
    Setting("7B chunk 1000 behind 49173", 1, 1000, 49_173),
    Setting("7B question 48 behind 50000", 1, 48, 50_000),
    Setting("7B prompt 12288", 1, 12_288, 0),
    Setting("7B prompt 49152", 1, 49_152, 0),
    Setting("7B prompts 8 x 1536", 8, 1536, 0),
    Setting("3B prompt 12288", 1, 12_288, 0, heads=16, kv_heads=2),
    Setting("32B prompt 12288", 1, 12_288, 0, heads=40, kv_heads=8),
    Setting("MHA prompt 9216", 1, 9216, 0, heads=32, kv_heads=32),
    Setting("windows 3072 x 64", 3072, 64, packed=True, heads=16, kv_heads=16, dim=80),
    Setting("segments 48 x 4096", 48, 4096, packed=True, heads=16, kv_heads=16, dim=80),
    Setting("segments 192 x 1024", 192, 1024, packed=True, heads=16, kv_heads=16, dim=80),
    Setting("segments 64 x 1000", 64, 1000, packed=True, heads=16, kv_heads=16, dim=64),
    Setting("segments 170 x 577", 170, 577, packed=True, heads=16, kv_heads=16, dim=80),
    Setting("segments 1 x 4096", 1, 4096, packed=True, heads=16, kv_heads=16, dim=80),
    Setting("segments 9 x 1025", 9, 1025, packed=True, heads=25, kv_heads=25, dim=128),
    Setting("CLIP 64 x 577", 64, 577, heads=16, kv_heads=16, dim=64),
    Setting("SigLIP 64 x 729", 64, 729, heads=16, kv_heads=16, dim=72),
]


@dataclass(frozen=True)
class Inputs:
    """q [B, Hq, S, D], keys and values as the rivals take them, and one call of ours."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ours: Callable[[], torch.Tensor]
    cu_seqlens: torch.Tensor | None = None


def make(s: Setting) -> Inputs:
    def normal(batch: int, rows: int, heads: int) -> torch.Tensor:
        shape = (batch, rows, heads, s.dim)
        return torch.randn(shape, dtype=DTYPE, device=DEVICE).transpose(1, 2)

    scale = s.dim**-0.5
    if s.cached is None:
        batch, rows = (1, s.batch * s.rows) if s.packed else (s.batch, s.rows)
        q, k, v = (normal(batch, rows, h) for h in (s.heads, s.kv_heads, s.kv_heads))
        cu = None
        if s.packed:
            cu = torch.arange(s.batch + 1, dtype=torch.int32, device=DEVICE) * s.rows
        return Inputs(q, k, v, lambda: ATTENTION(q, k, v, cu, scale, False, 0, impl="triton"), cu)
    q, k, v = (normal(s.batch, s.rows, h) for h in (s.heads, s.kv_heads, s.kv_heads))
    held = s.cached + s.rows
    caches = torch.randn(2, s.batch, s.kv_heads, held + 100, s.dim, dtype=DTYPE, device=DEVICE)
    lens, news = (
        torch.full((s.batch,), n, dtype=torch.int32, device=DEVICE) for n in (s.cached, s.rows)
    )

    def ours() -> torch.Tensor:
        out: torch.Tensor = CACHED_ATTENTION(q, k, v, *caches, lens, news, scale, 0, impl="triton")
        return out

    ours()  # the rivals read the new keys from the cache
    return Inputs(q, caches[0, :, :, :held], caches[1, :, :, :held], ours)


def rivals(s: Setting, x: Inputs) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, call, and how much work it does relative to what was asked for."""
    shared = s.heads != s.kv_heads
    if s.packed:
        q, k, v = (t[0].transpose(0, 1) for t in (x.q, x.k, x.v))
        cu, most = x.cu_seqlens, s.rows
        yield (
            "flash varlen",
            lambda: torch.ops.aten._flash_attention_forward(
                q, k, v, cu, cu, most, most, 0.0, False, False
            ),
            1.0,
        )
        return

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                x.q, x.k, x.v, is_causal=s.cached == 0, enable_gqa=shared
            )

    def flash() -> Any:
        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        causal = s.cached is not None
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, s.rows, k.shape[1], 0.0, causal, False
        )

    if s.cached:
        keys = s.cached + s.rows
        yield "cudnn, all keys", cudnn, keys / (s.cached + (s.rows + 1) / 2)
    else:
        yield "cudnn", cudnn, 1.0
    yield "flash", flash, 1.0
    if s.cached is None:  # the same op on scaled_dot_product_attention, output laid out as asked
        yield (
            "op on library",
            lambda: ATTENTION(x.q, x.k, x.v, None, s.dim**-0.5, False, 0, impl="library"),
            1.0,
        )


def errors(s: Setting, x: Inputs) -> tuple[float, float]:
    """Relative error against float64 on sampled rows, of ours and of eager attention in bf16."""
    out = x.ours()
    total = x.q.shape[2]
    rows = torch.linspace(0, total - 1, SAMPLED_ROWS, device=DEVICE).long()
    key = torch.arange(x.k.shape[2], device=DEVICE)
    if s.cached is not None:
        visible = key <= s.cached + rows[:, None]
    elif s.packed:
        visible = key // s.rows == (rows // s.rows)[:, None]
    else:
        visible = torch.ones(len(rows), len(key), dtype=torch.bool, device=DEVICE)
    mine: list[torch.Tensor] = []
    exact: list[torch.Tensor] = []
    eager: list[torch.Tensor] = []
    for b in {0, x.q.shape[0] - 1}:
        for h in {0, s.heads // 2, s.heads - 1}:
            kv = h // (s.heads // s.kv_heads)
            mine.append(out[b, rows, h])
            for results, dtype in ((exact, torch.float64), (eager, DTYPE)):
                q, k, v = (t.to(dtype) for t in (x.q[b, h, rows], x.k[b, kv], x.v[b, kv]))
                scores = (q @ k.T * s.dim**-0.5).masked_fill(~visible, float("-inf"))
                results.append(scores.softmax(-1) @ v)
    right = torch.stack(exact)
    finite = bool(out.isfinite().all())
    return (
        relative_error(torch.stack(mine), right) if finite else float("inf"),
        relative_error(torch.stack(eager), right),
    )


def timed(s: Setting, call: Callable[[], Any]) -> Timing:
    if s.flop > LONG_FLOP:
        return time_events(call, budget_ms=100)
    return time_graph([call], budget_ms=60)


def measure(s: Setting, flop_rate: float, byte_rate: float) -> dict[str, Any]:
    x = make(s)
    error, eager = errors(s, x)
    result: dict[str, Any] = {**asdict(s), "flop": s.flop, "bytes": s.bytes}
    result |= {"error": error, "eager_error": eager}
    if not error <= 2 * eager:
        return {**result, "failed": f"relative error {error:.2e}, eager has {eager:.2e}"}
    floor = 1e6 * max(s.flop / flop_rate, s.bytes / byte_rate)
    mine = timed(s, x.ours)
    result |= {"floor_us": floor, "us": mine.json(), "fraction": floor / mine.median}
    result["rivals"] = {}
    for name, call, work in rivals(s, x):
        taken = timed(s, call)
        result["rivals"][name] = {"us": taken.json(), "work": work}
    return result


def limits() -> tuple[float, float]:
    """Operations and bytes a second of a large bf16 product and of a device copy."""
    a = torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE)
    product = time_events(lambda: a @ a, budget_ms=200).median
    big = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    to = torch.empty_like(big)
    copy = time_events(lambda: to.copy_(big), budget_ms=100).median
    return 2 * 8192**3 / (1e-6 * product), 2 * big.numel() / (1e-6 * copy)


def line(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{result['name']:30} FAILED: {result['failed']}"
    us = result["us"]["median"]
    text = (
        f"{result['name']:30} {us:9.1f} us {result['flop'] / us / 1e6:6.1f} TFLOP/s "
        f"{result['bytes'] / us / 1e6:5.2f} TB/s, {100 * result['fraction']:3.0f} % of the floor "
        f"{result['floor_us']:8.1f} us |"
    )
    for name, rival in result["rivals"].items():
        rate = rival["work"] * result["flop"] / rival["us"]["median"] / 1e6
        text += f" {name} {rival['us']['median']:.1f} us {rate:.1f} TFLOP/s"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--limit", type=float, default=0, help="begin no setting after SECONDS")
    args = parser.parse_args()
    torch.manual_seed(0)
    flop_rate, byte_rate = limits()
    print(
        f"bf16 product {flop_rate / 1e12:.0f} TFLOP/s, copy {byte_rate / 1e12:.2f} TB/s", flush=True
    )
    results = []
    rates = {"flop_per_s": flop_rate, "bytes_per_s": byte_rate}
    for setting in within(args.limit, [s for s in SETTINGS if args.only in s.name]):
        results.append(measure(setting, flop_rate, byte_rate))
        print(line(results[-1]), flush=True)
        torch.cuda.empty_cache()
        if args.out is not None:
            save(args.out, rates | {"results": results})
    return 1 if any("failed" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
