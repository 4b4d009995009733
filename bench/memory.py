"""``python -m bench memory``: what each contender allocates during an update, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.table import Table

from .contenders import NOT_MEASURED, Unavailable, selected
from .environment import memory_bytes
from .measure import resources
from .models import Shapes
from .update import Row, columns, filled, needed, number, of_each
from .workloads import DTYPES, arrays, parameter_count


def rows(workloads: Mapping[str, Callable[[], Shapes]], dtypes: list[str], names: list[str]) -> Iterator[Row]:
    """A row for each workload, dtype and contender, one contender at a time."""
    return of_each(workloads, dtypes, lambda shapes, dtype: _rows(shapes, dtype, names))


def _rows(shapes: Shapes, dtype_name: str, names: list[str]) -> list[Row]:
    dtype = DTYPES[dtype_name]
    chosen, left_out = selected(names, dtype)
    size = {"tensors": len(shapes), "parameters": parameter_count(shapes)}
    result: list[Row] = []
    for name in names:
        row: Row = {"dtype": dtype_name, "contender": name, **size}
        result.append(row)
        if name not in chosen:
            row[NOT_MEASURED] = left_out[name]
        elif needed(size["parameters"], dtype, 1) > 0.6 * memory_bytes():
            row[NOT_MEASURED] = f"{size['parameters']:,} parameters are too many here"
        else:
            gradients = arrays(shapes, dtype, 1e-3, seed=1)
            try:
                _, figures = resources(chosen[name], arrays(shapes, dtype, 0.02, seed=0), gradients)
            except Unavailable as error:
                row[NOT_MEASURED] = str(error)
                continue
            row |= {key: figures[key] for key in ("peak_extra_bytes", "state_bytes")}
            row["state_bytes_per_parameter"] = figures["state_bytes"] / size["parameters"]
            row["weight_bytes"] = sum(g.nbytes for g in gradients.values())
    return result


def table(found: list[Row], environment: dict[str, Any]) -> Table:
    result = Table(
        title=f"Memory of one AdamW update, MLX {environment['mlx']}, {environment['device']}",
        caption="state: what the optimizer keeps; extra: allocated by MLX during an update beyond weights, gradients"
        " and state, which only MLX can tell of itself",
    )
    columns(result, "weights MB", "state B/param", "state MB", "extra MB", "extra/weights")
    return filled(result, found, _cells)


def _cells(row: Row) -> list[str]:
    extra = row["peak_extra_bytes"]
    return [
        number(row["weight_bytes"], 1e-6, 1),
        number(row["state_bytes_per_parameter"], 1, 2),
        number(row["state_bytes"], 1e-6, 1),
        number(extra, 1e-6, 1),
        number(None if extra is None else extra / row["weight_bytes"], 1, 2),
    ]
