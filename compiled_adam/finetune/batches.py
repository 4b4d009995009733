"""Padded batches of a data set, with a position that can be saved and restored."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.datasets import CacheDataset

from ..base import InputError
from .options import called, check_whole
from .order import Fixed, Grouped, Members
from .padding import Padding, multiple_of_32
from .position import Position, as_json
from .targets import Example, count, mask

Batch = tuple[mx.array, ...]


class Batches:
    """The batches of training or validation, with a `position` that can be restored.

    By default these are the batches that ``mlx_lm.tuner.trainer.iterate_batches`` yields. Examples stand in the data
    set's own order (sorted by what it calls their length), cut into batches; the order of the batches is a permutation
    for each epoch, drawn from NumPy's global random state as mlx-lm does it.

    Args:
        dataset: items are lists of tokens; or (tokens, offset), where the loss begins at the offset; or (tokens,
            spans), where the loss is on the tokens of each span: a list of (first token, the token after the last).
        batch_size: examples in a batch. What is left over at the end is not used, unless examples are grouped.
        max_seq_length: longer examples are cut, with a warning at the first one.
        loop: True for training: epochs without end. Default False: one epoch, as for a validation.
        seed: of NumPy's random state; None leaves it as it is.
        comm_group: in a group of several processes each takes its part of every batch.
        padding: the padded length for the longest of a batch. Default `multiple_of_32`, as in mlx-lm.
        group_by_length: with ``loop``: batches of examples of similar length, and every example once in each epoch; see
            `Grouped`. Without ``loop`` the batches stay mlx-lm's, so that validation losses can be compared.
            Default False.
        batch_tokens: with ``loop``: batches are grouped, and have as many examples as fit into this number of
            positions, which is examples times padded length (without the last token, which is only a target).
            Default None: ``batch_size`` examples.

    Each item is (tokens, lengths): int32 of shape (batch, length), and (batch, 2) with offset and end of each. Several
    processes get batches of one shape; a row without an example, whose offset and end are 0, may fill a grouped batch.
    If an example has spans, a third array follows: bool of shape (batch, length), whether a token is trained.

    Raises:
        ValueError: too few examples, a batch size that the processes cannot share evenly, or a batch_tokens into which
            the longest example does not fit.
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
        group_by_length: bool = False,
        batch_tokens: int | None = None,
    ) -> None:
        if batch_tokens is not None:
            check_whole("batch_tokens", batch_tokens)
        self.grouped = loop and (group_by_length or batch_tokens is not None)
        if len(dataset) < (1 if self.grouped else batch_size):
            raise InputError(
                f"Dataset must have at least batch_size={batch_size} examples but only has {len(dataset)}; use a"
                f" smaller {called('batch_size')} or more data"
            )
        self._rank, self._workers = (0, 1) if comm_group is None else (comm_group.rank(), comm_group.size())
        if batch_size % self._workers:
            raise InputError(f"batch_size is {batch_size}; it must be divisible by the {self._workers} processes")
        self._dataset, self._longest, self._loop, self._padding = dataset, max_seq_length, loop, padding
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._warned = False
        if seed is not None:
            np.random.seed(seed)
        self._epoch_start: Any = None
        self._epoch = -1
        self._drawn: list[Members] = []  # drawn when the first batch is asked for, as a generator does it
        self._next = 0
        # Tokens to predict in the last batch, of all processes, to those of an average batch.
        self.share = mx.array(1.0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._next == len(self._drawn):
            if self._epoch >= 0 and not self._loop:
                raise StopIteration
            self._begin_epoch(self._epoch + 1)
        members = self._drawn[self._next]
        self._next += 1
        if self.grouped and self._targets:
            self.share = mx.array(self._count(members) / self._targets, mx.float32)
        return self._batch(members)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch_start = as_json(np.random.get_state())  # once an epoch, not at every position
        self._drawn = self._order.draw(epoch)
        self._epoch, self._next = epoch, 0

    @cached_property
    def _order(self) -> Fixed | Grouped:
        """Made when it is first needed, because lengths need all examples tokenized."""
        if self.grouped:
            return Grouped([self._padded(len(tokens)) for tokens, _ in self.rows()], self._rows_of)
        length = (
            self._dataset.itemlen if isinstance(self._dataset, CacheDataset) else lambda i: len(self._dataset[i][0])
        )
        return Fixed(sorted(range(len(self._dataset)), key=length), self._batch_size)

    @cached_property
    def _targets(self) -> float:
        """The tokens to predict in an average batch."""
        return self._count(range(len(self._dataset))) / self.per_epoch

    def _count(self, members: Iterable[int]) -> int:
        """The tokens to predict in these examples."""
        examples = map(self._example, members)
        return sum(count(targets, min(len(tokens), self._longest)) for tokens, targets in examples)

    def _rows_of(self, padded: int) -> int:
        """The number of examples in a grouped batch, of all processes together."""
        if self._batch_tokens is None:
            return self._batch_size
        positions = padded - 1
        if (rows := self._batch_tokens // (positions * self._workers) * self._workers) == 0:
            each = "" if self._workers == 1 else f" at each of {self._workers} processes"
            raise InputError(
                f"{called('batch_tokens')} is {self._batch_tokens}, but the longest example takes {positions}"
                f" positions{each}; give at least {positions * self._workers}, or a smaller {called('max_seq_length')}"
            )
        return rows

    @property
    def per_epoch(self) -> int:
        """The number of batches in an epoch; tokenizes the whole data set if examples are grouped."""
        return len(self._order.batches)

    def rows_in_epoch(self) -> list[int]:
        """The number of examples in each batch of an epoch, in no special order."""
        return [len(members) for members in self._order.batches]

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have, too, because other batches would come; empty for mlx-lm's batches."""
        tokens = {} if self._batch_tokens is None else {"batch_tokens": self._batch_tokens}
        return {"group_by_length": True, **tokens} if self.grouped else {}

    def position(self) -> dict[str, Any]:
        """The place in the data set, for JSON. After `restore` of it the same batches follow."""
        random, epoch = as_json(np.random.get_state()), max(self._epoch, 0)
        return Position(self._epoch_start, self._next, random, self.per_epoch, epoch, self.grouped)._asdict()

    def restore(self, position: Any) -> None:
        """Goes to a `position`, and puts NumPy's random state to what it was there; no batch is made for that.

        If an epoch has another number of batches now (other examples, another batch size), or examples are grouped in
        another way, the epoch of the position does not exist any more: a new one begins, and a warning says so.

        Raises:
            ValueError: ``position`` was not made by `position`. Nothing is changed then.
        """
        found = Position.of(position)
        if (now := found.difference(self.per_epoch, self.grouped)) is not None:
            before = "more" if found.batches is None else found.batches
            warnings.warn(
                f"the checkpoint is at batch {found.next} of an epoch of {before} batches, and {now}: a new epoch"
                " begins",
                stacklevel=2,
            )
        self._epoch_start, self._drawn, self._epoch, self._next = None, [], -1, 0
        if found.epoch_start is not None and now is None:
            np.random.set_state(found.epoch_start)
            self._begin_epoch(found.epoch)
            self._next = found.next
        np.random.set_state(found.random)

    def rows(self) -> Iterator[Example]:
        """Every example of the data set, in its own order: tokens, and offset or spans; tokenizes all of them."""
        return map(self._example, range(len(self._dataset)))

    def forecast(self) -> Forecast:
        """The number of shapes in an epoch, and its padding; tokenizes the whole data set."""
        shapes, tokens, padded = set(), 0, 0
        for members in self._order.batches:
            lengths = [min(len(self._example(i)[0]), self._longest) for i in members]
            shape = len(members), self._padded(max(lengths))
            shapes.add(shape)
            tokens += sum(lengths)
            padded += shape[0] * shape[1]
        return Forecast(len(shapes), padded / tokens - 1)

    def _example(self, index: int) -> Example:
        item = self._dataset[index]
        return (item[0], item[1]) if len(item) == 2 and not isinstance(item[0], numbers.Integral) else (item, 0)

    def _padded(self, longest: int) -> int:
        # mlx-lm counts the last token, which is only a target. Grouped, the model itself sees at most max_seq_length
        # positions, so that cut examples have a length of the series, too.
        return min(self._padding(min(longest, self._longest)), self._longest + self.grouped)

    def _batch(self, members: Members) -> Batch:
        examples = [self._example(i) for i in members]
        mine, rows = examples[self._rank :: self._workers], -(-len(examples) // self._workers)
        # In mlx-lm each process pads its own part. Grouped, all have one shape, also one without an example.
        longest = max(len(tokens) for tokens, _ in (examples if self.grouped else mine))
        if longest > self._longest and not self._warned:
            self._warned = True
            warnings.warn(
                f"an example has {longest} tokens; it is cut to max_seq_length={self._longest}, as are all longer ones;"
                " split them beforehand to use all of them",
                stacklevel=3,
            )
        padded = np.zeros((rows, self._padded(longest)), np.int32)
        lengths = np.zeros((rows, 2), np.int32)
        masks = np.zeros(padded.shape, bool)
        for row, (tokens, targets) in enumerate(mine):
            end = min(len(tokens), self._longest)
            padded[row, :end] = tokens[:end]
            lengths[row] = 0 if isinstance(targets, Sequence) else targets, end
            masks[row] = mask(targets, end, len(masks[row]))
        batch = mx.array(padded), mx.array(lengths)
        # Only where it says more than the lengths: mlx-lm's loss and others take two arrays.
        spans = any(isinstance(targets, Sequence) for _, targets in examples)
        return (*batch, mx.array(masks)) if spans else batch


class Forecast(NamedTuple):
    """The shapes of a run that sees its whole data set."""

    traces: int  # different batch shapes
    overhead: float  # padding, as a part of the tokens
