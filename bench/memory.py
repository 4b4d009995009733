"""``python -m bench memory``: how much does each contender allocate during an update, and how much does it keep?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.table import Table

from . import tables
from .contenders import NOT_MEASURED, Unavailable, selected
from .environment import memory_bytes
from .measure import Row, Stage, resources
from .workloads import DTYPES, Shapes, Workloads, arrays, needed, parameter_count


def stages(workloads: Workloads, dtypes: Sequence[str], names: list[str]) -> list[Stage]:
    """A stage for each workload, dtype and contender, one contender at a time."""
    return [
        Stage(f"{workload}, {dtype}, {name}", partial(_rows, workload, shapes(), dtype, name))
        for workload, shapes in workloads.items()
        for dtype in dtypes
        for name in names
    ]


def _rows(workload: str, shapes: Shapes, dtype: str, name: str) -> list[Row]:
    chosen, left_out = selected([name], DTYPES[dtype])
    parameters = parameter_count(shapes)
    row: Row = {"workload": workload, "dtype": dtype, "contender": name}
    row |= {"tensors": len(shapes), "parameters": parameters}
    if name in left_out:
        return [row | {NOT_MEASURED: left_out[name]}]
    if needed(parameters, DTYPES[dtype], 1) > 0.6 * memory_bytes():
        return [row | {NOT_MEASURED: f"{parameters:,} parameters are too many here"}]
    gradients = arrays(shapes, DTYPES[dtype], 1e-3, seed=1)
    try:
        _, figures = resources(chosen[name], arrays(shapes, DTYPES[dtype], 0.02, seed=0), gradients)
    except Unavailable as error:
        return [row | {NOT_MEASURED: str(error)}]
    row |= {key: figures[key] for key in ("peak_extra_bytes", "state_bytes")}
    row["state_bytes_per_parameter"] = figures["state_bytes"] / parameters
    row["weight_bytes"] = sum(g.nbytes for g in gradients.values())
    return [row]


def table(found: list[Row], environment: Row) -> Table:
    made = tables.table(
        f"Memory of one AdamW update, MLX {environment['mlx']}, {environment['device']}",
        "state: what the optimizer keeps; extra: allocated by MLX during an update beyond weights, gradients and state,"
        " which only MLX can tell of itself",
        ("workload", "dtype", "contender"),
        ("weights MB", "state B/param", "state MB", "extra MB", "extra/weights"),
    )
    return tables.filled(made, found, _cells)


def _cells(row: Row) -> list[str]:
    extra = row["peak_extra_bytes"]
    return [
        tables.number(row["weight_bytes"], 1e-6, 1),
        tables.number(row["state_bytes_per_parameter"], 1, 2),
        tables.number(row["state_bytes"], 1e-6, 1),
        tables.number(extra, 1e-6, 1),
        tables.number(None if extra is None else extra / row["weight_bytes"], 1, 2),
    ]
