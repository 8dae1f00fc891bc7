"""Every op's Triton kernels compile for a GPU, on machines that have none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsevila_compile.kernels.triton_support import HAVE_TRITON

SCRIPT = Path(__file__).with_name("compile_for_gpu.py")
OPS = (
    "add_rms_norm", "attention", "cached_attention", "column_reduce", "greedy_step", "retrieval_attention", "rotary",
    "select_tokens", "silu_mul", "w4a16_linear", "w4a8_linear", "w8a8_linear",
)  # fmt: skip


def compiled(*names: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *names],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels themselves are run")
def test_every_op_compiles() -> None:
    run = compiled()
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {line.split()[0]: int(line.split()[1]) for line in run.stdout.splitlines()}
    assert set(kernels) == set(OPS)
    assert min(kernels.values()) >= 1


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
def test_an_unknown_op_is_an_error() -> None:
    assert compiled("no_such_op").returncode != 0
