"""How :mod:`.many_rows` deals its tiles out, and whether the library's product would be faster.

Tiles are numbered so that those in work at one time share rows of x and outputs: together these fit
the cache. They are dealt out in rounds, one to a program. Where a last round would leave many programs
idle, its tiles are shared out instead: their groups of channels, one tile after the other, are cut into
equal pieces, and :func:`add_parts` adds those of each tile in the order of the channels.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

from ..gluon_support import gl, gluon
from ..triton_support import cdiv

OUTPUTS = 128
"""Outputs of a tile."""

ROWS = 256
"""Rows of x of a tile, where so many are left."""

BESIDE = 8
"""Blocks of rows of x taken side by side: with 4 x and weight are read again more often, with more x
no longer fits the cache."""

FUSED = True
"""False: the weight is always written out, for the library's product."""

NARROW = True
"""False: tiles of the last block have ROWS rows of x too, however few of them exist."""

SHARING = True
"""False: tiles of an incomplete last round are dealt out whole too."""

# Cycles, fitted to runs on an H200. The library's product takes 1.05 to 1.3 times its operations.
_OF_GROUP = {ROWS: 2220, 128: 1400, 64: 1000}
_START = 7_000
_SHARING = 21_000
_SHARED = 1.04  # how much longer a cycle is when no processor idles: the clock falls
_LIBRARY = 1.15 / 2048  # of a multiplication, on one processor
_WRITTEN = 1.2e-3  # of a weight written out


class Plan(NamedTuple):
    """How the tiles of a product are dealt out."""

    programs: int
    last: int
    """Rows of x of the tiles of the last block: 64, 128 or ROWS."""
    wide: int
    """Blocks of ROWS rows of x; where ``last`` is less than that, a narrower block comes after."""
    columns: int
    """Blocks of OUTPUTS outputs."""
    whole: int
    """Tiles that are dealt out whole, the first ones."""
    shared: int
    """Tiles that are shared out, the last ones."""
    cycles: float
    """What it takes, about."""

    @property
    def beside(self) -> int:
        """Blocks of rows of x taken side by side."""
        return max(1, min(BESIDE, self.wide))


def plan(rows: int, outputs: int, groups: int, multiprocessors: int) -> Plan:
    """The plan for so many rows of x, and a weight of ``outputs`` rows of ``groups`` groups."""
    over = rows % ROWS
    last = ROWS if not (NARROW and over) or over > 128 else 128 if over > 64 else 64
    columns = cdiv(outputs, OUTPUTS)
    wide = cdiv(rows, ROWS) if last == ROWS else rows // ROWS
    narrow = 0 if last == ROWS else columns
    tiles = wide * columns + narrow
    rounds = cdiv(wide * columns, multiprocessors)
    after = max(0, tiles - rounds * multiprocessors)  # narrow ones, programs idle in the last round
    busy = groups * (rounds * _OF_GROUP[ROWS] + cdiv(after, multiprocessors) * _OF_GROUP[last])
    dealt = Plan(min(tiles, multiprocessors), last, wide, columns, tiles, 0, busy + _START)
    shared = 0 if narrow else tiles % multiprocessors
    if not SHARING or not shared:
        return dealt
    even = _OF_GROUP[ROWS] * groups * tiles / multiprocessors
    cycles = _SHARED * (even + _START + _SHARING)
    cut = Plan(multiprocessors, last, wide, columns, tiles - shared, shared, cycles)
    return min(dealt, cut, key=lambda p: p.cycles)


def written_out(rows: int, outputs: int, channels: int, multiprocessors: int) -> float:
    """Cycles, about, of writing the weight out and the library's product."""
    weights = outputs * channels
    return _START + _WRITTEN * weights + _LIBRARY * rows * weights / multiprocessors


@gluon.jit
@no_type_check
def place(tile, wide, columns, beside):
    """Block of rows of x and block of outputs of a tile. The narrow tiles come last."""
    if tile >= wide * columns:
        m = wide
        n = tile - wide * columns
    else:
        start = (tile // (beside * columns)) * beside
        within = tile % (beside * columns)
        size = min(wide - start, beside)
        m = start + within % size
        n = within // size
    return m, n


@gluon.jit
@no_type_check
def share(program, programs, groups, whole, shared):
    """Of a program: groups of the shared tiles from, to; how many whole tiles; how many items."""
    tiles = (whole - program + programs - 1) // programs
    start = program * (shared * groups) // programs
    stop = (program + 1) * (shared * groups) // programs
    items = tiles
    if stop > start:
        items += (stop - 1) // groups - start // groups + 1
    return start, stop, tiles, items


@gluon.jit
@no_type_check
def item(i, program, programs, groups, whole, start, stop, tiles):
    """Tile, and its groups from, to: whole tiles, then at most two pieces of shared ones."""
    tile = program + i * programs
    first = 0
    last = groups
    if i >= tiles:
        of_shared = start // groups + i - tiles
        tile = whole + of_shared
        first = max(start - of_shared * groups, 0)
        last = min(stop - of_shared * groups, groups)
    return tile, first, last


@gluon.jit
@no_type_check
def piece(program, programs, groups, shared, of_shared):
    """Whether a program has a piece of a shared tile, given those that may, and its number."""
    start = program * (shared * groups) // programs
    stop = (program + 1) * (shared * groups) // programs
    return stop > start, 2 * program + of_shared - start // groups


@gluon.jit
@no_type_check
def sharers(programs, groups, shared, of_shared):
    """The first and last program that may have a piece of a shared tile."""
    units = shared * groups
    first = ((of_shared * groups + 1) * programs - 1) // units
    last = ((of_shared + 1) * groups * programs - 1) // units
    return first, last


@gluon.jit(
    do_not_specialize=["M", "groups", "whole", "shared", "programs", "wide", "columns", "beside"]
)
@no_type_check
def add_parts(
    parts,  # float32 [2 * programs, 128, ROWS], as many_rows wrote them
    bias,
    out,
    M,
    N,
    groups,
    whole,
    shared,
    programs,  # those of many_rows
    wide,
    columns,
    beside,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """A shared tile's outputs, in the order of the channels: 64 of them by 32 rows of x each."""
    READ: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_shared = gl.program_id(0)
    who = gl.program_id(1) % 2
    within = gl.program_id(1) // 2 * 32
    m_block, n_block = place(whole + of_shared, wide, columns, beside)
    outputs = n_block * 128 + who * 64
    first, last = sharers(programs, groups, shared, of_shared)
    r = who * 64 + gl.arange(0, 64, gl.SliceLayout(1, READ))[:, None]
    c = within + gl.arange(0, 32, gl.SliceLayout(0, READ))[None, :]
    acc = gl.zeros([64, 32], gl.float32, READ)
    for program in range(first, last + 1):
        has, number = piece(program, programs, groups, shared, of_shared)
        if has:
            acc += gl.load(parts + (number * 128 + r) * ROWS + c)
    if HAS_BIAS:
        n = outputs + gl.arange(0, 64, gl.SliceLayout(1, READ))
        acc += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)
    result = gl.convert_layout(acc.to(out.dtype.element_ty).permute(1, 0), STORED)
    m = m_block * ROWS + within + gl.arange(0, 32, gl.SliceLayout(1, STORED))[:, None]
    n = outputs + gl.arange(0, 64, gl.SliceLayout(0, STORED))[None, :]
    gl.store(out + m.to(gl.int64) * N + n, result, mask=(m < M) & (n < N))
