"""``w4a16_linear``'s kernel for a few rows on Hopper: when it is taken, its sizes, its results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsevila_compile.kernels.gluon_support import HAVE_GLUON
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.stream import LONG, WIDE, stream_tiles, streams
from sparsevila_compile.kernels.w4a16_linear.triton import FEW_ROWS
from tests.kernels.w4a16_cases import (
    assert_right_and_repeatable,
    assert_sums_right,
    at_odd_addresses,
    make_case,
    watched,
)

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from sparsevila_compile.kernels.gluon_support import plain_layout
from sparsevila_compile.kernels.w4a16_linear.stream import stream_tiles
from sparsevila_compile.kernels.w4a16_linear.stream_rows import layouts, stream_rows

def compile_(rows, outputs, groups, dtype):
    tiles = stream_tiles(rows, outputs, groups, 132)
    constants = dict(GROUPS=groups, HAS_BIAS=True, A=tiles.tokens, R=tiles.eights, W=tiles.warps,
                     STAGES=tiles.stages, EARLY=True,
                     **layouts(tiles.tokens, tiles.eights, tiles.warps))
    kinds = {name: f"*{dtype}" for name in ("x", "scales", "bias", "out")}
    block = (tiles.outputs, 256 * tiles.warps // tiles.tokens)
    kinds |= {"zero_points": "*u8"}
    pointers = (*kinds, "stride_xm")
    kinds["codes"] = f"tensordesc<i16{list(block)},{plain_layout(block, 16)!r}>"
    names = stream_rows.arg_names
    signature = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in pointers}
    source = GluonASTSource(stream_rows, signature, constants, aligned)
    options = {"num_warps": tiles.warps}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = done.asm["ptx"]
    print(done.metadata.shared, ptx.count("cp.async.bulk.tensor"), ptx.count("mma.sync"),
          ptx.count("griddepcontrol.wait;"), ptx.count("ld.local"))

compile_(1, 37888, 28, "bf16")
compile_(1, 3584, 148, "bf16")
compile_(1, 2560, 16, "fp16")
compile_(2, 37888, 28, "fp16")
compile_(4, 55296, 40, "bf16")
compile_(8, 55296, 40, "bf16")
"""


@pytest.mark.skipif(not HAVE_GLUON, reason="this Triton has no Gluon")
def test_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for line in run.stdout.splitlines():
        shared, copies, products, waits, spilled = map(int, line.split())
        assert shared <= 113 << 10, "two programs at least must fit a processor"
        assert copies >= 2
        assert products >= 8
        assert waits >= 1
        assert spilled == 0


@pytest.mark.parametrize("outputs", [8, 100, 3584, 37888, 152064])
@pytest.mark.parametrize("groups", [4, 16, 28, 86, 148, 216])
@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 1))
def test_tiles(rows: int, groups: int, outputs: int) -> None:
    tiles = stream_tiles(rows, outputs, groups, 132)
    short = rows == 2 and groups < LONG and outputs >= 8
    taken = groups % 4 == 0 and (rows == 1 or outputs >= WIDE or short)
    assert (tiles is not None) == taken
    if tiles is not None:
        assert tiles.tokens in (1, 2, 4, 8)
        assert tiles.tokens >= rows
        assert tiles.eights >= max(2, tiles.warps)
        assert tiles.outputs <= tiles.share <= outputs
        assert tiles.warps * (8 // tiles.tokens) >= 4, "zero points are copied four at a time"
        assert tiles.stages >= 2


def test_too_few_outputs_for_a_tile() -> None:
    assert stream_tiles(1, 7, 28, 132) is None


def test_not_without_hopper() -> None:
    assert not streams(torch.device("cpu"), torch.bfloat16, 128)


# ---- on a GPU


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call that the kernel took."""
    return watched(monkeypatch, "stream")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "groups", "outputs"),
    [
        (1, 4, 64), (1, 16, 2560), (1, 28, 1001), (1, 28, 4608), (1, 40, 5121), (1, 148, 3584),
        (1, 28, 37888), (2, 28, 37888), (3, 16, 22017), (4, 40, 16384),
        (2, 28, 1000), (5, 28, 37888), (5, 64, 16400), (8, 16, 22016), (8, 40, 22016),
    ],
)  # fmt: skip
def test_triton_streams(
    rows: int,
    groups: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    streamed: list[int],
) -> None:
    case = make_case((rows, 128 * groups), outputs, 128, dtype, device=device, seed=rows)
    assert_right_and_repeatable(case)
    assert set(streamed) == {rows}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
def test_triton_streams_from_odd_addresses(
    rows: int, device: torch.device, streamed: list[int]
) -> None:
    """Stored tensors that begin anywhere, and rows of x further apart than they are long."""
    case = make_case((rows, 2048), WIDE, 128, torch.bfloat16, device=device)
    odd = at_odd_addresses(case)
    assert_sums_right(OP.overload(*odd.args, impl="triton"), odd)
    assert streamed == [rows]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("groups", [1, 3, 86])
def test_triton_other_groups_do_not_stream(
    groups: int, rows: int, device: torch.device, streamed: list[int]
) -> None:
    case = make_case((rows, 128 * groups), 2048, 128, torch.bfloat16, device=device)
    assert_sums_right(OP.overload(*case.args, impl="triton"), case)
    assert not streamed


@pytest.mark.gpu
def test_triton_streams_in_a_chain(device: torch.device) -> None:
    """Products that start before the one that makes their x has ended, captured in a graph."""
    first = make_case((1, 2048), 2048, 128, torch.bfloat16, bias=False, device=device, seed=1)
    second = make_case((1, 2048), 2048, 128, torch.bfloat16, bias=False, device=device, seed=2)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = OP.overload(x, *first.args[1:], impl="triton") / 40
            x = OP.overload(x, *second.args[1:], impl="triton")
            x = OP.overload(x, *first.args[1:], impl="triton") / 1000
        return x

    x = first.x.clone()
    wanted = chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    assert float(wanted.float().norm()) > 0
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, wanted)
