"""``select_tokens`` in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


def check_arguments(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor
) -> None:
    """Raise ValueError for wrong ranks or dtypes. Reads no values and no sizes."""
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(
            f"select_tokens: scores is a floating tensor of 1 dim, not {scores.dtype} "
            f"of {scores.dim()}"
        )
    named = {"starts": starts, "lengths": lengths, "keep": keep, "offsets": offsets}
    for name, tensor in named.items():
        if tensor.dim() != 1 or tensor.dtype not in _INTEGERS:
            raise ValueError(f"select_tokens: {name} is an int32 or int64 tensor of 1 dim")


def read_segments(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor, total: int
) -> list[tuple[int, int, int, int]]:
    """(start, length, keep, offset) of every segment, on the host.

    Raises ValueError for segments outside the scores, ``keep`` outside ``[0, length]``, results
    outside ``[0, total)`` and tensors of unequal length.
    """
    check_arguments(scores, starts, lengths, keep, offsets)
    segments = []
    named = (starts.tolist(), lengths.tolist(), keep.tolist(), offsets.tolist())
    if len({len(values) for values in named}) > 1:
        raise ValueError(
            "select_tokens: starts, lengths, keep and offsets have one entry per segment each, "
            f"not {', '.join(str(len(values)) for values in named)}"
        )
    for r, (start, length, kept, offset) in enumerate(zip(*named, strict=True)):
        if start < 0 or length < 0 or start + length > scores.shape[0]:
            raise ValueError(
                f"select_tokens: segment {r} is {start} to {start + length} of "
                f"{scores.shape[0]} scores"
            )
        if not 0 <= kept <= length:
            raise ValueError(f"select_tokens: segment {r} keeps {kept} of {length}")
        if offset < 0 or offset + kept > total:
            raise ValueError(
                f"select_tokens: segment {r} writes {offset} to {offset + kept} of {total}"
            )
        segments.append((start, length, kept, offset))
    return segments


def select_tokens(
    scores: Tensor, starts: Tensor, lengths: Tensor, keep: Tensor, offsets: Tensor, total: int
) -> Tensor:
    """The indices of the highest scores of every segment, in ascending order.

    Segment ``r`` is ``scores[starts[r] : starts[r] + lengths[r]]``; segments may be empty, ragged,
    apart or overlapping. Its ``keep[r]`` highest scores are chosen; of equal scores (0.0 and -0.0
    are equal) the lower index is; NaN ranks below everything, -inf included.

    Args:
        scores: floating ``[T]``, any stride.
        starts, lengths, keep, offsets: int ``[R]``, ``0 <= keep[r] <= lengths[r]``.
        total: length of the result; ``offsets[r] + keep[r] <= total``, and the slots of two
            segments do not overlap.

    Returns:
        int64 ``[total]``: the chosen indices *into scores* at
        ``offsets[r] : offsets[r] + keep[r]``, -1 in every other slot.

    Raises:
        ValueError: a segment or its results out of range. Triton, which never reads these values on
            the host, chooses at most ``lengths[r]`` and touches nothing out of range instead.

    Top-k in place of the quantile of SparseVILA (arXiv 2510.17777, Alg. 2 and 3): they differ on
    ties only, and top-k has a size known beforehand.
    """
    out = torch.full((total,), -1, dtype=torch.int64, device=scores.device)
    for start, length, kept, offset in read_segments(scores, starts, lengths, keep, offsets, total):
        segment = scores[start : start + length]
        missing = segment.isnan()
        # Two stable sorts: first by score, then the NaNs behind all that are none.
        order = segment.masked_fill(missing, 0).sort(descending=True, stable=True).indices
        order = order[missing[order].int().sort(stable=True).indices]
        out[offset : offset + kept] = order[:kept].sort().values + start
    return out
