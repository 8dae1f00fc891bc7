"""The attention kernels for Hopper compile without such a GPU, into the instructions they are for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsevila_compile.kernels.gluon_support import HAVE_GLUON

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from sparsevila_compile.kernels.attention import hopper_kernel, hopper_windows
from sparsevila_compile.kernels.gluon_support import shared_layout

POINTERS = {"out": "*bf16", "lse": "*fp32", "cu": "*i32", "q_start": "*i32", "q_lens": "*i32"}

def compile_(kernel, d_0, d_1, m, n, absent=(), **constants):
    def block(length, width):
        shape = [1, 1, length, width]
        return f"tensordesc<bf16{shape},{shared_layout(tuple(shape), torch.bfloat16)!r}>"
    kinds = dict(POINTERS, scale="fp32")
    for name in "qkv":
        kinds[f"{name}_0_desc"] = block(m if name == "q" else n, d_0)
        kinds[f"{name}_1_desc"] = block(m if name == "q" else n, d_1 or 16)
    constants.update(dict.fromkeys(absent), D_0=d_0, D_1=d_1, M=m)
    names = kernel.arg_names
    signature = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    aligned = {(names.index(a),): [["tt.divisibility", 16]]
               for a in POINTERS if signature.get(a, "constexpr") != "constexpr"}
    source = GluonASTSource(kernel, signature, constants, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx = done.asm["ptx"]
    print(done.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"),
          ptx.count("setmaxnreg"))

flags = dict(PACKED=False, CACHED=True, CAUSAL=True, WINDOWED=False, WITH_LSE=False, FEW=False)
compile_(hopper_kernel.flash_kernel, 128, 0, 64, 128, ("cu", "lse"), GROUP=7, D=128, N=128,
         STAGES=2, **flags)
compile_(hopper_windows._windows_kernel, 64, 16, 64, 64, GROUP=1, HEADS=4, D=80, STAGES=2)
"""


@pytest.mark.skipif(not HAVE_GLUON, reason="this Triton has no Gluon")
def test_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (flash_shared, *flash), (windows_shared, *windows) = (
        [int(n) for n in line.split()] for line in run.stdout.splitlines()
    )
    # Two groups of warps, each: scores and sums of one tile (8 products each), twice.
    assert flash[0] == 64
    assert flash[1] >= 4  # queries of two groups, keys, values
    assert flash[2] > 0
    assert flash_shared <= 232448  # what a program may have on Hopper
    assert windows[0] > 0
    assert windows[1] >= 6  # two parts each of queries, keys, values
    assert 3 * windows_shared <= 232448  # three programs share a processor
