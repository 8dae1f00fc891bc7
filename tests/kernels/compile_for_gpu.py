"""Compile an op's Triton kernels for a Hopper GPU without one: ``python compile_for_gpu.py OP...``.

The interpreter, in which kernels are tested on CPUs, accepts programs that the compiler refuses (a
variable that changes its type in a loop, say). Here the wrappers are called with tensors on the CPU
and every launch becomes a compilation: nothing runs, results are whatever memory held.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BF16 = torch.bfloat16


class HopperDriver:
    """Answers what compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _w4(n: int, k: int, group: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    shape = (n, k // group)
    codes = zeros(n, k // 8, dtype=torch.int32)
    return codes, torch.ones(shape, dtype=dtype), zeros(*shape, dtype=torch.uint8)


def w4a16_linear() -> Iterator[tuple[Any, ...]]:
    for rows in (1, 2, 4, 8, 16, 64, 200, 1200):
        yield zeros(rows, 512), *_w4(384, 512, 128), None, 128
    yield zeros(1, 3584), *_w4(3584, 3584, 128), zeros(3584), 128
    yield zeros(1, 1920), *_w4(48, 1920, 64), None, 64
    yield zeros(8, 2048), *_w4(96, 2048, 32), None, 32
    yield zeros(3, 256, dtype=torch.float16), *_w4(64, 256, 64, torch.float16), None, 64
    for rows in (2, 40):
        yield zeros(rows, 256, dtype=torch.float32), *_w4(64, 256, 64, torch.float32), None, 64


def w4a8_linear() -> Iterator[tuple[Any, ...]]:
    yield zeros(300, 512), *_w4(96, 512, 128), zeros(96), 128, 256
    yield zeros(300, 384), *_w4(97, 384, 64), None, 64, 256


def w8a8_linear() -> Iterator[tuple[Any, ...]]:
    for code in (torch.int8, torch.float8_e4m3fn):
        for rows in (8, 2048):
            weight = torch.zeros(320, 3424, dtype=torch.float32).to(code)
            yield zeros(rows, 3420), weight, torch.ones(320), zeros(320)


def attention() -> Iterator[tuple[Any, ...]]:
    q = zeros(1, 16, 512, 80)
    yield q, q, q, None, 0.1, False, 0
    yield q, q, q, ints(0, 64, 200, 512), 0.1, False, 0
    q, kv = zeros(2, 8, 256, 128), zeros(2, 2, 256, 128)
    yield q, kv, kv, None, 0.1, True, 0
    yield q, kv, kv, None, 0.1, True, 100
    q = zeros(1, 4, 128, 72, dtype=torch.float32)
    yield q, q, q, None, 0.1, False, 0


def _cached(rows: int, new: int, d: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    q, k = zeros(rows, 28, new, d, dtype=dtype), zeros(rows, 4, new, d, dtype=dtype)
    cache = zeros(rows, 4, 8192, d, dtype=dtype)
    lens, news = (
        torch.full((rows,), 5000, dtype=torch.int32),
        torch.full((rows,), new, dtype=torch.int32),
    )
    return q, k, k, cache, cache.clone(), lens, news


def cached_attention() -> Iterator[tuple[Any, ...]]:
    for rows, new in ((1, 1), (8, 1), (1, 7), (1, 512), (2, 40)):
        yield *_cached(rows, new, 128), 0.1, 0
    yield *_cached(1, 1, 64), 0.1, 64
    yield *_cached(2, 1, 80, torch.float32), 0.1, 0


def retrieval_attention() -> Iterator[tuple[Any, ...]]:
    for rows, heads, d in ((1, 1, 128), (8, 4, 128), (1, 1, 64), (2, 1, 96)):
        index = torch.arange(640, dtype=torch.int32).expand(rows, heads, 640).contiguous()
        tail = torch.full((rows,), 4900, dtype=torch.int32)
        yield *_cached(rows, 1, d), index, tail, 0.1


def column_reduce() -> Iterator[tuple[Any, ...]]:
    q = zeros(2, 16, 512, 80)
    plain = (None, None, None, None, None)
    yield q, q, *plain, None, 0.1, False, "mean"
    yield q, q, *plain, zeros(2, 16, 512, dtype=torch.float32), 0.1, False, "none"
    q = zeros(1, 4, 1100, 96)
    yield q, q, *plain, None, 0.1, False, "kv"
    # Offsets of 64 bits: keys so far apart, in memory that is never touched.
    far = torch.empty(2**31, dtype=BF16).as_strided((1, 4, 8192, 128), (512, 128, 262_104, 1))
    yield zeros(1, 28, 48, 128), far, None, None, ints(7000), None, None, None, 0.1, True, "kv"
    yield zeros(1, 4, 1100, 128), far, *plain, None, 0.1, False, "none"
    q = zeros(1, 16, 512, 72)
    yield q, q, None, ints(0, 256, 512), None, None, None, None, 0.1, False, "mean"
    for new in (48, 128):
        q, k = zeros(1, 28, new, 128), zeros(1, 4, 8192, 128)
        weights = torch.full((1, new), 1 / new)
        columns = torch.arange(6000, dtype=torch.int32)[None]
        asked = (weights, None, ints(7000), None, columns)
        yield q, k, *asked, None, 0.1, True, "mean"
        yield q, k, *asked, zeros(1, 28, new, dtype=torch.float32), 0.1, True, "kv"


def select_tokens() -> Iterator[tuple[Any, ...]]:
    for segments, length in ((1, 100_000), (28, 12_288), (64, 256)):
        scores = torch.rand(segments * length)
        starts = torch.arange(segments) * length
        lengths, keep = torch.full((segments,), length), torch.full((segments,), length // 4)
        yield (
            scores,
            starts,
            lengths,
            keep,
            torch.arange(segments) * (length // 4),
            segments * (length // 4),
        )


def add_rms_norm() -> Iterator[tuple[Any, ...]]:
    yield zeros(1, 1, 3584), zeros(1, 1, 3584), zeros(3584), 1e-6
    yield zeros(300, 1280), None, zeros(1280), 1e-6


def rotary() -> Iterator[tuple[Any, ...]]:
    for new in (1, 300):
        q, k, table = zeros(1, new, 28, 128), zeros(1, new, 4, 128), zeros(1, new, 128)
        yield q, k, table, table


def silu_mul() -> Iterator[tuple[Any, ...]]:
    for rows in (1, 300):
        both = zeros(rows, 2 * 3424)
        yield both[:, :3424], both[:, 3424:]


def greedy_step() -> Iterator[tuple[Any, ...]]:
    for rows, dtype in ((1, BF16), (8, torch.float32)):
        tokens, counts = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int32)
        ends = torch.tensor([5, 7])
        yield (
            zeros(rows, 152064, dtype=dtype),
            tokens,
            counts,
            counts.clone(),
            tokens.clone(),
            ends,
            ends[0],
        )


CASES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    f.__name__: f
    for f in (
        w4a16_linear, w4a8_linear, w8a8_linear, attention, cached_attention, retrieval_attention,
        column_reduce, select_tokens, add_rms_norm, rotary, silu_mul, greedy_step,
    )
}  # fmt: skip


def main(names: list[str]) -> None:
    """Print ``OP kernels seconds`` for each op; a refusal of the compiler is an exception."""
    driver.set_active(HopperDriver())
    real, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(self.__name__)
        return real(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    from sparsevila_compile.kernels import triton_support

    triton_support.cuda_or_interpreter = lambda device: None
    triton_support.processors = lambda device: 132
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    from sparsevila_compile import ops  # noqa: F401  declares them all
    from sparsevila_compile.kernels.registry import OPS

    for name in names:
        start = time.perf_counter()
        compiled.clear()
        for case in CASES[name]():
            OPS[name].implementations["triton"].function(*case)
        print(name, len(set(compiled)), f"{time.perf_counter() - start:.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
