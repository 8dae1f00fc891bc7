"""How many tokens a ratio keeps: one rule for pruning, retrieval and reports."""

from __future__ import annotations

from fractions import Fraction


def keep_count(keep_ratio: float, n: int) -> int:
    """``ceil(keep_ratio · n)``, exact for ratios written in decimal (0.1 of 30 is 3, not 4).

    Args:
        keep_ratio: share kept, in (0, 1].
        n: tokens to keep from; 0 keeps 0.
    """
    exact = Fraction(str(keep_ratio)) * n
    return -(-exact.numerator // exact.denominator)
