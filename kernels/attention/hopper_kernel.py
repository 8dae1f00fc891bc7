"""The attention kernel for Hopper, in Gluon; :mod:`.hopper` launches it."""

from __future__ import annotations

from typing import no_type_check

from ..gluon_support import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .hopper_parts import (
    allocate,
    barriers_of,
    fetch,
    rescaled,
    scores_of,
    softmax_step,
    store_rows,
)


@gluon.jit
@no_type_check
def _bound(cu, s, segments, rows_total):
    """Where the s-th stretch of rows begins: 0, cu[0], ..., cu[segments], rows_total.

    The segments are the stretches 1 .. segments; the rows of the first and the last see nothing.
    """
    at = gl.load(cu + gl.minimum(gl.maximum(s - 1, 0), segments)).to(gl.int32)
    return gl.where(s == 0, 0, gl.where(s == segments + 2, rows_total, at))


@gluon.jit
@no_type_check
def _stretch(cu, block, segments, rows_total, ROWS: gl.constexpr):
    """The stretch that a block of ROWS rows belongs to: its number, first and end row, own block.

    Stretch s has the blocks from ``_bound(s) // ROWS + s`` on: at least as many as its rows need,
    at most two more, and none is shared with another stretch.
    """
    low = segments * 0
    high = segments + 2
    # Segments are mostly about equal: look near where it would then be.
    guess = (block.to(gl.int64) * ROWS * segments // (rows_total + ROWS * (segments + 1))).to(
        gl.int32
    )
    near = gl.minimum(guess + 3, high)
    if _bound(cu, near, segments, rows_total) // ROWS + near > block:
        high = near
    if _bound(cu, guess, segments, rows_total) // ROWS + guess <= block:
        low = guess
    while high - low > 1:
        middle = (low + high) // 2
        if _bound(cu, middle, segments, rows_total) // ROWS + middle <= block:
            low = middle
        else:
            high = middle
    first = _bound(cu, low, segments, rows_total)
    end = _bound(cu, low + 1, segments, rows_total)
    return low, first, end, block - first // ROWS - low


