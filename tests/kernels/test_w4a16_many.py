"""``w4a16_linear``'s kernel for many rows on Hopper: when it is taken, and its results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsevila_compile.kernels.gluon_support import HAVE_GLUON
from sparsevila_compile.kernels.w4a16_linear import many, many_schedule
from sparsevila_compile.kernels.w4a16_linear.many import multiplies
from sparsevila_compile.kernels.w4a16_linear.many_schedule import (
    item,
    piece,
    place,
    plan,
    share,
    sharers,
    written_out,
)
from sparsevila_compile.kernels.w4a16_linear.op import OP
from sparsevila_compile.kernels.w4a16_linear.triton import MID_ROWS
from tests.kernels.compare import assert_catches_broken, bound_from
from tests.kernels.w4a16_cases import assert_sums_right, make_case, watched

COMPILE = """
import re, subprocess, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from sparsevila_compile.kernels.gluon_support import plain_layout, shared_layout
from sparsevila_compile.kernels.w4a16_linear import many_rows, many_schedule
from sparsevila_compile.kernels.w4a16_linear.many import _STAGES
from sparsevila_compile.kernels.w4a16_linear.many_schedule import ROWS

def compile_(kernel, kinds, **constants):
    names = kernel.arg_names
    signature = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    pointers = [a for a in names if signature[a].startswith("*")]
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in pointers}
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

def disassembled(done):
    # Not asm["sass"], which leaves out what comes twice.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

