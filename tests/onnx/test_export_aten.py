"""Converters of aten ops: small traced functions of symbolic sizes, on stock onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from sparsevila_compile import ops
from sparsevila_compile.errors import UserError
from sparsevila_compile.onnx.aten import CONVERTERS
from sparsevila_compile.onnx.canonical import EMITTED
from sparsevila_compile.onnx.export import ExportOptions, check_supported, export_component
from sparsevila_compile.ops import AWQ_LINEAR, W4A8_LINEAR
from sparsevila_compile.program import Program
from sparsevila_compile.trace import trace_function
from tests import tiny
from tests.kernels.compare import assert_close_to
from tests.onnx.stock import session

aten = torch.ops.aten
Call = Callable[..., Any]


class _Function(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor, i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.call(x, i, w)
        return out


def program_of(call: Call) -> Program:
    """One component ``f`` of x, float32 ``[n, 6, m]``, i, int64 ``[n]``, and w, float32 ``[5, 6]``."""
    program = tiny.traced("llava")
    given: dict[str, Any] = {
        "x": (torch.float32, ("n", 6, "m")),
        "i": (torch.int64, ("n",)),
        "w": (torch.float32, (5, 6)),
    }
    component = trace_function("f", _Function(call), given, ("y",), torch.device("cpu"))
    for node in list(component.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # canonicalize removes them
            component.graph.erase_node(node)
    program.components = {"f": component}
    return program


@cache
def checked(name: str) -> frozenset[Any]:
    """Runs a function in ONNX at two sizes and compares; returns the targets in its graph."""
    call = FUNCTIONS[name]
    program = program_of(call)
    component = program.components["f"]
    model = export_component(program, "f", ExportOptions())
    assert {o.name for o in model.graph.output} == {"y"}
    onnx.checker.check_model(model, full_check=True)
    runs = session(model)
    used = [n.name for n in runs.get_inputs()]
    for n, m in ((3, 4), (5, 7)):
        g = torch.Generator().manual_seed(n)
        x = torch.randn((n, 6, m), generator=g)
        i = torch.randint(0, n, (n,), generator=g)
        w = torch.randn((5, 6), generator=g)
        expected = call(x, i, w)
        feeds = {"x": x.numpy(), "i": i.numpy(), "w": w.numpy()}
        out = torch.from_numpy(np.array(runs.run(["y"], {k: feeds[k] for k in used})[0]))
        assert out.dtype == expected.dtype
        if out.is_floating_point():
            assert_close_to(out, expected, 2e-6, f"n={n}")
        else:
            assert expected.unique().numel() > 1
            assert torch.equal(out, expected)
    return frozenset(n.target for n in component.graph.nodes if n.op == "call_function")


def _images(x: torch.Tensor) -> torch.Tensor:
    return (x.mean(-1)[:, :, None] * x.amax(-1)[:, None])[:, None]


def _kernels(w: torch.Tensor) -> torch.Tensor:
    return w.reshape(5, 1, 2, 3)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """As a decoder does with its queries, keys and values."""
    q, k = torch.split(x.transpose(1, 2), [4, 2], -1)
    shape = (x.shape[0], x.shape[2], -1, 2)
    return q.view(shape) * k.view(shape)


FUNCTIONS: dict[str, Call] = {
    "arithmetic": lambda x, i, w: (2 * x + 1 - x / 3) * (x - 0.5) / (x * x + 1),
    "mixed types": lambda x, i, w: x * i[:, None, None] + i[:, None, None],
    "integers": lambda x, i, w: i * 3 + 1 - i,
    "signs": lambda x, i, w: torch.relu(x) - torch.sigmoid(-x) + torch.tanh(x),
    "powers": lambda x, i, w: torch.rsqrt(x.pow(2) + 1) + torch.sqrt(x.pow(2) + 2) + torch.exp(-x),
    "reciprocal": lambda x, i, w: torch.reciprocal(x * x + 1),
    "waves": lambda x, i, w: torch.cos(x) * torch.sin(2 * x),
    "activations": lambda x, i, w: F.silu(x) + F.gelu(x) * F.gelu(x, approximate="tanh"),
    "comparisons": lambda x, i, w: torch.where(x < 0.1, -1.0, x) + torch.where(x >= 0.5, x, 2.0),
    "more comparisons": lambda x, i, w: torch.where((x > 0) == (x <= 1), x, 3 * x),
    "tensor comparisons": lambda x, i, w: torch.where(x.sin() < x, x, 2 * x),
    "counts": lambda x, i, w: (x < 0).to(torch.int64).sum(1),
    "equal": lambda x, i, w: torch.where(i == 1, 5, i),
    "clamp": lambda x, i, w: x.clamp_min(0.2),
    "clamp integers": lambda x, i, w: i.clamp_min(1),
    "reductions": lambda x, i, w: (
        x.mean(-1, keepdim=True) + x.amax(1)[:, None, :1] * x.sum((1, 2))[0]
    ),
    "softmax": lambda x, i, w: torch.softmax(x, 1),
    "argsort": lambda x, i, w: torch.argsort(x, dim=1) + torch.argsort(x, dim=1, descending=True),
    "norm": lambda x, i, w: F.layer_norm(x.transpose(1, 2), (6,), w[0], w[1], 1e-3),
    "norm without bias": lambda x, i, w: F.layer_norm(x.transpose(1, 2), (6,), w[0]),
    "linear": lambda x, i, w: F.linear(x.transpose(1, 2), w, w[:, 0]),
    "products": lambda x, i, w: x.transpose(1, 2) @ x + torch.bmm(x.transpose(1, 2), x),
    "embedding": lambda x, i, w: F.embedding(i, w),
    "picking": lambda x, i, w: x[i] + x.index_select(0, i) + x[:, i.clamp_min(0) * 0, :][:, :1],
    "gather": lambda x, i, w: x.gather(1, i[:, None, None].expand(-1, 1, x.shape[2])),
    "select": lambda x, i, w: x.select(1, 2) + x.select(1, -1) + x[:, x.shape[1] - 2],
    "slices": lambda x, i, w: x[:, 1:5] + x[:, -4:] + x[:, : 6 - 2] + x[:, :8:1][:, ::2][:, :1],
    "symbolic slices": lambda x, i, w: (
        torch.cat([x, 2 * x], 2)[:, :, x.shape[2] :] + torch.cat([x, x], 2)[:, :, : x.shape[2]]
    ),
    "shapes": lambda x, i, w: x.reshape(x.shape[0], 2, -1).flatten(1) + x.flatten(1, 2),
    "flatten": lambda x, i, w: x.flatten(0, 1).flatten() * 2,
    "views": lambda x, i, w: x.unsqueeze(1).view(-1, 3, 2, x.shape[2]).squeeze(0),
    "expand": lambda x, i, w: x[:, :1].expand(-1, 4, -1) + x[:, :1].expand(x.shape[0], 4, -1),
    "orders": lambda x, i, w: x.permute(2, 0, 1).transpose(0, -1).contiguous().clone(),
    "cat": lambda x, i, w: torch.cat([x, x[:, :2], i[:, None, None].expand(-1, 1, x.shape[2])], 1),
    "split": lambda x, i, w: torch.split(x, [1, 2, 3], 1)[2] * torch.split(x, [1, 2, 3], 1)[0],
    "split by heads": lambda x, i, w: _heads(x),
    "unbind": lambda x, i, w: torch.unbind(x, 1)[3] - torch.unbind(x, 1)[1],
    "arange": lambda x, i, w: x + torch.arange(x.shape[2], device=x.device),
    "casts": lambda x, i, w: (
        (x * 3).to(torch.int32).to(torch.float32) + i.to(torch.float32)[:, None, None]
    ),
    "sizes": lambda x, i, w: x.reshape(x.shape[0] * x.shape[2], 6),
    "more sizes": lambda x, i, w: torch.arange((4 * x.shape[0] - 2) // 3 + x.shape[2] % 3 + 3),
    "rounded up": lambda x, i, w: torch.arange(-(-x.shape[0] // 2) + 2),
    "limits": lambda x, i, w: torch.arange(
        torch.sym_max(x.shape[0], x.shape[2]) + torch.sym_min(x.shape[0], 2 * x.shape[2])
    ),
    "conv": lambda x, i, w: F.conv2d(_images(x), _kernels(w)[..., :2], w[:, 0], stride=(2, 1)),
    "padded": lambda x, i, w: F.conv2d(_images(x), _kernels(w), padding=(1, 2), stride=2),
    "valid": lambda x, i, w: F.conv2d(_images(x), _kernels(w), padding="valid"),
    "same": lambda x, i, w: F.conv2d(_images(x), _kernels(w), padding="same"),
    "3-d": lambda x, i, w: F.conv3d(_images(x)[:, None], _kernels(w)[:, None], stride=(1, 2, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    checked(name)


def test_a_split_by_heads_is_reshaped_once() -> None:
    """And one whose parts have other dims each by itself."""

    def reshapes(call: Call) -> int:
        model = export_component(program_of(call), "f", ExportOptions())
        return sum(n.op_type == "Reshape" for n in model.graph.node)

    def unlike(x: torch.Tensor) -> torch.Tensor:
        q, k = torch.split(x.transpose(1, 2), [4, 2], -1)
        shape = (x.shape[0], x.shape[2], -1)
        return q.view(*shape, 4) * k.view(*shape, 1)[..., :1, :]

    assert reshapes(lambda x, i, w: _heads(x)) == 1
    assert reshapes(lambda x, i, w: unlike(x)) == 2


def test_every_converter_is_tried() -> None:
    """Overloads of one op share a converter."""
    tried = {CONVERTERS[t] for name in FUNCTIONS for t in checked(name)}
    canonical = {*EMITTED, W4A8_LINEAR}
    missing = {t for t, c in CONVERTERS.items() if c not in tried and t not in canonical}
    assert not missing


def test_every_op_of_graphs_has_a_converter() -> None:
    declared = {op for op in vars(ops).values() if isinstance(op, torch._ops.OpOverload)}
    assert len(declared) >= 13
    # Of those two one is refused where it is listed, and one is gone before any other pass.
    assert declared == {*EMITTED, W4A8_LINEAR, AWQ_LINEAR}
    assert declared - {AWQ_LINEAR} <= set(CONVERTERS)


# ------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Call, str]] = {
    "unknown op": (lambda x, i, w: torch.erfinv(x), "no form for the op aten.erfinv.default"),
    "scaled sum": (lambda x, i, w: torch.add(x, x, alpha=2), "a sum with alpha"),
    "bare norm": (lambda x, i, w: F.layer_norm(w, (6,)), "a LayerNorm without a weight"),
    "two indices": (lambda x, i, w: x[i, i.clamp_min(0)], "indexing by several tensors"),
    "complex": (lambda x, i, w: torch.complex(x, x).real, "no form for the op"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused_in_one_line(name: str) -> None:
    call, why = REFUSED[name]
    program = program_of(call)
    with pytest.raises(UserError, match=why) as caught:
        check_supported(program, ExportOptions())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("f/")
