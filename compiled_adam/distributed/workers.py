"""Several processes on one job: what they tell each other beside gradients, through MLX's own communication."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base import InputError, TrainingStopped, differences, fingerprint, table, while_handling
from .reduce import packed, sum_arrays
from .watchdog import Watchdog

Group = mx.distributed.Group


def gather(group: Group, value: Any) -> list[Any]:
    """The ``value`` of every worker, by rank; values are what JSON can hold.

    It is also a proof that all are there, and that no communication failed until now: a connection does not recover.
    """
    if group.size() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = _all_gather(group, mx.array([len(text)], mx.int32))
    padded = text.ljust(max(lengths))
    texts = _all_gather(group, mx.array([list(padded)], mx.uint8))
    return [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]


def _all_gather(group: Group, array: mx.array) -> Any:
    gathered = mx.distributed.all_gather(array, group=group)
    mx.eval(gathered)  # raises an error of the communication
    return gathered.tolist()


def check_alike(group: Group, what: Mapping[str, Any]) -> None:
    """Raises ValueError on every worker if ``what`` is not the same on all, with a table for each rank that differs."""
    found = gather(group, dict(what))
    texts = [json.dumps(each, sort_keys=True) for each in found]
    usual = texts.index(Counter(texts).most_common(1)[0][0])
    tables = [
        f"rank {rank} differs from rank {usual}:\n"
        + table(("what", f"rank {usual}", f"rank {rank}"), differences(found[usual], each))
        for rank, each in enumerate(found)
        if texts[rank] != texts[usual]
    ]
    if tables:
        raise InputError(
            "\n".join(tables) + "\nstart all workers from the same weights, options, data and package versions"
        )


def check_model(group: Group, model: nn.Module, settings: Mapping[str, Any]) -> None:
    """`check_alike` for package versions, options and every array of the model, each by its path."""
    packages = {f"package {name}": number for name, number in fingerprint.packages().items()}
    # Options before parameters: other options may well mean other parameters.
    check_alike(group, packages | {str(name): value for name, value in settings.items()})
    check_alike(group, fingerprint.of_each(dict(tree_flatten(model.parameters()))))


State = dict[str, dict[str, mx.array]]


def share(group: Group, state: State, keep: Callable[[str, str], bool] = lambda part, path: True) -> State:
    """What all workers have together in their ``state``, dictionaries of arrays, bit by bit; all must call this.

    Of what several have it is the first one's that counts. Each gets what it says that it will ``keep(part, path)``;
    what it does not is gone after its buffer.
    """
    forms = {part: {path: _form(array) for path, array in arrays.items()} for part, arrays in state.items()}
    places: dict[tuple[str, str], tuple[int, list[int], mx.Dtype]] = {}
    shared: State = {}
    for rank, theirs in enumerate(gather(group, forms)):
        for part, arrays in theirs.items():
            shared.setdefault(part, {})
            for path, (shape, dtype) in arrays.items():
                places.setdefault((part, path), (rank, shape, getattr(mx, dtype)))
    for some in packed(list(places), [math.prod(shape) * dtype.size for _, shape, dtype in places.values()]):
        bits = []
        for part, path in some:
            rank, shape, dtype = places[part, path]
            # Zero plus anything is that, and a sum is what every backend has.
            mine = state[part][path] if rank == group.rank() else mx.zeros(shape, dtype)
            bits.append(mine.reshape(-1).view(mx.uint8))
        for (part, path), array in zip(some, sum_arrays(bits, group), strict=True):
            _, shape, dtype = places[part, path]
            if keep(part, path):
                # Not a view of the whole buffer, which would stay with it.
                shared[part][path] = mx.contiguous(array).view(dtype).reshape(shape)
        mx.eval(shared)
    return shared


def _form(array: mx.array) -> tuple[tuple[int, ...], str]:
    return array.shape, str(array.dtype).removeprefix("mlx.core.")


def first_does(group: Group, function: Callable[[], Any], alone: Callable[[], Any] = nullcontext) -> Any:
    """What ``function`` returns at the first worker, as JSON can hold it, at all of them, which wait for it.

    It is called if all workers are there, in a context of ``alone``. What it raises is raised at all of them.
    """
    gather(group, None)
    value, error = None, None
    if group.rank() == 0:
        try:
            with alone():
                value = function()
        except _TOLD as caught:
            error = caught
    return _agreed(group, value, error)[0]


def all_do(group: Group, function: Callable[[], Any]) -> Any:
    """What ``function`` returns here; what it raises at any worker is raised at all of them."""
    value, error = None, None
    try:
        value = function()
    except _TOLD as caught:
        error = caught
    _agreed(group, None, error)
    return value


# What is wrong with input, options or files. Other errors end the worker that has them, and so the others.
_TOLD = (InputError, OSError, ValueError, TypeError)


def _agreed(group: Group, value: Any, error: Exception | None) -> list[Any]:
    """The ``value`` of every worker; raises its own error, or else that of the first worker that has one."""
    kind = next((i for i, kind in enumerate(_TOLD) if isinstance(error, kind)), None)
    found = gather(group, [value, None if error is None else [kind, str(error)]])
    if error is not None:
        raise error
    for rank, (_, told) in enumerate(found):
        if told is not None:
            # Of the same kind: a fault of the program at one worker is no user's at the others.
            kind, text = told
            raise _TOLD[kind](text if rank == 0 else f"rank {rank}: {text}")
    return [each for each, _ in found]


def is_lost(error: BaseException) -> bool:
    """Whether an error of MLX, whose backends all raise RuntimeError, means that other workers cannot be reached."""
    return isinstance(error, RuntimeError) and bool(re.search(r"\[(ring|jaccl|nccl|mpi)\]|nccl", str(error), re.I))


class Workers:
    """The workers of a training run, seen from one of them; alone it does everything itself.

    As a context it ends the process if the others are silent for ``timeout`` seconds (see `Watchdog`), and turns MLX's
    errors about lost connections into `TrainingStopped`. ``saved`` says what a new start can go on from.
    """

    def __init__(self, group: Group, timeout: float) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.first, self.many = self.rank == 0, self.size > 1
        self.saved = "nothing was saved"
        self._watchdog = Watchdog(timeout, self._explain)
        self._open = ExitStack()

    def _explain(self) -> str:
        return (
            f"{self.saved}. See what that worker said, then start all workers again, with"
            ' resume="auto" or --resume if there is a checkpoint'
        )

    def __enter__(self) -> Workers:
        if self.many:
            self._open.enter_context(self._watchdog)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._open.close()
        # A launcher sends SIGTERM when a worker has ended, maybe while the error that says so is on its way here.
        if self.many and error is not None and (lost := while_handling(error, is_lost)) is not None:
            raise TrainingStopped(f"another worker has ended ({lost}); {self._explain()}") from lost

    def together(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, in which this worker may wait long for others."""
        with self._watchdog.patient():
            return function()

    def beat(self) -> None:
        """A step was finished: the others are there."""
        self._watchdog.beat()

    def check_alike(self, what: Mapping[str, Any]) -> None:
        if self.many:
            check_alike(self.group, what)

    def first_does(self, function: Callable[[], Any]) -> Any:
        """As `first_does`; the others may wait long."""
        if not self.many:
            return function()
        return self.together(lambda: first_does(self.group, function, self._watchdog.busy))

    def all_do(self, function: Callable[[], Any]) -> Any:
        """As `all_do`."""
        return self.together(lambda: all_do(self.group, function)) if self.many else function()

    def share(self, state: State, keep: Callable[[str, str], bool]) -> State:
        """`share` of what the workers have, in which they may wait long for each other; alone it is ``state``."""
        return self.together(lambda: share(self.group, state, keep)) if self.many else state

    def mean_steps(self, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Entries of steps with the ``loss`` and the ``tokens`` of all workers' parts of the batch, in one call."""
        if not self.many or not entries:
            return list(entries)
        mine = [[e["loss"] * e["tokens"], e["tokens"]] if e["tokens"] > 0 else [0.0, 0.0] for e in entries]
        summed = mx.distributed.all_sum(mx.array(mine, mx.float32), group=self.group)
        mx.eval(summed)
        sums = cast(list[list[float]], summed.tolist())
        return [
            {
                **entry,
                "loss": loss / tokens if tokens else math.nan,
                "tokens": int(tokens) if tokens.is_integer() else tokens,
            }
            for entry, (loss, tokens) in zip(entries, sums, strict=True)
        ]
