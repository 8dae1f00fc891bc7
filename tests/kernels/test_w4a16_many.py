"""``w4a16_linear``'s kernel for many rows on Hopper: when it is taken, and its results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsevila_compile.kernels.gluon_support import HAVE_GLUON
from sparsevila_compile.kernels.w4a16_linear import triton as implementation
from sparsevila_compile.kernels.w4a16_linear.many_rows import busy, multiplies
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.triton import MID_ROWS
from tests.kernels.compare import assert_catches_broken, bound_from
from tests.kernels.w4a16_cases import assert_sums_right, make_case

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from sparsevila_compile.kernels.gluon_support import plain_layout, shared_layout
from sparsevila_compile.kernels.w4a16_linear import many_rows as module

for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
    block = (module.ROWS, 64)
    kinds = {name: f"*{kind}" for name in ("scales", "bias", "out")}
    kinds["zero_points"] = "*u8"
    pointers = list(kinds)
    kinds["x"] = f"tensordesc<{kind}{list(block)},{shared_layout(block, dtype)!r}>"
    kinds["codes"] = f"tensordesc<i32[64, 8],{plain_layout((64, 8), 32)!r}>"
    constants = dict(T=module.ROWS, STAGES=5, HAS_BIAS=True)
    names = module.many_rows.arg_names
    signature = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in pointers}
    source = GluonASTSource(module.many_rows, signature, constants, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = done.asm["ptx"]
    print(done.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"),
          ptx.count("ld.local"))
"""


@pytest.mark.skipif(not HAVE_GLUON, reason="this Triton has no Gluon")
def test_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for line in run.stdout.splitlines():
        shared, products, copies, spilled = map(int, line.split())
        assert shared <= 232448, "what a program may have on Hopper"
        assert products >= 32, "two groups of warps, a group of channels each in the loop and after"
        assert copies >= 3
        assert spilled == 0


def test_share_of_the_time_that_is_used() -> None:
    assert busy(256, 128 * 132, 132) == 1
    assert busy(512, 128 * 132, 132) == 1
    assert busy(128, 128 * 132, 132) == 0.5
    assert busy(256, 128 * 133, 132) == pytest.approx(133 / 264)
    assert busy(1024, 37888, 132) > 0.95 > 0.6 > busy(1024, 4608, 132)


def test_not_without_hopper() -> None:
    x, scales = torch.zeros(1024, 256).bfloat16(), torch.ones(128 * 132, 2).bfloat16()
    assert not multiplies(x, scales, 128, 132)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 7, 28])
@pytest.mark.parametrize(("rows", "outputs"), [(1024, 4224), (1000, 16800), (3072, 16801)])
def test_triton_many_rows_in_one_kernel(
    rows: int,
    outputs: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case((rows, 128 * groups), outputs, 128, dtype, device=device, seed=rows)
    calls = []
    real = implementation.multiply

    def spy(x: torch.Tensor, *args: object) -> None:
        calls.append(x.shape[0])
        real(x, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(implementation, "multiply", spy)
    out = OP.overload(*case.args, impl="triton")
    assert rows > MID_ROWS
    assert calls == [rows]
    assert_sums_right(out, case)
    exact = case.exact()
    assert_catches_broken(out, exact, bound_from(case.eager(), exact))
    for _ in range(3):
        assert torch.equal(out, OP.overload(*case.args, impl="triton")), "differs from run to run"
