"""Groups of assignments that an interrupt cannot split: all are made, or none.

Python handles signals, and so raises KeyboardInterrupt, only between two bytecodes, never inside a function written in
C. A loop in C over C functions has no bytecode in between.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

Result = TypeVar("Result")
_call = operator.methodcaller("__call__")


class Assignments:
    """Collects assignments to items of dictionaries and lists, and then makes all of them at once."""

    def __init__(self) -> None:
        self._containers: list[Any] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []

    def add(self, container: Any, key: Any, value: Any) -> None:
        self._containers.append(container)
        self._keys.append(key)
        self._values.append(value)

    def add_all(self, containers: Sequence[Any], keys: Sequence[Any], values: Sequence[Any]) -> None:
        """`add` for many places. It runs in C, because a step has thousands of them."""
        if not len(containers) == len(keys) == len(values):
            raise ValueError(f"{len(values)} values for {len(containers)} containers and {len(keys)} keys")
        self._containers += containers
        self._keys += keys
        self._values += values

    def add_contents(self, containers: Sequence[Any], contents: Sequence[dict[Any, Any]]) -> None:
        """`add` for each item of ``contents``, which goes into the container at the same place."""
        self._containers += [into for into, items in zip(containers, contents, strict=True) for _ in items]
        self._keys += chain.from_iterable(contents)
        self._values += chain.from_iterable(map(dict.values, contents))

    def attribute(self, owner: object, name: str, value: Any) -> None:
        """Like `add`, for an attribute of an object."""
        self.add(vars(owner), name, value)

    def ready(self) -> Callable[[], object]:
        """`make` as a function that is written in C, for `call_all`."""
        pairs = map(operator.setitem, self._containers, self._keys, self._values)
        return partial(deque, pairs, 0)

    def make(self) -> None:
        """Assigns everything.

        >>> a, b = {"x": 1}, [2]
        >>> assignments = Assignments()
        >>> assignments.add(a, "x", 3)
        >>> assignments.add(b, 0, 4)
        >>> assignments.make(), a, b
        (None, {'x': 3}, [4])
        """
        self.ready()()
        self._values = []  # the containers have the values now; a reference here would only keep memory


def call_all(functions: Iterable[Callable[[], object]]) -> None:
    """Calls functions that are written in C, such as ``partial(dict.update, a, b)``."""
    deque(map(_call, functions), maxlen=0)


def undone_on_error(work: Callable[[], Result], undo: Callable[[], None]) -> Result:
    """Returns ``work()``. If it raises, calls ``undo`` and raises the error again.

    After Ctrl-C ``undo`` may be called twice, or after ``work`` has just succeeded. So ``undo`` must itself find out
    whether there is something to undo.
    """
    try:
        try:
            return work()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()  # Ctrl-C may have come before the line above was done
        raise
