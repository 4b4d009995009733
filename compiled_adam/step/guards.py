"""What a train step tries before it assigns anything, so that a failure changes nothing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import mlx.core as mx

from ..base import Assignments, InputError, is_evaluated, random_state
from ..update import LARGE

Place = tuple[Any, Any, mx.array]  # a container, a key, and the array that is there


class Traced(InputError):
    """A step cannot be a part of another transformation."""


def evaluate(*trees: Any) -> None:
    """``mx.async_eval``; in another transformation, which would keep what the step assigns, an error that says so."""
    try:
        mx.async_eval(*trees)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        raise Traced(
            "a train step was called inside mx.compile, or another transformation of MLX; call it outside, because it"
            " is compiled itself. The model is as it was after the last step"
        ) from error


def try_kernels(arrays: Iterable[tuple[str, mx.array]]) -> None:
    """Evaluates the smallest of each kind of array, so that a kernel that cannot be compiled raises.

    Later nothing could be undone: then the old arrays are not there any more, whose memory the new ones take.
    """
    smallest: dict[Hashable, mx.array] = {}
    for name, array in arrays:
        kind = name.rpartition(".")[2], array.dtype, array.ndim, array.size >= LARGE
        if kind not in smallest or array.size < smallest[kind].size:
            smallest[kind] = array
    evaluate(list(smallest.values()))


def take_out_placeholders(known: Iterable[Place], key: mx.array) -> None:
    """Puts back the ``known`` arrays, and the random ``key``, where ``mx.compile`` has put others in their place.

    It does so to trace a function that calls a step, and does not put back what was there after an error. They cannot
    be evaluated: the model would be lost.
    """
    assignments = Assignments()
    for container, index, array in known:
        if not is_evaluated(container[index]):
            assignments.add(container, index, array)
    assignments.make()
    if not is_evaluated(random_state.get()):
        random_state.assign(key)
