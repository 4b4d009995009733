"""``python -m bench update``: one update of each contender on each workload, and on trees of growing size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from rich.table import Table

from . import measure
from .contenders import COMPILED, EAGER, NOT_MEASURED, REFERENCES, SAME, Make, selected
from .environment import memory_bytes
from .models import Shapes
from .spread import NOISY
from .workloads import DTYPES, arrays, hollow, over_parameters, over_tensors, parameter_count

Row = dict[str, Any]


def rows(
    workloads: Mapping[str, Callable[[], Shapes]],
    dtypes: list[str],
    names: list[str],
    seconds: float,
    bandwidth: float,
) -> Iterator[Row]:
    """A row for each workload, dtype and contender; of what cannot be measured here, a row that says why."""
    return of_each(workloads, dtypes, lambda shapes, dtype: _rows(shapes, dtype, names, seconds, bandwidth))


def of_each(
    workloads: Mapping[str, Callable[[], Shapes]], dtypes: list[str], measured: Callable[[Shapes, str], list[Row]]
) -> Iterator[Row]:
    """The rows that ``measured`` has for each workload and dtype, as soon as it has them."""
    for workload, make_shapes in workloads.items():
        try:
            shapes = make_shapes()
        except ImportError as error:
            why = f"{error.name or error} missing"
            yield {"workload": workload, "dtype": "", "contender": "", NOT_MEASURED: why}
            continue
        for dtype in dtypes:
            for row in measured(shapes, dtype):
                yield {"workload": workload, **row}
            print(f"measured {workload}, {dtype}", file=sys.stderr)


def scale(dtypes: list[str], names: list[str], seconds: float, bandwidth: float) -> Iterator[Row]:
    """The same rows over parameters (100 tensors) and over tensors (64 elements each), without graphs."""
    sweeps = {"parameters": over_parameters(), "tensors": over_tensors()}
    for sweep, trees in sweeps.items():
        for size, shapes in trees.items():
            for dtype in dtypes:
                for row in _rows(shapes, dtype, names, seconds, bandwidth, graphs=False):
                    yield {"sweep": sweep, **row}
                print(f"measured {size:,} {sweep}, {dtype}", file=sys.stderr)


def _rows(
    shapes: Shapes, dtype: str, names: list[str], seconds: float, bandwidth: float, graphs: bool = True
) -> list[Row]:
    chosen, left_out = selected(names, DTYPES[dtype])
    size = {"tensors": len(shapes), "parameters": parameter_count(shapes)}
    figures: dict[str, Row] = {}
    for group in _groups(chosen, size["parameters"], DTYPES[dtype]):
        if not group:
            need = f"{needed(size['parameters'], DTYPES[dtype], len(REFERENCES) + 1) / 1e9:.0f} GB"
            why = f"{size['parameters']:,} parameters in {dtype} need {need}, too much here"
            left_out = dict.fromkeys(chosen, why) | left_out
            break
        gradients = arrays(shapes, DTYPES[dtype], 1e-3, seed=1)
        part = measure.compare(group, lambda: arrays(shapes, DTYPES[dtype], 0.02, seed=0), gradients, seconds)
        for name, row in part.items():
            if name in figures:
                continue  # the references are in each group, and reported once
            if NOT_MEASURED in row:
                figures[name] = row
                continue
            figures[name] = derived(row, size, gradients, bandwidth)
            if graphs and row["trace_ms"] is not None:
                figures[name] |= measure.graph_of(
                    group[name], hollow_parameters(shapes, dtype), hollow_parameters(shapes, dtype)
                )
    result: list[Row] = []
    for name in names:
        told = figures[name] if name in figures else {NOT_MEASURED: left_out[name]}
        result.append({"dtype": dtype, "contender": name, **size, **told})
    return result


def derived(row: Row, size: dict[str, int], gradients: dict[str, mx.array], bandwidth: float) -> Row:
    """A row with what follows from it: times and state per parameter, and the share of the bandwidth.

    ``required_bytes`` must move whatever the algorithm: gradients are read, parameters and state read and written.
    """
    gradient_bytes = sum(g.nbytes for g in gradients.values())  # the parameters' dtype is the same
    required = 3 * gradient_bytes + 2 * row["state_bytes"]
    return row | {
        "ns_per_parameter": 1e6 * row["median_ms"] / size["parameters"],
        "us_per_tensor": 1e3 * row["median_ms"] / size["tensors"],
        "state_bytes_per_parameter": row["state_bytes"] / size["parameters"],
        "required_bytes": required,
        "bandwidth_percent": 100 * required / (1e-3 * row["median_ms"]) / bandwidth,
    }


def hollow_parameters(shapes: Shapes, dtype: str) -> dict[str, mx.array]:
    """Parameters that take no memory, for looking at graphs."""
    return hollow({name: mx.broadcast_to(mx.zeros((), DTYPES[dtype]), s) for name, s in shapes.items()})


def needed(parameters: int, dtype: mx.Dtype, contenders: int) -> int:
    """Bytes: weights, two float32 moments and a residual each, gradients twice, and three arrays during an update."""
    return parameters * (contenders * (dtype.size + 8 + 2) + 2 * dtype.size + 3 * dtype.size)


def _groups(chosen: dict[str, Make], parameters: int, dtype: mx.Dtype) -> list[dict[str, Make]]:
    """The contenders in groups that fit into six tenths of the memory together, the references in each."""
    budget = 0.6 * memory_bytes()
    references = {name: make for name, make in chosen.items() if name in REFERENCES}
    others = [name for name in chosen if name not in references]
    room = len(chosen)
    while room > 0 and needed(parameters, dtype, room) > budget:
        room -= 1
    places = room - len(references)
    if places < min(1, len(others)) or room < len(references):
        return [{}]
    if not others:
        return [references]
    parts = [others[i : i + places] for i in range(0, len(others), places)]
    return [{name: make for name, make in chosen.items() if name in references or name in part} for part in parts]


# Tables.


def tables(found: list[Row], environment: dict[str, Any], bandwidth: dict[str, float]) -> list[Table]:
    """Times; and what does not depend on the clock."""
    times = Table(
        title=f"One AdamW update, MLX {environment['mlx']}, {environment['device']}, {environment['cores']} cores",
        caption=f"{SAME}. Median over interleaved rounds. to eager, to compiled: ratio to {EAGER} and {COMPILED},"
        f" median (p10-p90) of the ratios within a round; {NOISY}. bandwidth: bytes that must move (gradients once,"
        " parameters and state twice) per time, of the"
        f" {bandwidth['best'] / 1e9:.1f} GB/s that kernels of MLX reach on large arrays in this run",
    )
    columns(times, "ms", "p10-p90", "to eager", "to compiled", "us/tensor", "ns/param", "bandwidth")
    counts = Table(
        title="Memory, kernels and traces of the same updates",
        caption="extra: allocated by MLX during an update; moved: what all kernels read and write, from the graph;"
        " required: gradients once, parameters and state twice; ~: some arrays between two kernels are assumed to be"
        " float32; trace: the first update built, not computed; first call: that and computing it, compilers included"
        " unless they kept what they made",
    )
    columns(
        counts,
        "state B/param",
        "extra MB",
        "kernels/tensor",
        "moved B/param",
        "required",
        "traces",
        "trace ms",
        "first call ms",
    )
    return [filled(times, found, _time_cells), filled(counts, found, _count_cells)]


def scale_table(found: list[Row], environment: dict[str, Any]) -> Table:
    table = Table(
        title=f"One AdamW update as trees grow, MLX {environment['mlx']}, {environment['device']}",
        caption=f"{SAME}. parameters: in 100 tensors; tensors: of 64 elements; {NOISY}",
    )
    columns(table, "ms", "p10-p90", "to eager", "to compiled", "us/tensor", "ns/param", "bandwidth")
    named = [{"workload": f"{row[row['sweep']]:,} {row['sweep']}", **row} for row in found]
    return filled(table, named, _time_cells)


def warning(found: list[Row]) -> str | None:
    """One line when ratios of this run mean nothing; they are marked where they stand."""
    measured = [row for row in found if NOT_MEASURED not in row]
    count = sum(bool(row.get("ratio_noisy") or row.get("compiled_ratio_noisy")) for row in measured)
    if not count:
        return None
    return f"warning: {count} of {len(measured)} rows are noisy; their ratios mean nothing. Measure on a quiet machine."


def columns(table: Table, *names: str) -> None:
    for name in ("workload", "dtype", "contender"):
        table.add_column(name, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")


def filled(table: Table, found: list[Row], cells: Callable[[Row], list[str]]) -> Table:
    missing: dict[str, list[str]] = {}  # reason -> names, each once
    last: tuple[str, str] | None = None
    for row in found:
        if NOT_MEASURED in row:
            names = missing.setdefault(row[NOT_MEASURED], [])
            names += [name for name in [row["contender"] or row["workload"]] if name not in names]
            continue
        where = row["workload"], row["dtype"]
        if last is not None and where != last:
            table.add_section()
        table.add_row(*(where if where != last else ("", "")), row["contender"], *cells(row))
        last = where
    for why, names in missing.items():
        table.add_section()
        table.add_row(
            "not measured", "", f"{names[0]}: {why}" if len(names) == 1 else f"{len(names)} contenders: {why}"
        )
    return table


def ratio_cell(row: Row, key: str) -> str:
    if key not in row:
        return "-"
    if row[key] == row[f"{key}_p10"] == row[f"{key}_p90"] == 1:
        return "1"
    text = f"{row[key]:.2f} ({row[f'{key}_p10']:.2f}-{row[f'{key}_p90']:.2f})"
    return f"{text} noisy" if row[f"{key}_noisy"] else text


def _time_cells(row: Row) -> list[str]:
    return [
        f"{row['median_ms']:.1f}",
        f"{row['p10_ms']:.1f}-{row['p90_ms']:.1f}",
        ratio_cell(row, "ratio"),
        ratio_cell(row, "compiled_ratio"),
        f"{row['us_per_tensor']:.1f}",
        f"{row['ns_per_parameter']:.2f}",
        f"{row['bandwidth_percent']:.0f} %",
    ]


def _count_cells(row: Row) -> list[str]:
    per = row["parameters"]
    moved = "-"
    if "kernel_bytes" in row:
        moved = f"{'~' if row['estimated_kernels'] else ''}{row['kernel_bytes'] / per:.1f}"
    return [
        f"{row['state_bytes_per_parameter']:.2f}",
        number(row["peak_extra_bytes"], 1e-6, 1),
        f"{row['kernels'] / row['tensors']:.2f}" if "kernels" in row else "-",
        moved,
        f"{row['required_bytes'] / per:.1f}",
        number(row["traces"], 1, 0),
        number(row["trace_ms"], 1, 0),
        number(row["first_call_ms"], 1, 0),
    ]


def number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value * unit:.{digits}f}"
