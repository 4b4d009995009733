"""Padded batches of a data set in mlx-lm's order, with a position that can be saved and restored."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.datasets import CacheDataset

from ..base import InputError
from .options import called
from .targets import Example, mask

Padding = Callable[[int], int]
Batch = tuple[mx.array, ...]


def multiple_of_32(length: int) -> int:
    """mlx-lm's padded length: the next multiple of 32, and one, because the last token is only a target.

    >>> [multiple_of_32(length) for length in (1, 32, 33)]
    [33, 33, 65]
    """
    return 1 + 32 * -(-length // 32)


def geometric(ratio: float) -> Padding:
    """The lengths of `multiple_of_32` that are next to a geometric series: a run sees few shapes.

    The series is 32, 32 ratio, 32 ratio^2, ...; padding adds at most ``ratio - 1`` of a length to mlx-lm's.

    Raises:
        ValueError: the ratio is not from 1.01 to 1000.

    >>> sorted({geometric(1.5)(length) for length in range(1, 1000)})
    [33, 65, 97, 129, 193, 257, 385, 577, 833, 1249]
    """
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 1.01 <= ratio <= 1000:
        raise InputError(
            f"{called('bucket')} is {ratio!r}; the ratio of the lengths must be from 1.01 to 1000, such as 1.25"
        )

    def padded(length: int) -> int:
        size = 32.0
        while multiple_of_32(math.ceil(size)) <= length:
            size *= ratio
        return multiple_of_32(math.ceil(size))

    return padded


class Batches:
    """The batches that ``mlx_lm.tuner.trainer.iterate_batches`` yields, with a `position` that can be restored.

    Examples stand in the data set's own order (sorted by what it calls their length), cut into batches; the order of
    the batches is a permutation for each epoch, drawn from NumPy's global random state as mlx-lm does it.

    Args:
        dataset: items are lists of tokens; or (tokens, offset), where the loss begins at the offset; or (tokens,
            spans), where the loss is on the tokens of each span: a list of (first token, the token after the last).
        batch_size: examples in a batch; what is left over at the end is not used.
        max_seq_length: longer examples are cut, with a warning at the first one.
        loop: whether to go on with the next epoch for ever. Default False.
        seed: of NumPy's random state; None leaves it as it is.
        comm_group: in a group of several processes each takes its part of every batch.
        padding: the padded length for the longest of a batch. Default `multiple_of_32`, as in mlx-lm.

    Each item is (tokens, lengths): int32 of shape (batch, length), and (batch, 2) with offset and end of each. If an
    example has spans, a third array follows: bool of shape (batch, length), whether a token is trained.

    Raises:
        ValueError: fewer examples than the batch size, or a batch size that the processes cannot share evenly.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        max_seq_length: int,
        loop: bool = False,
        seed: int | None = None,
        comm_group: mx.distributed.Group | None = None,
        *,
        padding: Padding = multiple_of_32,
    ) -> None:
        if len(dataset) < batch_size:
            raise InputError(
                f"Dataset must have at least batch_size={batch_size} examples but only has {len(dataset)}; use a"
                f" smaller {called('batch_size')} or more data"
            )
        rank, size = (0, 1) if comm_group is None else (comm_group.rank(), comm_group.size())
        if batch_size % size:
            raise InputError(f"batch_size is {batch_size}; it must be divisible by the {size} processes")
        length = dataset.itemlen if isinstance(dataset, CacheDataset) else lambda i: len(dataset[i][0])
        order = sorted(range(len(dataset)), key=length)
        starts = range(0, len(order) - batch_size + 1, batch_size)
        self.members = [order[i + rank : i + batch_size : size] for i in starts]
        self._dataset, self._longest, self._loop, self._padding = dataset, max_seq_length, loop, padding
        self._warned = False
        if seed is not None:
            np.random.seed(seed)
        self._epoch_start: Any = None
        self._order: np.ndarray | None = None  # drawn when the first batch is asked for, as a generator does it
        self._next = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._order is None or (self._loop and self._next == len(self._order)):
            self._begin_epoch()
        if self._next == len(self.members):
            raise StopIteration
        assert self._order is not None
        members = self.members[self._order[self._next]]
        self._next += 1
        return self._batch(members)

    def _begin_epoch(self) -> None:
        self._epoch_start, self._next = _as_json(np.random.get_state()), 0  # once an epoch, not at every position
        self._order = np.random.permutation(len(self.members))

    def position(self) -> dict[str, Any]:
        """The place in the data set, for JSON. After `restore` of it the same batches follow."""
        return {
            "epoch_start": self._epoch_start,
            "next": self._next,
            "random": _as_json(np.random.get_state()),
            "batches": len(self.members),
        }

    def restore(self, position: Any) -> None:
        """Goes to a `position`, and puts NumPy's random state to what it was there; no batch is made for that.

        If an epoch has another number of batches now (other examples, another batch size), the order that the position
        is in does not exist any more: the next epoch begins, and a warning says so.

        Raises:
            ValueError: ``position`` was not made by `position`. Nothing is changed then.
        """
        found, count = _Position.of(position), len(self.members)
        # Positions of version 0.1 do not say how many batches there were.
        other = found.next > count or found.batches not in (None, count)
        if found.epoch_start is not None and other:
            before = "more" if found.batches is None else found.batches
            warnings.warn(
                f"the checkpoint is at batch {found.next} of an epoch of {before} batches, and an epoch has {count}"
                " now: a new epoch begins",
                stacklevel=2,
            )
        self._epoch_start, self._order, self._next = None, None, 0
        if found.epoch_start is not None and not other:
            np.random.set_state(found.epoch_start)
            self._begin_epoch()
            self._next = found.next
        np.random.set_state(found.random)

    def rows(self) -> Iterator[Example]:
        """Every example of the data set, in its own order: tokens, and offset or spans; tokenizes all of them."""
        return map(self._example, range(len(self._dataset)))

    def forecast(self) -> Forecast:
        """The number of shapes in an epoch, and its padding; tokenizes the whole data set."""
        shapes, tokens, padded = set(), 0, 0
        for members in self.members:
            lengths = [min(len(self._example(i)[0]), self._longest) for i in members]
            shape = self._padded(max(lengths))
            shapes.add(shape)
            tokens += sum(lengths)
            padded += shape * len(lengths)
        return Forecast(len(shapes), padded / tokens - 1)

    def _example(self, index: int) -> Example:
        item = self._dataset[index]
        return (item[0], item[1]) if len(item) == 2 and not isinstance(item[0], numbers.Integral) else (item, 0)

    def _padded(self, longest: int) -> int:
        return min(self._padding(longest), self._longest)

    def _batch(self, members: list[int]) -> Batch:
        examples = [self._example(i) for i in members]
        longest = max(len(tokens) for tokens, _ in examples)
        if longest > self._longest and not self._warned:
            self._warned = True
            warnings.warn(
                f"an example has {longest} tokens; it is cut to max_seq_length={self._longest}, as are all longer ones;"
                " split them beforehand to use all of them",
                stacklevel=3,
            )
        padded = np.zeros((len(members), self._padded(longest)), np.int32)
        lengths, masks = [], []
        for row, (tokens, targets) in zip(padded, examples, strict=True):
            end = min(len(tokens), self._longest)
            row[:end] = tokens[:end]
            lengths.append((0 if isinstance(targets, Sequence) else targets, end))
            masks.append(mask(targets, end, len(row)))
        batch = mx.array(padded), mx.array(lengths)
        # Only where it says more than the lengths: mlx-lm's loss and others take two arrays.
        spans = any(isinstance(targets, Sequence) for _, targets in examples)
        return (*batch, mx.array(np.stack(masks))) if spans else batch


