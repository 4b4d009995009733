"""Which examples are a batch, and in which order batches come, drawn from NumPy's random state as in mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

Members = list[int]  # the indices of the examples in a batch


class Fixed:
    """mlx-lm's batches: the same in each epoch, in a new order. Examples that do not fill a batch are left out."""

    def __init__(self, order: Sequence[int], batch_size: int) -> None:
        starts = range(0, len(order) - batch_size + 1, batch_size)
        self.batches: list[Members] = [list(order[i : i + batch_size]) for i in starts]

    def draw(self, epoch: int) -> list[Members]:
        """The batches of an epoch."""
        return [self.batches[i] for i in np.random.permutation(len(self.batches))]


class Grouped:
    """Batches of similar length: examples in the order of their padded lengths, the longest first, cut into batches.

    Every epoch has the same shapes and each example once. Drawn anew are the order of examples of equal padded length,
    and so the members of batches, and the order of the batches. A rest that does not fill a batch has the shortest
    examples, and is a smaller batch. The first batch of the first epoch has the longest examples.

    Args:
        sizes: the padded length of each example.
        rows: the number of examples in a batch whose longest example has this padded length.
    """

    def __init__(self, sizes: Sequence[int], rows: Callable[[int], int]) -> None:
        self._sizes = np.array(sizes)
        order = np.argsort(-self._sizes, kind="stable")
        self._cuts = [0]
        while self._cuts[-1] < len(order):
            start = self._cuts[-1]
            self._cuts.append(min(start + rows(int(self._sizes[order[start]])), len(order)))
        self.batches = self._cut(order)

    def draw(self, epoch: int) -> list[Members]:
        """The batches of an epoch; 0 is the first one of a run."""
        shuffled = np.random.permutation(len(self._sizes))
        batches = self._cut(shuffled[np.argsort(-self._sizes[shuffled], kind="stable")])
        order = np.random.permutation(len(batches)).tolist()
        if epoch == 0:  # a run whose longest batch does not fit into memory ends at once, and not after an hour
            order.remove(0)
            order.insert(0, 0)
        return [batches[i] for i in order]

    def _cut(self, order: np.ndarray) -> list[Members]:
        return [order[start:end].tolist() for start, end in pairwise(self._cuts)]
