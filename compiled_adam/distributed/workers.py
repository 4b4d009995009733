"""Several workers (processes) on one job: they exchange values and errors, through MLX's own communication."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base import InputError, TrainingStopped, differences, fingerprint, is_lost, table, while_handling
from .reduce import packed, sum_arrays
from .watchdog import Watchdog

Group = mx.distributed.Group


def gather(group: Group, value: Any) -> list[Any]:
    """The ``value`` of every worker, by rank. JSON must be able to hold the values.

    If it succeeds, all workers are alive, and no communication has failed so far: a failed connection stays failed.
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
    mx.eval(gathered)  # raises errors of the communication
    return gathered.tolist()


def check_alike(group: Group, what: Mapping[str, Any]) -> None:
    """Raises ValueError on all workers if ``what`` differs on one. The message has a table for each such rank."""
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
    """`check_alike` for package versions, options and every array of the model."""
    packages = {f"package {name}": number for name, number in fingerprint.packages().items()}
    # Options before parameters: other options may be the reason for other parameters.
    check_alike(group, packages | {str(name): value for name, value in settings.items()})
    check_alike(group, fingerprint.of_each(dict(tree_flatten(model.parameters()))))


State = dict[str, dict[str, mx.array]]


def share(group: Group, state: State, keep: Callable[[str, str], bool] = lambda part, path: True) -> State:
    """The union of the ``state`` of all workers (dictionaries of arrays), bit by bit. All must call this function.

    If several workers have an array, the array of the first of them counts. A worker receives the arrays for which
    ``keep(part, path)`` is true. The others are freed, a buffer at a time.
    """
    forms = {
        part: {path: [array.shape, str(array.dtype).removeprefix("mlx.core.")] for path, array in arrays.items()}
        for part, arrays in state.items()
    }
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
            # Every backend has a sum, and adding zeros changes nothing, so a sum sends the array to all.
            mine = state[part][path] if rank == group.rank() else mx.zeros(shape, dtype)
            bits.append(mine.reshape(-1).view(mx.uint8))
        for (part, path), array in zip(some, sum_arrays(bits, group), strict=True):
            _, shape, dtype = places[part, path]
            if keep(part, path):
                # A copy, because a view would keep the whole buffer in memory.
                shared[part][path] = mx.contiguous(array).view(dtype).reshape(shape)
        mx.eval(shared)
    return shared


def first_does(group: Group, function: Callable[[], Any], alone: Callable[[], Any] = nullcontext) -> Any:
    """Calls ``function`` on the first worker, and returns the result (which JSON can hold) on all workers.

    The other workers wait. ``function`` is called only if all workers are alive, inside the context ``alone()``. If it
    raises an error, all workers raise this error.
    """
    gather(group, None)

    def first() -> Any:
        if group.rank() > 0:
            return None
        with alone():
            return function()

    return gather(group, all_do(group, first))[0]


# Errors about input, options or files, which all workers raise. Other errors end one worker, and then the others.
_TOLD = (InputError, OSError, ValueError, TypeError)


def all_do(group: Group, function: Callable[[], Any]) -> Any:
    """Calls ``function`` on every worker, and returns the result of this worker. If one raises, all raise."""
    value, error, failure = None, None, None
    try:
        value = function()
    except _TOLD as caught:
        error = caught
        # The same class on all: a fault of the program must not look like a fault of the input elsewhere.
        failure = [next(i for i, kind in enumerate(_TOLD) if isinstance(caught, kind)), str(caught)]
    failures = gather(group, failure)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, text = failure
            raise _TOLD[kind](text if rank == 0 else f"rank {rank}: {text}")
    return value


class Workers:
    """The workers of a training run, seen from one of them. It also works for a single worker.

    As a context it ends the process if the others are silent for ``timeout`` seconds (see `Watchdog`), and turns MLX's
    errors about lost connections into `TrainingStopped`. ``saved`` is a sentence about the last checkpoint.
    """

    def __init__(self, group: Group, timeout: float) -> None:
        self.group, self.size = group, group.size()
        self.first, self.many = group.rank() == 0, self.size > 1
        self.saved = "nothing was saved"
        self._watchdog = Watchdog(timeout, self._explain)
        self._open = ExitStack()

    def _explain(self) -> str:
        return (
            f"{self.saved}. Read the output of that worker, then start all workers again, with"
            ' resume="auto" or --resume if there is a checkpoint'
        )

    def __enter__(self) -> Workers:
        if self.many:
            self._open.enter_context(self._watchdog)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # When a worker has ended, a launcher sends SIGTERM, maybe while this worker already handles MLX's error, or
        # while it closes: `finally` replaces the SystemExit of both.
        try:
            self._open.close()
        finally:
            if self.many and error is not None and (lost := while_handling(error, is_lost)) is not None:
                raise TrainingStopped(f"another worker has ended ({lost}); {self._explain()}") from lost

    def together(self, function: Callable[[], Any]) -> Any:
        """Returns ``function()``. Other workers may take long in it."""
        with self._watchdog.patient():
            return function()

    def beat(self) -> None:
        """Tells the watchdog that a step has finished, so the other workers are alive."""
        self._watchdog.beat()

    def check_alike(self, what: Mapping[str, Any]) -> None:
        if self.many:
            check_alike(self.group, what)

    def first_does(self, function: Callable[[], Any]) -> Any:
        """The function `first_does` with a long time limit."""
        return self.together(lambda: first_does(self.group, function, self._watchdog.busy))

    def all_do(self, function: Callable[[], Any]) -> Any:
        """The function `all_do` with a long time limit."""
        return self.together(lambda: all_do(self.group, function))

    def share(self, state: State, keep: Callable[[str, str], bool]) -> State:
        """The function `share` with a long time limit. A single worker gets ``state`` back."""
        return self.together(lambda: share(self.group, state, keep)) if self.many else state

    def mean_steps(self, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of steps, with ``loss`` and ``tokens`` combined over all workers, in one communication."""
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
