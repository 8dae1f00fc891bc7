"""Everything this package takes from torch's private modules, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "enable_python_dispatcher",
    "fake_mode_of",
    "fresh_size",
]


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode:
    """The fake mode that the traced values belong to.

    Raises:
        ValueError: none of them is a fake tensor.
    """
    mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    if mode is None:
        raise ValueError("no fake tensor among the values: the graph carries no metadata")
    return mode


def fresh_size(mode: FakeTensorMode, name: str, hint: int) -> int | torch.SymInt:
    """A new symbolic size, of no relation to any other, whose example value is ``hint``."""
    env = mode.shape_env
    if not isinstance(env, ShapeEnv):
        raise ValueError("the graph was traced with static shapes")
    source = ConstantSource(f"__{name}_{len(env.var_to_range)}")
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return env.create_symintnode(symbol, hint=hint, source=source)
