"""``w4a16_linear``'s kernel for two to eight rows on Hopper: when it is taken, its sizes, its results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsevila_compile.kernels.gluon_support import HAVE_GLUON
from sparsevila_compile.kernels.w4a16_linear.direct import STEPS, direct_tiles
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.stream import LONG, WIDE
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
from sparsevila_compile.kernels.triton_support import cdiv
from sparsevila_compile.kernels.w4a16_linear.direct import direct_tiles
from sparsevila_compile.kernels.w4a16_linear.direct_rows import direct_rows
from sparsevila_compile.kernels.w4a16_linear.stream_rows import layouts

def compile_(rows, outputs, groups, dtype):
    tiles = direct_tiles(rows, outputs, groups)
    share = tiles.share(groups)
    splits, columns = cdiv(groups, share), tiles.warps * 8 // tiles.tokens
    held = layouts(tiles.tokens, tiles.eights, tiles.warps)
    constants = dict(GROUPS=groups, SHARE=share, FULL=rows == tiles.tokens, AHEAD=tiles.ahead,
                     EVEN=groups == splits * share and share % columns == 0, HAS_BIAS=splits == 1,
                     A=tiles.tokens, R=tiles.eights, W=tiles.warps, EARLY=True,
                     **{k: held[k] for k in ("CODES", "SCALES", "TOKENS")})
    kinds = {name: f"*{dtype}" for name in ("x", "scales", "bias")}
    kinds |= {"qweight": "*i16", "zero_points": "*u8", "out": f"*{dtype}" if splits == 1 else "*fp32"}
    pointers = (*kinds, "stride_xm")
    names = direct_rows.arg_names
    signature = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in pointers}
    source = GluonASTSource(direct_rows, signature, constants, aligned)
    options = {"num_warps": tiles.warps}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = done.asm["ptx"]
    print(done.metadata.shared, ptx.count("mma.sync"), ptx.count("griddepcontrol.wait;"),
          ptx.count("ld.local"), ptx.count("bar.sync"))

compile_(8, 3584, 148, "bf16")
compile_(5, 2048, 86, "fp16")
compile_(4, 3584, 148, "bf16")
compile_(3, 2048, 86, "bf16")
compile_(2, 5120, 216, "bf16")
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_GLUON, reason="this Triton has no Gluon")
def test_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        shared, products, waits, spilled, barriers = map(int, line.split())
        assert shared <= 16 << 10, "shared memory is for the last sums only"
        assert products >= 8
        assert waits >= 1
        assert spilled == 0
        assert barriers <= 4, "none between a load and its use"


@pytest.mark.parametrize("outputs", [8, 100, 3584, 37888, 152064])
@pytest.mark.parametrize("groups", [1, 4, 16, 28, 40, 86, 148, 216])
@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 1))
def test_tiles(rows: int, groups: int, outputs: int) -> None:
    tiles = direct_tiles(rows, outputs, groups)
    if tiles is None:
        return
    assert rows > 1
    assert tiles.tokens in (2, 4, 8)
    assert rows <= tiles.tokens < 2 * rows
    assert tiles.eights % 2 == 0
    assert tiles.outputs <= outputs
    assert 1 <= tiles.steps(groups) <= STEPS
    assert 1 <= tiles.splits <= groups


@pytest.mark.parametrize("groups", [LONG, 86, 148, 216])
@pytest.mark.parametrize("rows", range(2, FEW_ROWS + 1))
def test_takes_long_rows_of_the_weight_only(rows: int, groups: int) -> None:
    for outputs in (2048, 3584, 5120):
        assert direct_tiles(rows, outputs, groups) is not None
        assert direct_tiles(rows, outputs, LONG - 1) is None
    assert direct_tiles(rows, WIDE, groups) is None


# ---- on a GPU


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call that the kernel took."""
    return watched(monkeypatch, "direct")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "groups", "outputs"),
    [
        (2, 64, 1001), (2, 148, 3584), (3, 86, 2049), (4, 86, 2048), (4, 148, 3584), (5, 70, 1003),
        (6, 216, 5120), (7, 65, 4097), (8, 148, 3584), (8, 86, 2048), (8, 64, 33),
    ],
)  # fmt: skip
def test_triton_direct(
    rows: int,
    groups: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    straight: list[int],
) -> None:
    case = make_case((rows, 128 * groups), outputs, 128, dtype, device=device, seed=rows)
    assert_right_and_repeatable(case)
    assert set(straight) == {rows}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 5])
def test_triton_direct_from_odd_addresses(
    rows: int, device: torch.device, straight: list[int]
) -> None:
    """Stored tensors that begin anywhere, and rows of x further apart than they are long."""
    case = make_case((rows, 8448), 600, 128, torch.bfloat16, device=device)
    odd = at_odd_addresses(case)
    assert_sums_right(OP.overload(*odd.args, impl="triton"), odd)
    assert straight == [rows]


@pytest.mark.gpu
def test_triton_direct_in_a_chain(device: torch.device) -> None:
    """Products that start before the one that makes their x has ended, captured in a graph."""
    square = make_case((8, 8192), 8192, 128, torch.bfloat16, bias=False, device=device, seed=1)
    up = make_case((8, 8192), 9216, 128, torch.bfloat16, bias=False, device=device, seed=2)
    down = make_case((8, 9216), 8192, 128, torch.bfloat16, bias=False, device=device, seed=3)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = OP.overload(x, *square.args[1:], impl="triton") / 60
            x = OP.overload(x, *up.args[1:], impl="triton") / 60
            x = OP.overload(x, *down.args[1:], impl="triton") / 60
        return x

    x = square.x.clone()
    wanted = chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    assert bool(wanted.isfinite().all())
    assert float(wanted.float().norm()) > 0
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, wanted)