@gluon.jit
@no_type_check
def _work(
    item, sizes, pointers, segments,
    ROWS: gl.constexpr, N: gl.constexpr, PACKED: gl.constexpr, CACHED: gl.constexpr,
    CAUSAL: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Of one item: batch row, head, share; its first row and where rows end; the key position of
    query 0 and how many queries there are; first and end of the keys.
    """
    items, blocks, heads, rows_total, keys_total, queries, splits = sizes
    cu, q_start, q_lens = pointers
    share = item % splits
    item = item // splits
    if CAUSAL:  # late rows have most keys: all heads of the last block first
        batch_heads = items // (blocks * splits)
        block = blocks - 1 - item // batch_heads
        b_h = item % batch_heads
    else:  # blocks that share keys next to each other
        block = item % blocks
        b_h = item // blocks
        if PACKED:
            # Of few items those without rows come first or last: else some programs get only such.
            spread = items <= 8 * gl.num_programs(0)
            block = gl.where(spread, item // heads, block)
            b_h = gl.where(spread, item % heads, b_h)
    b = b_h // heads
    position = 0
    count = queries
    key_first = 0
    key_end = keys_total
    tile_first = block * ROWS
    row_end = rows_total
    if PACKED:
        stretch, key_first, row_end, own = _stretch(cu, block, segments, rows_total, ROWS)
        inside = (stretch > 0) & (stretch <= segments)
        tile_first = key_first + own * ROWS
        # A stretch may have a block too many.
        key_end = gl.where(inside & (tile_first < row_end), row_end, key_first)
        count = row_end
    if CACHED:
        position = gl.load(q_start + b).to(gl.int32)
        count = gl.minimum(gl.load(q_lens + b).to(gl.int32), queries)
        key_end = gl.minimum(position + count, keys_total)
    if FEW:
        each = (key_end + splits * N - 1) // (splits * N) * N
        key_first = share * each
        key_end = gl.minimum(key_end, key_first + each)
    return b, b_h % heads, share, tile_first, row_end, position, count, key_first, key_end


@gluon.jit
@no_type_check
def _key_ranges(
    first_row, position, count, key_first, key_end, window,
    ROWS: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """[first, end) of the keys that some of ROWS rows sees, and [first, end) of what all see."""
    query = first_row
    last = gl.minimum(first_row + ROWS, count) - 1
    if FEW:  # a block of rows may hold any query
        query = first_row * 0
        last = count - 1
    any_first = last * 0 + key_first
    all_first = any_first
    any_end = last * 0 + key_end
    all_end = any_end
    if CAUSAL:
        any_end = gl.minimum(key_end, position + last + 1)
        all_end = gl.minimum(key_end, position + query + 1)
    if WINDOWED:
        any_first = gl.maximum(position + query - window + 1, key_first)
        all_first = gl.maximum(position + last - window + 1, key_first)
    any_end = gl.where(last < query, any_first, any_end)
    return any_first, any_end, all_first, all_end


@gluon.jit
@no_type_check
def _producer(
    descriptors, tiles, barriers, sizes, pointers, window, segments,
    GROUP: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    D_0: gl.constexpr, D_1: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, CACHED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    FEW: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: per item the queries, then keys and values tile by tile."""
    q_0_desc, q_1_desc, k_0_desc, k_1_desc, v_0_desc, v_1_desc = descriptors
    q_0, q_1, k_0, k_1, v_0, v_1 = tiles
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    items, _blocks, _heads, _rows, _keys, _queries, _splits = sizes
    BYTES: gl.constexpr = N * (D_0 + D_1) * 2
    fetched = 0
    q_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, _share, tile_first, _row_end, position, count, key_first, key_end = _work(
            item, sizes, pointers, segments, 2 * M, N, PACKED, CACHED, CAUSAL, FEW
        )
        first, end, _f, _e = _key_ranges(
            tile_first, position, count, key_first, key_end, window, 2 * M, CAUSAL, WINDOWED, FEW
        )
        for who in gl.static_range(2):
            mbarrier.wait(q_free.index(who), q_phase)
            mbarrier.expect(q_ready.index(who), M * (D_0 + D_1) * 2)
            fetch(
                q_0_desc, q_1_desc, q_0, q_1, q_ready.index(who), who,
                b, h, tile_first + who * M, D_0, D_1,
            )  # fmt: skip
        q_phase = q_phase ^ 1
        for j in range(first, end, N):
            slot = fetched % STAGES
            phase = ((fetched // STAGES) & 1) ^ 1
            fetched += 1
            mbarrier.wait(k_free.index(slot), phase)
            mbarrier.expect(k_ready.index(slot), BYTES)
            fetch(
                k_0_desc, k_1_desc, k_0, k_1, k_ready.index(slot), slot, b, h // GROUP, j, D_0, D_1
            )
            mbarrier.wait(v_free.index(slot), phase)
            mbarrier.expect(v_ready.index(slot), BYTES)
            fetch(
                v_0_desc, v_1_desc, v_0, v_1, v_ready.index(slot), slot, b, h // GROUP, j, D_0, D_1
            )


@gluon.jit
@no_type_check
def _zero_tail(tile, kept, N: gl.constexpr, WIDTH: gl.constexpr):
    """Zero the rows of a tile from ``kept`` on: places of a cache that were never written."""
    LANES: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    tile.store(gl.where((rows < kept)[:, None], tile.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
@no_type_check
def _consumer(
    out, lse, tiles, barriers, sizes, pointers, window, segments, scale,
    WHO: gl.constexpr, GROUP: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    D_0: gl.constexpr, D_1: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, CACHED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    WITH_LSE: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Group WHO of four warps: of each item's 2 * M rows the M from WHO * M on."""
    W_1: gl.constexpr = D_1 if D_1 > 0 else D_0  # of a second part that may not be there
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    LAYOUT_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_0, 16])
    LAYOUT_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W_1, 16])
    P_LAYOUT_0: gl.constexpr = gl.DotOperandLayout(0, LAYOUT_0, 2)
    P_LAYOUT_1: gl.constexpr = gl.DotOperandLayout(0, LAYOUT_1, 2)
    R_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q_0, q_1, k_0, k_1, v_0, v_1 = tiles
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    items, blocks, heads, rows_total, _keys, queries, splits = sizes
    EMPTY: gl.constexpr = float("-inf") if FEW else 0.0
    my_q_0 = q_0.index(WHO).reshape([M, D_0])
    my_q_1 = q_1.index(WHO).reshape([M, W_1])
    zero = gl.full([M, N], 0.0, gl.float32, S_LAYOUT)
    lane = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
    done = 0  # tiles of keys
    q_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, share, tile_first, row_end, position, count, key_first, key_end = _work(
            item, sizes, pointers, segments, 2 * M, N, PACKED, CACHED, CAUSAL, FEW
        )
        any_first, any_end, _f, _e = _key_ranges(
            tile_first, position, count, key_first, key_end, window,
            2 * M, CAUSAL, WINDOWED, FEW,
        )  # fmt: skip
        my_first = tile_first + WHO * M
        _f, _e, all_first, all_end = _key_ranges(
            my_first, position, count, key_first, key_end, window, M, CAUSAL, WINDOWED, FEW
        )
        rows = my_first + gl.arange(0, M, R_LAYOUT)
        query = rows % queries if FEW else rows
        first = rows * 0 + key_first
        end = rows * 0 + key_end
        if CAUSAL:
            end = gl.minimum(end, position + query + 1)
        if WINDOWED:
            first = gl.maximum(first, position + query - window + 1)
        seen = (rows < row_end) & (query < count) & (first < end)
        peak = gl.full([M], float("-inf"), gl.float32, R_LAYOUT)
        total = gl.full([M], 0.0, gl.float32, R_LAYOUT)
        acc_0 = gl.full([M, D_0], 0.0, gl.float32, LAYOUT_0)
        acc_1 = gl.full([M, W_1], 0.0, gl.float32, LAYOUT_1)
        mbarrier.wait(q_ready.index(WHO), q_phase)
        q_phase = q_phase ^ 1
        if any_first < any_end:
            slot = done % STAGES
            phase = (done // STAGES) & 1
            mbarrier.wait(k_ready.index(slot), phase)
            scores = scores_of(
                my_q_0, my_q_1, k_0.index(slot).reshape([N, D_0]), k_1.index(slot).reshape([N, W_1]),
                zero, D_1,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_free.index(slot))
            masked = (any_first < all_first) | (any_first + N > all_end)
            p, rescale, peak, total = softmax_step(
                s, any_first + lane, first, end, masked, peak, total, scale
            )
            weights = gl.convert_layout(p.to(q_0.dtype), P_LAYOUT_0)
            for j in range(any_first + N, any_end, N):
                before, phase_before = slot, phase
                done += 1
                slot = done % STAGES
                phase = (done // STAGES) & 1
                mbarrier.wait(k_ready.index(slot), phase)
                scores = scores_of(
                    my_q_0, my_q_1,
                    k_0.index(slot).reshape([N, D_0]), k_1.index(slot).reshape([N, W_1]),
                    zero, D_1,
                )  # fmt: skip
                mbarrier.wait(v_ready.index(before), phase_before)
                v_tile = v_0.index(before).reshape([N, D_0])
                sum_0 = warpgroup_mma(weights, v_tile, acc_0, is_async=True)
                if D_1 > 0:
                    sum_1 = warpgroup_mma(
                        gl.convert_layout(weights, P_LAYOUT_1),
                        v_1.index(before).reshape([N, W_1]), acc_1, is_async=True,
                    )  # fmt: skip
                s = warpgroup_mma_wait(2 if D_1 > 0 else 1, deps=[scores])
                mbarrier.arrive(k_free.index(slot))
                masked = (j < all_first) | (j + N > all_end)
                p, rescale, peak, total = softmax_step(
                    s, j + lane, first, end, masked, peak, total, scale
                )
                # The weights pass through the wait: else they are computed after it, not meanwhile.
                weights = gl.convert_layout(p.to(q_0.dtype), P_LAYOUT_0)
                if D_1 > 0:
                    acc_0, acc_1, weights = warpgroup_mma_wait(0, deps=[sum_0, sum_1, weights])
                    acc_1 = acc_1 * gl.convert_layout(rescale, gl.SliceLayout(1, LAYOUT_1))[:, None]
                else:
                    acc_0, weights = warpgroup_mma_wait(0, deps=[sum_0, weights])
                mbarrier.arrive(v_free.index(before))
                acc_0 = acc_0 * gl.convert_layout(rescale, gl.SliceLayout(1, LAYOUT_0))[:, None]
            mbarrier.arrive(q_free.index(WHO))
            mbarrier.wait(v_ready.index(slot), phase)
            v_tile = v_0.index(slot).reshape([N, D_0])
            v_tile_1 = v_1.index(slot).reshape([N, W_1])
            if CACHED:
                kept = (any_end - any_first - 1) % N + 1
                if kept < N:
                    _zero_tail(v_tile, kept, N, D_0)
                    if D_1 > 0:
                        _zero_tail(v_tile_1, kept, N, D_1)
            sum_0 = warpgroup_mma(weights, v_tile, acc_0, is_async=True)
            if D_1 > 0:
                sum_1 = warpgroup_mma(
                    gl.convert_layout(weights, P_LAYOUT_1), v_tile_1, acc_1, is_async=True
                )
                acc_0, acc_1 = warpgroup_mma_wait(0, deps=[sum_0, sum_1])
            else:
                acc_0 = warpgroup_mma_wait(0, deps=[sum_0])
            mbarrier.arrive(v_free.index(slot))
            done += 1
        else:
            mbarrier.arrive(q_free.index(WHO))

        inverse = gl.where(seen, 1.0 / total, 0.0)
        b_share = b
        if FEW:
            b_share = share * (items // (blocks * splits * heads)) + b
        out_at = out + (b_share.to(gl.int64) * rows_total * heads + h) * D
        stride = heads * D
        store_rows(out_at, rescaled(acc_0, inverse), my_first, row_end, stride, M, 0, D_0, D)
        if D_1 > 0:
            store_rows(out_at, rescaled(acc_1, inverse), my_first, row_end, stride, M, D_0, D_1, D)
        if WITH_LSE:
            natural = 0.6931471805599453 * (peak * scale + gl.log2(gl.where(seen, total, 1.0)))
            lse_at = lse + (b_share * heads + h).to(gl.int64) * rows_total + rows
            gl.store(lse_at, gl.where(seen, natural, EMPTY), mask=rows < row_end)


@gluon.jit(
    do_not_specialize=[
        "rows_total", "keys_total", "segments", "window", "items", "blocks", "queries",
        "splits",
    ]
)  # fmt: skip
@no_type_check
def flash_kernel(
    q_0_desc, q_1_desc, k_0_desc, k_1_desc, v_0_desc, v_1_desc, out, lse, cu, q_start, q_lens,
    rows_total, keys_total, heads, items, blocks, queries, splits, window, segments, scale,
    GROUP: gl.constexpr, D: gl.constexpr, D_0: gl.constexpr, D_1: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, CACHED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    WITH_LSE: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Items of work: a block of 2 * M rows of one head each. Any number of programs."""
    q_0, k_0, v_0 = allocate(q_0_desc, k_0_desc, v_0_desc, STAGES, 2)
    q_1, k_1, v_1 = q_0, k_0, v_0  # stand for a second part that is not there
    if D_1 > 0:
        q_1, k_1, v_1 = allocate(q_1_desc, k_1_desc, v_1_desc, STAGES, 2)
    barriers = (
        barriers_of(2, 1), barriers_of(2, 1),
        barriers_of(STAGES, 1), barriers_of(STAGES, 2), barriers_of(STAGES, 1), barriers_of(STAGES, 2),
    )  # fmt: skip
    tiles = (q_0, q_1, k_0, k_1, v_0, v_1)
    sizes = (items, blocks, heads, rows_total, keys_total, queries, splits)
    # `out` stands for pointers that are not there: None cannot be handed to other warps.
    pointers = (
        cu if PACKED else out, q_start if CACHED else out, q_lens if CACHED else out
    )  # fmt: skip
    lse_at = lse if WITH_LSE else out
    gl.warp_specialize(
        [
            (_consumer, (
                out, lse_at, tiles, barriers, sizes, pointers, window, segments, scale,
                gl.constexpr(0), GROUP, M, N, D, D_0, D_1, STAGES,
                PACKED, CACHED, CAUSAL, WINDOWED, WITH_LSE, FEW,
            )),
            (_consumer, (
                out, lse_at, tiles, barriers, sizes, pointers, window, segments, scale,
                gl.constexpr(1), GROUP, M, N, D, D_0, D_1, STAGES,
                PACKED, CACHED, CAUSAL, WINDOWED, WITH_LSE, FEW,
            )),
            (_producer, (
                (q_0_desc, q_1_desc, k_0_desc, k_1_desc, v_0_desc, v_1_desc), tiles, barriers,
                sizes, pointers, window, segments,
                GROUP, M, N, D_0, D_1, STAGES, PACKED, CACHED, CAUSAL, WINDOWED, FEW,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
