"""The table of a run: how its numbers are written, and which columns fit into a terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from rich.text import Text

WIDTHS = {"iter": 6, "epoch": 6, "loss": 10, "lr": 8, "norm": 8, "tokens/s": 8, "tokens": 7, "memory": 13, "left": 8}
_GAP = "  "
# In this order columns go while a terminal is too narrow. Iteration and loss stay.
_FIRST_TO_GO = ("tokens", "epoch", "memory", "lr", "norm", "left", "tokens/s")


def fitting(width: int, unknown: Collection[str] = ()) -> tuple[str, ...]:
    """The columns of `WIDTHS` that fit side by side into ``width`` characters, without those that are ``unknown``.

    >>> fitting(39)
    ('iter', 'loss', 'tokens/s', 'left')
    """
    shown = [name for name in WIDTHS if name not in unknown]
    for name in _FIRST_TO_GO:
        if sum(WIDTHS[each] + len(_GAP) for each in shown) - len(_GAP) <= width:
            break
        shown = [each for each in shown if each != name]
    return tuple(shown)


def row(cells: Mapping[str, Text], columns: Collection[str]) -> Text:
    """The cells of these columns, aligned at the right; a column without a cell is empty."""
    aligned = []
    for name in columns:
        cell = cells.get(name, Text()).copy()
        cell.pad_left(WIDTHS[name] - cell.cell_len)
        aligned.append(cell)
    return Text(_GAP).join(aligned)


def heading(columns: Collection[str]) -> Text:
    # Two characters at the right of the loss are for the arrow.
    return row({name: Text("loss  " if name == "loss" else name, "bold") for name in columns}, columns)


def loss(value: float) -> str:
    """
    >>> loss(5.66183), loss(123456.0), loss(math.nan)
    ('5.6618', '1.23e+05', 'nan')
    """
    return f"{value:.4f}" if abs(value) < 999 or not math.isfinite(value) else f"{value:.2e}"


def norm(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if 1e-3 <= value < 999 or value == 0 or not math.isfinite(value) else f"{value:.2e}"


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def count(value: float) -> str:
    """
    >>> count(950), count(12345), count(3.2e6)
    ('950', '12.3k', '3.2M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def memory(peak: float, machine: float) -> str:
    """Both in GB.

    >>> memory(0.512, 33.7)
    '0.51/33.7 GB'
    """
    return f"{peak:.2f}/{machine:.3g} GB"


def left(seconds: float | None) -> str:
    """Time as a clock shows it.

    >>> left(None), left(59.6), left(3723), left(400000)
    ('-', '1:00', '1:02:03', '5 days')
    """
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 99:
        return f"{round(hours / 24)} days"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.04), duration(216), duration(9000)
    ('0.0 s', '3.6 min', '2.5 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def plain(info: Mapping[str, Any], epoch: float | None, machine: float, seconds_left: float | None) -> str:
    """A training report as a line for a pipe, with a word beside each number."""
    trained = f"loss {loss(info['train_loss'])}" if info["tokens_per_second"] > 0 else "no targets"
    return (
        f"iter {info['iteration']:>5}  {trained:<12}  lr {rate(info['learning_rate']):<8}"
        f"  norm {norm(info['grad_norm']):<8}  {info['tokens_per_second']:>7,.0f} tokens/s"
        f"  peak {memory(info['peak_memory'], machine)}{'' if epoch is None else f'  epoch {epoch:.2f}'}"
        f"  left {left(seconds_left)}"
    )
