"""``column_reduce`` in plain torch: the definition, and what runs where Triton cannot."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .arguments import check_arguments, check_sizes, output_groups

SCORES_BYTES = 64 * 2**20
"""Rows are taken in chunks whose float32 scores, all heads together, stay within this."""


def column_reduce(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    q_start: Tensor | None,
    k_lens: Tensor | None,
    columns: Tensor | None,
    row_lse: Tensor | None,
    scale: float,
    causal: bool,
    heads: str,
) -> Tensor:
    """How much weight the chosen rows of an attention give to each key.

    With ``P = softmax(scale * q k^T)`` over *full* rows, ``result[b, g, j]`` is the mean over the
    heads ``h`` of group ``g`` of ``sum_i row_weights[b, i] * P[b, h, i, columns[b, j]]``.

    Args:
        q: ``[B, Hq, M, D]``, any floating dtype and strides.
        k: ``[B, Hkv, N, D]``; query head ``h`` reads key head ``h // (Hq // Hkv)``.
        row_weights: float32 ``[B, M]``. A row of weight 0 is not used: nothing in it, not even NaN,
            reaches the result. None: uniform, ``1 / M``, or one over the length of the row's
            segment.
        cu_seqlens: int ``[n + 1]``, ascending, within ``[0, M]``: segment ``s`` is rows and keys
            ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, and a row attends its own segment only.
            Rows in no segment attend nothing. Needs B = 1, M = N, no ``causal``, no ``k_lens``.
        q_start: int ``[B]``, with ``causal`` only: row ``i`` sits at key position
            ``q_start[b] + i`` and attends the keys up to and with that one.
        k_lens: int ``[B]``, in ``[0, N]``: keys from ``k_lens[b]`` on do not exist and may hold
            anything. None: all N exist.
        columns: int ``[B, V]``, the keys to report, in this order, repeats allowed. Negative
            entries are padding; they and keys that do not exist report 0. None: all N.
        row_lse: float32 ``[B, Hq, M]``, the natural logarithm of the sum of ``exp(scale * q k^T)``
            over *all* keys that the row attends, as the attention's forward has it: then
            ``P = exp(scale * q k^T - row_lse)`` and no second product is needed. Taken as it is: a
            wrong value gives a wrong result. Infinite, of either sign: the row adds nothing. Never
            read where the row's weight is 0. None: computed here.
        heads: ``"mean"`` (G = 1, all heads), ``"kv"`` (G = Hkv, the heads that share a key head)
            or ``"none"`` (G = Hq).

    Returns:
        float32 ``[B, G, V]``. A row that attends nothing adds nothing. Scores, softmax and sums are
        float32 whatever q's dtype. The reference reads ``cu_seqlens``, ``q_start`` and ``k_lens``
        on the host; on CUDA that waits for the device.

    Raises:
        ValueError: arguments that do not fit together; values of ``cu_seqlens`` or ``k_lens`` out
            of range (implementations that never read them on the host clamp ``k_lens`` instead).

    One op for the salience of SparseVILA (arXiv 2510.17777, Alg. 2 and 3), FastV, AdaptInfer and
    SnapKV, which differ in rows, weights and columns alone.
    """
    check_arguments(q, k, row_weights, cu_seqlens, q_start, k_lens, columns, row_lse, causal, heads)
    check_sizes(q, k, row_weights, cu_seqlens, q_start, k_lens, columns, row_lse)
    batch, q_heads, rows, _ = q.shape
    length, groups = k.shape[2], output_groups(q, k, heads)
    starts = [0] * batch if q_start is None else q_start.tolist()
    ends = [length] * batch if k_lens is None else k_lens.tolist()
    if not all(0 <= end <= length for end in ends):
        raise ValueError(f"column_reduce: k_lens {ends} is not within [0, {length}]")

    results = []
    for b in range(batch):
        # Keys past the last row's own position are seen by no row.
        end = max(0, min(ends[b], starts[b] + rows)) if causal else ends[b]
        sums = q.new_zeros((q_heads, length), dtype=torch.float32)
        for first_row, last_row, first_key, last_key in _spans(cu_seqlens, rows, end):
            if row_weights is None:
                weights = sums.new_full((last_row - first_row,), 1 / (last_row - first_row))
            else:
                weights = row_weights[b, first_row:last_row]
            used = weights.nonzero()[:, 0]
            if used.numel() == 0 or first_key == last_key:
                continue
            sums[:, first_key:last_key] = _span_sums(
                q[b, :, first_row + used],
                k[b, :, first_key:last_key],
                weights[used],
                None if row_lse is None else row_lse[b, :, first_row + used],
                starts[b] + used if causal else None,
                scale,
            )
        pooled = sums.view(groups, q_heads // groups, length).mean(1)
        results.append(pooled if columns is None else _gather(pooled, columns[b]))
    if not results:
        width = length if columns is None else columns.shape[1]
        return q.new_zeros((0, groups, width), dtype=torch.float32)
    return torch.stack(results)


def _spans(cu_seqlens: Tensor | None, rows: int, keys: int) -> Iterator[tuple[int, int, int, int]]:
    """First and last row, first and last key (exclusive) of every block of the attention."""
    if cu_seqlens is None:
        if rows:
            yield 0, rows, 0, keys
        return
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > rows:
        raise ValueError(f"column_reduce: cu_seqlens {bounds} does not ascend within [0, {rows}]")
    for first, last in pairwise(bounds):
        if first < last:
            yield first, last, first, last


def _span_sums(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    lse: Tensor | None,
    last_key: Tensor | None,
    scale: float,
) -> Tensor:
    """Weighted column sums per query head, float32 ``[Hq, n]``.

    q ``[Hq, r, D]``, k ``[Hkv, n, D]``, weights ``[r]``; lse ``[Hq, r]`` or None: computed here;
    last_key ``[r]``: the last key that each row sees, or None for all.
    """
    q_heads, rows, _ = q.shape
    keys = k.shape[1]
    keys_t = k.float().transpose(1, 2)
    sums = q.new_zeros((q_heads, keys), dtype=torch.float32)
    step = max(1, SCORES_BYTES // (4 * q_heads * keys))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        known = None if lse is None else lse[:, chunk]
        seen = None if last_key is None else last_key[chunk]
        sums += _chunk_sums(q[:, chunk].float() * scale, keys_t, weights[chunk], known, seen)
    return sums


def _chunk_sums(
    q: Tensor, keys_t: Tensor, weights: Tensor, lse: Tensor | None, last_key: Tensor | None
) -> Tensor:
    """As :func:`_span_sums` for few enough rows; here, and here alone, their scores exist."""
    q_heads, rows, dim = q.shape
    kv_heads, _, keys = keys_t.shape
    # The heads that share a key head become rows of one product: k is never expanded.
    scores = (q.reshape(kv_heads, -1, dim) @ keys_t).view(q_heads, rows, keys)
    if last_key is not None:
        hidden = torch.arange(keys, device=q.device) > last_key[:, None]
        scores.masked_fill_(hidden, float("-inf"))
    if lse is not None:
        scores.sub_(lse.masked_fill(lse == float("-inf"), float("inf"))[:, :, None]).exp_()
        return weights @ scores
    peak = scores.amax(-1, keepdim=True)
    scores.sub_(peak.masked_fill_(peak == float("-inf"), 0.0)).exp_()
    total = scores.sum(-1)
    # A row that attends nothing has a total of 0.
    coefficients = torch.where(total == 0, 0.0, weights / total)
    return (coefficients.unsqueeze(1) @ scores).squeeze(1)


def _gather(pooled: Tensor, columns: Tensor) -> Tensor:
    """``pooled [G, N]`` at ``columns [V]``, 0 where the column is no key."""
    groups, length = pooled.shape
    if length == 0:
        return pooled.new_zeros((groups, columns.shape[0]))
    exists = (columns >= 0) & (columns < length)
    return torch.where(exists, pooled[:, columns.clamp(0, length - 1).long()], 0.0)
