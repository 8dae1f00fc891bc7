"""Stock attention kernels, and the choice between them by measurement.

All take ``q [B, S, heads, D]``, ``k`` and ``v`` ``[B, S, kv heads, D]`` and return
``[B, S, heads, D]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's scaled dot product attention on one backend."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def folded(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One query position with GQA, the heads that share keys taken as rows of one head."""
    batch, one, heads, dim = q.shape
    assert one == 1
    assert not causal
    rows = q.view(batch, k.shape[2], heads // k.shape[2], dim).transpose(1, 2)
    return sdpa(backend, rows, k, v, False).transpose(1, 2).reshape(batch, 1, heads, dim)


def packed(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's variable-length flash attention over sequences of one length."""
    from torch.nn.attention.varlen import varlen_attn

    batch, length = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * length, length, device=q.device, dtype=torch.int32)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, starts, starts, length, length, window_size=window)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, length))


def candidates(*, one_row: bool, grouped: bool) -> dict[str, Attention]:
    """torch's kernels by name."""
    named: dict[str, Attention] = {
        name: functools.partial(sdpa, backend)
        for name, backend in BACKENDS.items()
        if not (grouped and name == "memory-efficient")  # it knows no GQA
    }
    if one_row and grouped:
        named |= {
            f"{name}, heads folded into rows": functools.partial(folded, backend)
            for name, backend in BACKENDS.items()
        }
    if not one_row:
        named["varlen flash"] = packed
    return named


def choose_attention(
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    causal: bool,
    notes: list[str],
    *,
    graph: bool,
) -> tuple[str, Attention, dict[str, float]]:
    """The fastest kernel on these inputs (rotated), its name, and every kernel's microseconds.

    Each must agree with the first that runs to 2 %. ``graph``: time in a CUDA graph, as decode
    runs; otherwise launched one by one, as prefill runs.
    """
    q, k, _ = inputs[0]
    if not q.is_cuda:
        return "math", functools.partial(sdpa, SDPBackend.MATH), {}
    from benchmarks.timing import relative_error, time_events, time_graph

    named = candidates(one_row=q.shape[1] == 1, grouped=q.shape[2] != k.shape[2])
    figures: dict[str, float] = {}
    first: Tensor | None = None
    for name, call in named.items():
        try:
            out = call(*inputs[0], causal)
            if first is None:
                first = out
            error = relative_error(out, first)
            if not error < 0.02:
                raise ArithmeticError(f"relative error {error:.3g} against the others")
            if graph:
                calls = [functools.partial(call, *i, causal) for i in inputs]
                figures[name] = time_graph(calls, budget_ms=40).median
            else:
                once = functools.partial(call, *inputs[0], causal)
                figures[name] = time_events(once, budget_ms=40, least=3).median
        except Exception as problem:
            shape = "x".join(map(str, q.shape))
            notes.append(f"attention {name} left out at q {shape}: {str(problem)[:100]}")
    best = min(figures, key=lambda name: figures[name])
    return best, named[best], figures