def overwritten(sass):
    # Registers of products in flight, group by group; those that another instruction writes.
    flying, group, hits = [], set(), 0
    for line in sass.splitlines():
        product = re.search(r"HGMMA\\.64x(\\d+)x16\\S* R(\\d+), R(\\d+), gdesc", line)
        waits = re.search(r"DEPBAR.LE gsb0, 0x(\\d)", line)
        other = re.match(r"[^A-Z@]*(?:@\\S+ +)?([A-Z][A-Z0-9_.]*) R(\\d+),", line)
        if product:
            wide, to, operand = map(int, product.groups())
            group |= {*range(to, to + wide // 2), *range(operand, operand + 4)}
            if "gsb0" in line:
                flying.append(group)
                group = set()
        elif waits:
            flying = flying[len(flying) - int(waits[1]):] if int(waits[1]) else []
        elif other and not other[1].startswith(("ST", "RED", "BAR", "SYNCS")):
            size = 4 if ".128" in other[1] else 2 if ".64" in other[1] or "WIDE" in other[1] else 1
            to = int(other[2])
            hits += any(r in g for g in [*flying, group] for r in range(to, to + size))
    return hits

for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
    def block(rows):
        return f"tensordesc<{kind}{[rows, 64]},{shared_layout((rows, 64), dtype)!r}>"
    kinds = {name: f"*{kind}" for name in ("scales", "bias", "out")}
    kinds.update(zero_points="*u8", parts="*fp32", x=block(ROWS), copied=block(ROWS))
    kinds["codes"] = f"tensordesc<i32[64, 8],{plain_layout((64, 8), 32)!r}>"
    variants = ((ROWS, True), (ROWS, False), (128, True), (64, False))
    for last, copied in variants if kind == "bf16" else variants[2:3]:
        kinds["x_last"] = block(last)
        done = compile_(many_rows.many_rows, kinds, LAST=last, STAGES=_STAGES, HAS_BIAS=True,
                        COPIED=copied)
        ptx, sass = done.asm["ptx"], disassembled(done)
        print(done.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("bulk.tensor"),
              sass.count("DEPBAR.LE gsb0"), sass.count("HGMMA"), sass.count("LDL"), overwritten(sass))
    compile_(many_schedule.add_parts, kinds, ROWS=ROWS, HAS_BIAS=True)
"""


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
        shared, products, copies, waits, issued, spilled, overwritten = map(int, line.split())
        assert shared <= 232448, "what a program may have on Hopper"
        assert products >= 56, "two groups of warps, two groups of channels each in the loop"
        assert copies >= 3
        assert issued == products
        assert waits < issued / 2, "the compiler runs products one by one"
        assert spilled == 0
        assert overwritten == 0, "registers of products in flight"


SHAPES = [(256, 128, 1), (520, 640, 1), (777, 4609, 3), (1024, 3584, 148), (1024, 4608, 28)]
SHAPES += [(1500, 2560, 16), (4096, 9000, 2), (2048, 3584, 5), (300, 200, 43)]


@pytest.mark.skipif(not HAVE_GLUON, reason="this Triton has no Gluon")
@pytest.mark.parametrize("processors", [132, 114, 7])
@pytest.mark.parametrize(("rows", "outputs", "groups"), SHAPES)
def test_every_group_of_every_tile_is_taken_once(
    rows: int, outputs: int, groups: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sharing in (0, -1e12):  # as it likes, and wherever it can
        monkeypatch.setattr(many_schedule, "_SHARING", sharing)
        planned = plan(rows, outputs, groups, processors)
        tiles = planned.whole + planned.shared
        dealt = (groups, planned.whole, planned.shared)
        taken: set[tuple[int, int]] = set()
        pieces: dict[int, list[tuple[int, int]]] = {}
        for p in range(planned.programs):
            start, stop, whole, items = share.fn(p, planned.programs, *dealt)
            assert items - whole <= 2, "a program has room for two parts"
            for i in range(items):
                tile, first, last = item.fn(
                    i, p, planned.programs, groups, planned.whole, start, stop, whole
                )
                assert first < last
                assert (first, last) == (0, groups) or i >= whole
                if i >= whole:
                    pieces.setdefault(tile, []).append((first, 2 * p + i - whole))
                new = {(tile, group) for group in range(first, last)}
                assert not new & taken
                taken |= new
        assert taken == {(tile, group) for tile in range(tiles) for group in range(groups)}
        assert sorted(pieces) == list(range(planned.whole, tiles))
        for tile, parts in pieces.items():
            of_shared = tile - planned.whole
            first, last = sharers.fn(planned.programs, groups, planned.shared, of_shared)
            may = range(first, last + 1)
            found = [piece.fn(p, planned.programs, groups, planned.shared, of_shared) for p in may]
            assert [number for has, number in found if has] == [n for _, n in sorted(parts)]
        shape = (planned.wide, planned.columns, planned.beside)
        places = {place.fn(tile, *shape) for tile in range(tiles)}
        assert len(places) == tiles
        assert {n for _, n in places} == set(range(-(-outputs // 128)))
        narrow = planned.last < many_schedule.ROWS
        assert {m for m, _ in places} == set(range(planned.wide + narrow))
        assert 0 <= planned.wide * many_schedule.ROWS + narrow * planned.last - rows < 128


def test_plan() -> None:
    def parts(rows: int, outputs: int, groups: int) -> tuple[int, int, int]:
        planned = plan(rows, outputs, groups, 132)
        return planned.last, planned.whole, planned.shared

    assert parts(1024, 37888, 28) == (256, 1184, 0)
    assert parts(1024, 3584, 148) == (256, 0, 112), "20 programs idle through 148 groups"
    assert parts(1024, 3584, 28) == (256, 112, 0), "20 programs idle, for 28 groups only"
    assert parts(4096, 3584, 148) == (256, 396, 52)
    assert parts(777, 37888, 28) == (64, 4 * 296, 0)
    assert parts(1024 + 65, 37888, 28)[0] == 128
    assert parts(1024 + 129, 37888, 28)[0] == 256


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_schedule, "SHARING", False)
    assert plan(1024, 3584, 148, 132).shared == 0
    monkeypatch.setattr(many_schedule, "NARROW", False)
    planned = plan(777, 37888, 28, 132)
    assert (planned.last, planned.wide) == (256, 4)


@pytest.mark.parametrize(
    ("rows", "outputs", "channels", "fused"),
    [
        (1024, 37888, 3584, True),
        (1024, 3584, 3584, True),
        (1024, 4608, 3584, False),  # 144 tiles
        (8192, 37888, 3584, True),
        (600, 2048, 2048, False),
    ],
)
def test_the_faster_way(rows: int, outputs: int, channels: int, fused: bool) -> None:
    library = written_out(rows, outputs, channels, 132)
    assert (plan(rows, outputs, channels // 128, 132).cycles <= library) == fused


def test_not_without_hopper() -> None:
    x, scales = torch.zeros(1024, 256).bfloat16(), torch.ones(128 * 132, 2).bfloat16()
    assert not multiplies(x, scales, 128, 132)


def test_not_if_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scales = torch.zeros(1024, 3584).bfloat16(), torch.ones(37888, 28).bfloat16()
    monkeypatch.setattr(many, "hopper_only", lambda device: None)
    assert multiplies(x, scales, 128, 132)
    assert not multiplies(x, scales, 64, 132)
    assert not multiplies(x, scales.half(), 128, 132)
    monkeypatch.setattr(many_schedule, "FUSED", False)
    assert not multiplies(x, scales, 128, 132)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 7, 28])
@pytest.mark.parametrize(
    ("rows", "outputs"),
    [
        (1024, 4608),
        (1024, 3584),
        (777, 4224),  # 64 rows in the last block
        (620, 3000),  # 128
        (1000, 16800),
        (3072, 16801),  # results do not start at multiples of 16 bytes
        (530, 129),
    ],
)
def test_triton_many_rows_in_one_kernel(
    rows: int,
    outputs: int,
    groups: int,
    dtype: torch.dtype,
    sharing: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(
        (rows, 128 * groups), outputs, 128, dtype, bias=groups != 2, device=device, seed=rows
    )
    calls = watched(monkeypatch, "multiply")
    monkeypatch.setattr(many, "written_out", lambda *sizes: float("inf"))
    monkeypatch.setattr(many_schedule, "SHARING", sharing)
    monkeypatch.setattr(many_schedule, "_SHARING", -1e12)  # wherever it can
    out = OP.overload(*case.args, impl="triton")
    assert rows > MID_ROWS
    assert calls == [rows]
    assert_sums_right(out, case)
    exact = case.exact()
    assert_catches_broken(out, exact, bound_from(case.eager(), exact))
    for _ in range(3):
        assert torch.equal(out, OP.overload(*case.args, impl="triton")), "differs from run to run"
