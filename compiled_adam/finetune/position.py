"""A place in the data, as JSON holds it, and the checks of one that was read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..base import InputError


class Position(NamedTuple):
    """The place that `compiled_adam.finetune.batches.Batches.position` describes."""

    epoch_start: Any  # NumPy's random state from which the epoch was drawn; None before the first batch
    next: int
    random: Any
    batches: int | None  # of an epoch; None in version 0.1
    epoch: int = 0
    group_by_length: bool = False

    @classmethod
    def of(cls, position: Any) -> Position:
        """The ``position``, checked. Raises ValueError for anything else."""
        if not isinstance(position, Mapping):
            raise InputError(f"the position in the data is {str(position)[:60]!r}; it must be a mapping")
        start, batches = position.get("epoch_start"), position.get("batches")
        grouped = position.get("group_by_length", False)
        found = cls(start, position.get("next", 0), position.get("random"), batches, position.get("epoch", 0), grouped)
        counts = (found.next, found.epoch, *(() if batches is None else (batches,)))
        if not all(type(n) is int and n >= 0 for n in counts):
            raise InputError(
                f"the position in the data is batch {found.next!r} of {batches!r} in epoch {found.epoch!r}; no such"
                " batch exists"
            )
        if start is None and found.next:
            raise InputError(f"the position in the data is batch {found.next} of an epoch that has not begun")
        if not isinstance(grouped, bool):
            raise InputError(f"the position in the data has {str(grouped)[:60]!r} for group_by_length")
        for state in (found.random, *(() if start is None else (start,))):
            if not _is_state(state):
                raise InputError(f"the position in the data has {str(state)[:60]!r} for a random state of NumPy")
        return found

    def difference(self, batches: int, group_by_length: bool) -> str | None:
        """What an epoch is now, if the one of this position does not exist any more; None if it does, or never did."""
        if self.epoch_start is None:
            return None
        # Positions of version 0.1 do not say how many batches there were.
        if self.next > batches or self.batches not in (None, batches):
            return f"an epoch has {batches} now"
        if self.group_by_length != group_by_length:
            return f"examples are {'' if group_by_length else 'not '}grouped by length now"
        return None


def as_json(state: Any) -> list[Any]:
    """NumPy's random state as JSON holds it."""
    name, keys, *rest = state
    return [name, keys.tolist(), *rest]


def _is_state(state: Any) -> bool:
    """Whether this is a state that `as_json` made; NumPy believes some that it cannot draw numbers from."""
    if not isinstance(state, list) or len(state) != 5 or state[0] != "MT19937":
        return False
    _, keys, place, has_gauss, gauss = state
    return (
        isinstance(keys, list)
        and len(keys) == 624
        and all(type(key) is int and 0 <= key < 2**32 for key in keys)
        and type(place) is int
        and 0 <= place <= 624
        and has_gauss in (0, 1)
        and isinstance(gauss, (int, float))
        and math.isfinite(gauss)
    )