class Forecast(NamedTuple):
    """The shapes of a run that sees its whole data set."""

    traces: int  # different batch shapes
    overhead: float  # padding, as a part of the tokens


class _Position(NamedTuple):
    """A position that `Batches.position` made, checked."""

    epoch_start: Any  # NumPy's random state from which the order was drawn; None before the first batch
    next: int
    random: Any
    batches: int | None

    @classmethod
    def of(cls, position: Any) -> _Position:
        if not isinstance(position, Mapping):
            raise InputError(f"the position in the data is {str(position)[:60]!r}; it must be a mapping")
        start, batches = position.get("epoch_start"), position.get("batches")
        found = cls(start, position.get("next", 0), position.get("random"), batches)
        counts = (found.next,) if batches is None else (found.next, batches)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
            raise InputError(f"the position in the data is batch {found.next!r} of {batches!r}; no such batch exists")
        if start is None and found.next:
            raise InputError(f"the position in the data is batch {found.next} of an epoch that has not begun")
        for state in (found.random, *(() if start is None else (start,))):
            if not _is_state(state):
                raise InputError(f"the position in the data has {str(state)[:60]!r} for a random state of NumPy")
        return found


def _as_json(state: Any) -> list[Any]:
    name, keys, *rest = state
    return [name, keys.tolist(), *rest]


def _is_state(state: Any) -> bool:
    """Whether this is a state that `_as_json` made; NumPy believes some that it cannot draw numbers from."""
    if not isinstance(state, list) or len(state) != 5 or state[0] != "MT19937":
        return False
    _, keys, place, has_gauss, gauss = state
    return (
        isinstance(keys, list)
        and len(keys) == 624
        and all(type(key) is int and 0 <= key < 2**32 for key in keys)
        and type(place) is int
        and 0 <= place <= 624
        and type(has_gauss) is int
        and has_gauss in (0, 1)
        and isinstance(gauss, (int, float))
        and math.isfinite(gauss)
    )
