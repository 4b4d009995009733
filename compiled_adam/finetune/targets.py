"""The tokens of an example that the loss is on: all from an offset, or those of several spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]
# The first token that is trained, or (first token, the token after the last) of each span.
Targets = int | Sequence[Span]
Example = tuple[Sequence[int], Targets]


def count(targets: Targets, end: int) -> int:
    """How many tokens are trained in an example that is cut, or ends, at ``end``; the first token of all never is.

    >>> count([(0, 2), (4, 9)], end=6), count(0, end=6), count(9, end=6)
    (3, 5, 0)
    """
    return sum(max(0, min(stop, end) - max(begin, 1)) for begin, stop in _spans(targets, end))


def mask(targets: Targets, end: int, length: int) -> np.ndarray:
    """Which of ``length`` positions are trained in an example that is cut, or ends, at ``end``. Shape (length,), bool.

    >>> mask([(1, 2), (4, 9)], end=6, length=8).astype(int).tolist()
    [0, 1, 0, 0, 1, 1, 0, 0]
    >>> mask(4, end=6, length=8).astype(int).tolist()
    [0, 0, 0, 0, 1, 1, 0, 0]
    """
    trained = np.zeros(length, bool)
    for begin, stop in _spans(targets, end):
        trained[begin : min(stop, end)] = True
    return trained


def _spans(targets: Targets, end: int) -> Sequence[Span]:
    return targets if isinstance(targets, Sequence) else [(targets, end)]
