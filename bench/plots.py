"""``--plot FOLDER``: bars of the updates, lines of the sweeps, curves of the training runs, as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .contenders import COMPILED, EAGER, OURS

Row = dict[str, Any]
# Colour-blind-safe (Okabe and Ito); the three that are always there keep theirs.
_FIXED = {EAGER: "#999999", COMPILED: "#0072b2", OURS: "#d55e00", "mlx": "#999999", "float32": "#d55e00"}
_OTHERS = (
    *("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000"),
    *("#7b4173", "#8c6d31", "#637939", "#843c39", "#9c9ede", "#c7e9c0"),
)


def missing() -> str | None:
    """What to do to have pictures, or None."""
    if find_spec("matplotlib") is not None:
        return None
    return "--plot needs matplotlib; install it with pip install 'compiled-adam[plot]', or leave --plot out"


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """A file for each part of a record that can be drawn; the files written."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = []
    # The same record gives the same file, byte by byte; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        for name, figure in _figures(record):
            file = folder / f"{name}.svg"
            FigureCanvasSVG(figure).print_svg(str(file), metadata={"Date": None})
            written.append(file)
    return written


def _figures(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    where = f"MLX {record['environment']['mlx']}, {record['environment']['device']}"
    for dtype, rows in _by(_measured(record.get("update", [])), "dtype").items():
        yield f"update-{dtype}", _bars(rows, f"One AdamW update, {dtype} weights, {where}")
    for sweep, rows in _by(_measured(record.get("scale", [])), "sweep").items():
        yield f"scale-{sweep}", _lines(rows, sweep, where)
    if record.get("numerics"):
        yield "numerics", _movement(record["numerics"])
    if record.get("quality"):
        yield "quality", _curves(record["quality"], where)


def _movement(rows: list[Row]) -> Any:
    """How far bfloat16 weights move, by learning rate, as a part of what float32 weights do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    for contender, label in (("mlx", "mlx.optimizers.AdamW"), ("compiled_adam", "compiled_adam.AdamW")):
        found = sorted(
            (row["learning_rate"], 100 * row["movement"])
            for row in rows
            if row["dtype"] == "bfloat16" and row["contender"] == contender
        )
        axes.plot(
            *zip(*found, strict=True), "o-", color=_FIXED[OURS if contender == "compiled_adam" else EAGER], label=label
        )
    axes.set_xscale("log")
    axes.set_ylim(-4, 108)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("movement, %")
    axes.set_title("bfloat16 weights: movement in 2000 updates, of what float32 weights do")
    axes.legend()
    return figure


def _bars(rows: list[Row], title: str) -> Any:
    """For each workload a bar for each contender: the ratio to eager stock, its range, and the time beside it."""
    from matplotlib.figure import Figure

    workloads, contenders = _by(rows, "workload"), list(_by(rows, "contender"))
    colours = _colours(contenders)
    height = 0.8 / len(contenders)
    figure = Figure(figsize=(9, 1 + 0.22 * len(rows) + 0.25 * len(workloads)), layout="constrained")
    axes = figure.add_subplot()
    for i, contender in enumerate(contenders):
        own = [
            (at, row) for at, name in enumerate(workloads) for row in workloads[name] if row["contender"] == contender
        ]
        places = [at + (i - (len(contenders) - 1) / 2) * height for at, _ in own]
        values = [row["ratio"] for _, row in own]
        ranges = [
            [max(0.0, row["ratio"] - row["ratio_p10"]) for _, row in own],
            [max(0.0, row["ratio_p90"] - row["ratio"]) for _, row in own],
        ]
        axes.barh(places, values, height, xerr=ranges, color=colours[contender], label=contender, ecolor="#444444")
        for place, (_, row) in zip(places, own, strict=True):
            text = f" {row['median_ms']:.1f} ms{', noisy' if row['ratio_noisy'] else ''}"
            axes.text(max(row["ratio"], row["ratio_p90"]), place, text, va="center", fontsize=7)
    axes.set_yticks(range(len(workloads)), list(workloads))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"time, ratio to {EAGER} within a round: median, p10-p90")
    axes.set_title(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _lines(rows: list[Row], sweep: str, where: str) -> Any:
    """Time per parameter over parameters, or per tensor over tensors; both axes logarithmic."""
    from matplotlib.figure import Figure

    key, label = {
        "parameters": ("ns_per_parameter", "ns per parameter"),
        "tensors": ("us_per_tensor", "us per tensor"),
    }[sweep]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = _colours(list(_by(rows, "contender")))
    for contender, own in _by(rows, "contender").items():
        for dtype, points in _by(own, "dtype").items():
            sizes = [row[sweep] for row in points]
            scale = [row[key] / row["median_ms"] for row in points]
            style = "-" if dtype == "float32" else "--"
            axes.plot(
                sizes, [row[key] for row in points], style, color=colours[contender], marker="o", markersize=3,
                label=f"{contender}, {dtype}",
            )  # fmt: skip
            low = [row["p10_ms"] * factor for row, factor in zip(points, scale, strict=True)]
            high = [row["p90_ms"] * factor for row, factor in zip(points, scale, strict=True)]
            axes.fill_between(sizes, low, high, color=colours[contender], alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters, in 100 tensors" if sweep == "parameters" else "tensors of 64 elements")
    axes.set_ylabel(f"{label}: median, p10-p90")
    axes.set_title(f"One AdamW update, {where}")
    axes.legend(frameon=False)
    return figure


def _curves(rows: list[Row], where: str) -> Any:
    """Training loss over steps, a panel for each dtype: mean over seeds of a running mean, and their range."""
    from matplotlib.figure import Figure

    panels = _by(rows, "dtype")
    figure = Figure(figsize=(5 * len(panels) + 1, 4.5), layout="constrained")
    colours = _colours(list(_by(rows, "policy")))
    for i, (dtype, own) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for policy, runs in _by(own, "policy").items():
            smooth = [_running_mean(run["losses"]) for run in runs]
            at_steps = list(zip(*smooth, strict=True))
            steps = range(1, len(at_steps) + 1)
            final = statistics.mean(run["eval_loss"] for run in runs)
            label = f"{policy}: eval {final:.4f}"
            axes.plot(steps, [statistics.mean(x) for x in at_steps], color=colours[policy], linewidth=1, label=label)
            axes.fill_between(
                steps, [min(x) for x in at_steps], [max(x) for x in at_steps], color=colours[policy], alpha=0.15,
                linewidth=0,
            )  # fmt: skip
        axes.set_title(f"{dtype} weights")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, running mean; band: seeds")
        axes.legend(frameon=False)
    figure.suptitle(f"A byte-level language model, {where}")
    return figure


def _running_mean(values: list[float]) -> list[float]:
    window = max(1, len(values) // 30)
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _colours(names: list[str]) -> dict[str, str]:
    others = [name for name in names if name not in _FIXED]
    return _FIXED | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def _measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "median_ms" in row]


def _by(rows: list[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get(key, "float32"), []).append(row)
    return groups
