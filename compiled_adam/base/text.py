"""Values as text for people: in one line, and the differences between two mappings as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

Row = tuple[str, str, str]
_MISSING = object()


def shown(value: Any) -> str:
    """A short text for a ``__repr__``. It waits for an array of one number; of other arrays it has dtype and shape.

    A number that is being traced, or cannot be computed, is shown as "?".

    >>> shown({"loss": mx.array(0.25), "logits": mx.zeros((2, 3)), "norm": max, "rates": (1e-3, None)})
    "{'loss': 0.25, 'logits': float32[2, 3], 'norm': max, 'rates': (0.001, None)}"
    """
    if isinstance(value, mx.array):
        if value.ndim:
            return f"{_name(value.dtype)}{list(value.shape)}"
        try:
            return shown(value.item())
        except (RuntimeError, ValueError):
            return "?"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {shown(each)}' for key, each in value.items())}}}"
    if type(value) in (tuple, list):
        items = ", ".join(map(shown, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    return value.__name__ if type(value).__repr__ in _FUNCTIONS else repr(value)


_FUNCTIONS = {type(shown).__repr__, type(len).__repr__}  # their representations have an address


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Row]:
    """A row (name, value in one, value in other) for each name whose values differ. Arrays: only dtype and shape count.

    >>> differences({"a": 1, "b": mx.zeros(2)}, {"b": mx.zeros(3), "c": 2})
    [('a', '1', '-'), ('b', 'float32 (2,)', 'float32 (3,)'), ('c', '-', '2')]
    >>> differences({"rate": 1e-3}, {"rate": 0.0010000001})
    [('rate', '0.001', '0.0010000001')]
    """
    rows = []
    for name in sorted(one.keys() | other.keys()):
        both = [values.get(name, _MISSING) for values in (one, other)]
        here, there = map(_cell, both)
        if here == there and not any(isinstance(value, mx.array) for value in both) and both[0] != both[1]:
            here, there = map(repr, both)  # floats that differ in a late digit
        if here != there:
            rows.append((name, here, there))
    return rows


def table(columns: Row, rows: Sequence[Row], most: int = 20) -> str:
    """Aligned lines: the columns' names, the first ``most`` rows, and how many more there are.

    >>> print(table(("name", "here", "there"), [("eps", "1e-08", "1e-06"), ("decay", "0.1", "0.2")], most=1))
      name  here   there
      eps   1e-08  1e-06
      and 1 more
    """
    cells = [[_printable(cell) for cell in row] for row in (columns, *rows[:most])]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, f"  and {len(rows) - most} more"] if len(rows) > most else lines)


def _printable(cell: str) -> str:
    """The cell as one line that every terminal can show. A name from a damaged file may have any characters."""
    return cell if cell.isprintable() else repr(cell)[1:-1]


def _cell(value: Any) -> str:
    if value is _MISSING:
        return "-"
    if isinstance(value, mx.array):
        return f"{_name(value.dtype)} {value.shape}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_cell, value))}]"
    if isinstance(value, Mapping):
        value = dict(sorted(value.items(), key=str))  # the order means nothing
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
