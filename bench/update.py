"""``python -m bench update``: how long does one update take, on each workload, ours against the others?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx
from rich.table import Table

from . import apart, measure, tables
from .contenders import COMPILED, EAGER, NOT_MEASURED, SAME, selected
from .environment import memory_bytes
from .measure import NOISY, Row, Stage
from .workloads import DTYPES, Shapes, Workloads, needed, parameter_count


def stages(
    workloads: Workloads,
    dtypes: Sequence[str],
    names: list[str],
    seconds: float,
    bandwidth: dict[str, float],
    times_anew: int = 1,
) -> list[Stage]:
    """One stage that measures the ``bandwidth``, then one for each workload and dtype; its rows are the contenders.

    Each contender is measured in ``times_anew`` processes of its own, for ``seconds`` together.
    """

    def first() -> list[Row]:
        bandwidth.update(measure.bandwidth())
        return []

    return [Stage("memory bandwidth", first)] + [
        Stage(f"{workload}, {dtype}", partial(_rows, workload, shapes(), dtype, names, seconds, times_anew, bandwidth))
        for workload, shapes in workloads.items()
        for dtype in dtypes
    ]


def _rows(
    workload: str,
    shapes: Shapes,
    dtype: str,
    names: list[str],
    seconds: float,
    times_anew: int,
    bandwidth: Mapping[str, float],
) -> list[Row]:
    """A row for each contender; of what cannot be measured here, a row that says why."""
    chosen, left_out = selected(names, DTYPES[dtype])
    size = {"tensors": len(shapes), "parameters": parameter_count(shapes)}
    figures: dict[str, Row] = {name: {NOT_MEASURED: why} for name, why in left_out.items()}
    bytes_needed = needed(size["parameters"], DTYPES[dtype], len(chosen))
    if bytes_needed > 0.6 * memory_bytes():
        why = f"{len(chosen)} contenders need {bytes_needed / 1e9:.1f} GB here; choose fewer with --contender"
        figures |= {name: {NOT_MEASURED: why} for name in chosen}
    else:
        found = measure.compare(
            {name: partial(apart.Apart, name, shapes, dtype) for name in chosen}, seconds, times_anew
        )
        for name, row in found.items():
            figures[name] = row if NOT_MEASURED in row else derived(row, size, DTYPES[dtype], bandwidth["best"])
    place = {"workload": workload, "dtype": dtype}
    return [{**place, "contender": name, **size, **figures[name]} for name in names]


def derived(row: Row, size: dict[str, int], dtype: mx.Dtype, bandwidth: float) -> Row:
    """A row with what follows from it: times and state per parameter, and the share of the bandwidth.

    ``required_bytes`` must move whatever the algorithm: gradients are read, parameters and state read and written.
    """
    required = 3 * size["parameters"] * dtype.size + 2 * row["state_bytes"]
    return row | {
        "ns_per_parameter": 1e6 * row["median_ms"] / size["parameters"],
        "us_per_tensor": 1e3 * row["median_ms"] / size["tensors"],
        "state_bytes_per_parameter": row["state_bytes"] / size["parameters"],
        "required_bytes": required,
        "bandwidth_percent": 100 * required / (1e-3 * row["median_ms"]) / bandwidth,
    }


def table(found: list[Row], environment: Row, bandwidth: Mapping[str, float]) -> Table:
    made = tables.table(
        f"One AdamW update, MLX {environment['mlx']}, {environment['device']}, {environment['cores']} cores",
        f"{SAME}. Each in processes of its own, which take turns. Median over interleaved rounds."
        f" to eager, to compiled: ratio to {EAGER} and {COMPILED},"
        f" median (p10-p90) of the ratios within a round; {NOISY}. bandwidth: bytes that must move (gradients once,"
        f" parameters and state twice) per time, of the {bandwidth['best'] / 1e9:.1f} GB/s that kernels of MLX reach on"
        " large arrays in this run. trace: the first update built, not computed",
        ("workload", "dtype", "contender"),
        ("ms", "p10-p90", "to eager", "to compiled", "ns/param", "bandwidth", "kernels", "trace ms"),
    )
    return tables.filled(made, found, _cells)


def _cells(row: Row) -> list[str]:
    return [
        f"{row['median_ms']:.1f}",
        f"{row['p10_ms']:.1f}-{row['p90_ms']:.1f}",
        tables.ratio(row, "ratio"),
        tables.ratio(row, "compiled_ratio"),
        f"{row['ns_per_parameter']:.2f}",
        f"{row['bandwidth_percent']:.0f} %",
        tables.number(row["kernels"], 1, 0),
        tables.number(row["trace_ms"], 1, 0),
    ]
