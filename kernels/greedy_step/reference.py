"""What ``greedy_step`` means."""

from __future__ import annotations

from torch import Tensor


def check_arguments(
    logits: Tensor,
    tokens: Tensor,
    alive: Tensor,
    lens: Tensor,
    positions: Tensor,
    ends: Tensor,
    pad: Tensor,
) -> None:
    """Raise ValueError unless the arguments fit one another. Reads no values."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be a float [B, V], not {logits.dtype} {list(logits.shape)}")
    rows = {"tokens": tokens, "alive": alive, "lens": lens, "positions": positions}
    for name, row in rows.items():
        if row.ndim != 1 or row.shape[0] != logits.shape[0] or row.is_floating_point():
            raise ValueError(
                f"{name} must be an integer [{logits.shape[0]}], not {row.dtype} {list(row.shape)}"
            )
    if ends.ndim != 1 or pad.ndim != 0:
        raise ValueError(f"ends must be [n] and pad [], not {list(ends.shape)}, {list(pad.shape)}")


def greedy_step(
    logits: Tensor,
    tokens: Tensor,
    alive: Tensor,
    lens: Tensor,
    positions: Tensor,
    ends: Tensor,
    pad: Tensor,
) -> None:
    """Count the token that was fed, choose the next of each row, and end rows.

    Rows that are alive: ``lens`` and ``positions`` grow by one, the token with the largest logit
    (the first of equals) is chosen, and the row ends if it is one of ``ends``. Others get ``pad``.

    Args:
        logits: float ``[B, V]``, all finite.
        tokens: int64 ``[B]``; written.
        alive: int32 ``[B]``, 1 for rows that go on, else 0; written.
        lens: int32 ``[B]``; written.
        positions: int64 ``[B]``; written.
        ends: int64 ``[n]``, any n.
        pad: int64, a scalar.

    Raises:
        ValueError: the arguments do not fit one another.
    """
    check_arguments(logits, tokens, alive, lens, positions, ends, pad)
    lens += alive
    positions += alive
    tokens.copy_(logits.argmax(-1).where(alive.bool(), pad))
    alive *= ~(tokens[:, None] == ends).any(1)
