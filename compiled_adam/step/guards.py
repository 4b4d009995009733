"""Checks that a train step makes before it assigns anything, so that a failure changes nothing."""

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
    """``mx.async_eval``. Raises `Traced` inside another transformation, where the step would assign placeholders."""
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
    """Evaluates the smallest array of each kind, so that a kernel that cannot be compiled raises an error now.

    A later error could not be undone, because the new arrays take the memory of the old ones.
    """
    smallest: dict[Hashable, mx.array] = {}
    for name, array in arrays:
        kind = name.rpartition(".")[2], array.dtype, array.ndim, array.size >= LARGE
        if kind not in smallest or array.size < smallest[kind].size:
            smallest[kind] = array
    evaluate(list(smallest.values()))


def take_out_placeholders(known: Iterable[Place], key: mx.array) -> None:
    """Puts back the ``known`` arrays and the random ``key`` in the places where ``mx.compile`` has put placeholders.

    ``mx.compile`` does this while it traces a function that calls a step. After an error it does not put the arrays
    back. Placeholders cannot be evaluated, so the model would be lost.
    """
    assignments = Assignments()
    for container, index, array in known:
        if not is_evaluated(container[index]):
            assignments.add(container, index, array)
    assignments.make()
    if not is_evaluated(random_state.get()):
        random_state.assign(key)
