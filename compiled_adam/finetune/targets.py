"""The tokens of an example that the loss is on: all from an offset, or those of several spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]
Targets = (
    int | Sequence[Span]
)  # the first token that is trained, or (first token, the token after the last) of each span
Example = tuple[Sequence[int], Targets]


def mask(targets: Targets, end: int, length: int) -> np.ndarray:
    """Which of ``length`` positions are trained in an example that is cut, or ends, at ``end``. Shape (length,), bool.

    >>> mask([(1, 2), (4, 9)], end=6, length=8).astype(int).tolist()
    [0, 1, 0, 0, 1, 1, 0, 0]
    >>> mask(4, end=6, length=8).astype(int).tolist()
    [0, 0, 0, 0, 1, 1, 0, 0]
    """
    trained = np.zeros(length, bool)
    for begin, stop in targets if isinstance(targets, Sequence) else [(targets, end)]:
        trained[begin : min(stop, end)] = True
    return trained
