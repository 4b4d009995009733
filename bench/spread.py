"""Medians, the spread around them, and when a ratio is too noisy to mean anything."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

WIDE, DRIFT = 0.5, 0.15
NOISY = (
    f"noisy: the p10-p90 range of a ratio is wider than {100 * WIDE:.0f} % of it, or its medians over the first and the"
    f" second half of the rounds are more than {100 * DRIFT:.0f} % apart"
)


class Spread(NamedTuple):
    p10: float
    median: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """The deciles are interpolated, so that they exist for few values too."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(deciles[0], statistics.median(values), deciles[-1])


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Within each round, because what slows a round down slows both."""
    return [a / b for a, b in zip(values, reference, strict=True)]


def noisy(values: Sequence[float]) -> bool:
    """Whether ratios, in the order measured, say too little: see `NOISY`. Another run would give another median."""
    p10, median, p90 = spread(values)
    half = len(values) // 2
    if half == 0:
        return True
    first, second = statistics.median(values[:half]), statistics.median(values[half:])
    return p90 - p10 > WIDE * median or abs(first - second) > DRIFT * median
