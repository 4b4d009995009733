"""What the tables of several parts have in common: columns, cells, and rows that could not be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from .contenders import NOT_MEASURED
from .measure import Row


def table(title: str, caption: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table: the first columns are words, the others numbers."""
    made = Table(title=title, caption=caption)
    for name in left:
        made.add_column(name, no_wrap=True)
    for name in right:
        made.add_column(name, justify="right")
    return made


def filled(made: Table, found: list[Row], cells: Callable[[Row], list[str]]) -> Table:
    """A line for each row that was measured, grouped by workload and dtype; then why the others were not."""
    missing: dict[str, list[str]] = {}  # reason -> names, each once
    last: tuple[str, str] | None = None
    for row in found:
        if NOT_MEASURED in row:
            names = missing.setdefault(row[NOT_MEASURED], [])
            names += [name for name in [row["contender"]] if name not in names]
            continue
        where = row["workload"], row["dtype"]
        if last is not None and where != last:
            made.add_section()
        made.add_row(*(where if where != last else ("", "")), row["contender"], *cells(row))
        last = where
    for why, names in missing.items():
        made.add_section()
        made.add_row("not measured", "", f"{names[0] if len(names) == 1 else f'{len(names)} contenders'}: {why}")
    return made


def ratio(row: Row, key: str) -> str:
    if key not in row:
        return "-"
    if row[key] == row[f"{key}_p10"] == row[f"{key}_p90"] == 1:
        return "1"
    text = f"{row[key]:.2f} ({row[f'{key}_p10']:.2f}-{row[f'{key}_p90']:.2f})"
    return f"{text} noisy" if row[f"{key}_noisy"] else text


def number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value * unit:.{digits}f}"


def warning(found: list[Row]) -> str | None:
    """One line when ratios of this run mean nothing; they are marked where they stand."""
    measured = [row for row in found if NOT_MEASURED not in row]
    count = sum(bool(row.get("ratio_noisy") or row.get("compiled_ratio_noisy")) for row in measured)
    if not count:
        return None
    return f"warning: {count} of {len(measured)} rows are noisy; their ratios mean nothing. Measure on a quiet machine."
