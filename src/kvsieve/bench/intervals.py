"""Intervals of measured shares, and of their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.96
"""Two-sided 95 %."""


def wilson(right: int, asked: int, z: float = Z) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share.

    Raises:
        ValueError: nothing was asked.
    """
    if asked < 1:
        raise ValueError("A share of nothing has no interval.")
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    # Rounding must not put a share of 0 or 1 outside its own interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def share(marks: Sequence[int | bool]) -> dict[str, float]:
    """Return score, low and high of the share of marks that are 1."""
    right = sum(map(int, marks))
    low, high = wilson(right, len(marks))
    return {"score": right / len(marks), "low": low, "high": high}


def paired_difference(right: Sequence[int], full: Sequence[int]) -> dict[str, float]:
    """Return mean, low and high of the share right minus the full cache's, on the same prompts.

    With b prompts right here alone and c there alone, of n: mean = (b - c) / n. The 95 % interval
    adds half a prompt to each of the four kinds (Agresti and Min, 2005): b' = b + .5, c' = c + .5,
    n' = n + 2, (b' - c') / n' +- z sqrt(b' + c' - (b' - c')^2 / n') / n'. It has a width even where
    no answer differs.

    Raises:
        ValueError: no prompts, or other ones on the two sides.
    """
    if len(right) != len(full) or not right:
        raise ValueError("A paired difference needs the same prompts on both sides.")
    gained = sum(1 for a, b in zip(right, full, strict=True) if a > b)
    lost = sum(1 for a, b in zip(right, full, strict=True) if a < b)
    mean = (gained - lost) / len(right)
    n, apart = len(right) + 2, gained - lost
    half = Z * math.sqrt(gained + lost + 1 - apart * apart / n) / n
    low, high = max(-1.0, apart / n - half), min(1.0, apart / n + half)
    return {"mean": mean, "low": min(mean, low), "high": max(mean, high)}
