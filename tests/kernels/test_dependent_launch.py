"""Programmatic dependent launch: where it is used, and that nothing is read too early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevila_compile.kernels import dependent_launch
from sparsevila_compile.kernels.add_rms_norm import triton as add_rms_norm
from sparsevila_compile.kernels.dependent_launch import launch_options
from sparsevila_compile.kernels.rotary import triton as rotary
from sparsevila_compile.kernels.silu_mul import triton as silu_mul

CUDA = torch.device("cuda")


def test_not_without_a_gpu() -> None:
    assert launch_options(torch.device("cpu")) == {"EARLY": False}


@pytest.mark.parametrize("capability, early", [((8, 0), False), ((8, 9), False), ((9, 0), True)])
def test_from_hopper_on(
    capability: tuple[int, int], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependent_launch, "interpreting", lambda: False)
    monkeypatch.setattr(dependent_launch, "_CAPABLE", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    options = launch_options(CUDA)
    assert options == ({"EARLY": True, "launch_pdl": True} if early else {"EARLY": False})


def _constants(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    g = torch.Generator(device=x.device).manual_seed(1)
    width = x.shape[-1]
    weight = torch.randn(width, width, device=x.device, generator=g).to(x.dtype) / width**0.5
    angles = torch.randn(*x.shape[:2], 128, device=x.device, generator=g)
    return weight, torch.ones_like(weight[0]), angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _chain(x: torch.Tensor, constants: tuple[torch.Tensor, ...], layers: int) -> torch.Tensor:
    """Kernels that each need the one before, matrix products of another library between them."""
    weight, ones, cos, sin = constants
    h = x
    for _ in range(layers):
        x, h = add_rms_norm.add_rms_norm_triton(x, h, ones, 1e-6)
        heads = x.unflatten(-1, (-1, 128))
        q, k = rotary.rotary_triton(heads, heads, cos, sin)
        x = silu_mul.silu_mul_triton(q, k).transpose(1, 2).flatten(2) @ weight
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 700])
def test_early_starts_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a replayed CUDA graph, too: 100 replays give the bits of kernels that start in turn."""
    if not launch_options(CUDA)["EARLY"]:
        pytest.skip("this GPU has no programmatic dependent launch")
    x = torch.randn(rows, 1, 3584, device=CUDA, dtype=torch.bfloat16)
    constants = _constants(x)
    early = _chain(x, constants, 8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = _chain(x, constants, 8)

    def in_turn(device: torch.device) -> dict[str, Any]:
        return {"EARLY": False}

    for module in (add_rms_norm, rotary, silu_mul):
        monkeypatch.setattr(module, "launch_options", in_turn)
    wanted = _chain(x, constants, 8)
    assert wanted.float().norm() > 0
    assert torch.equal(early, wanted)
    for _ in range(100):
        replayed.zero_()
        graph.replay()
        assert torch.equal(replayed, wanted)
    assert not torch.equal(wanted.roll(1, -1), wanted)
