"""The charts of a report as data, which the script of the page draws: several runs in the same charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from ..finetune.log import is_number
from .report_run import Points, Run

_DETAILS = ("faint", "dots", "crosses")  # styles that only a single run has
_MOST = 2000  # points of a line; more would be on top of each other


class Line(NamedTuple):
    """A line or marks of a chart. Its ``style`` is line, faint, dashed, steps, dots, crosses or best."""

    label: str
    points: Points
    style: str = "line"
    shade: int = 0  # its color, where there is one run; else a run has one color


class Chart(NamedTuple):
    """A chart: how to draw one run, and whether it begins at zero and is logarithmic at first."""

    draw: Callable[[Run], list[Line]]
    zero: bool = False
    log: bool = False


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the script needs: for each chart the title, and its lines; no chart that would be empty."""
    found, many, names = [], len(runs) > 1, short_names([run.name for run in runs])
    for title, chart in CHARTS.items():
        series: list[dict[str, Any]] = []
        for number, run in enumerate(runs):
            for line in chart.draw(run):
                if not line.points or (many and line.style in _DETAILS):
                    continue
                label, color = (f"{names[number]}: {line.label}", number) if many else (line.label, line.shade)
                points = _thinned(line.points)
                x, y = [i for i, _ in points], [float(f"{value:.6g}") for _, value in points]  # fewer bytes
                series.append({"label": label, "style": line.style, "color": color, "x": x, "y": y})
        positive = any(y > 0 for each in series for y in each["y"])
        if series:
            log = chart.log and positive
            found.append({"title": title, "zero": chart.zero, "log": log, "positive": positive, "series": series})
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """The names of several folders, without the part that all have in common.

    >>> short_names(["runs/a/adapters", "runs/b/adapters"]), short_names(["runs/a"])
    (['a/adapters', 'b/adapters'], ['runs/a'])
    """
    parts = [Path(name).parts for name in names]
    common = next((i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), 0)
    return [str(Path(*each[common:])) for each in parts]


def _thinned(points: Points) -> Points:
    """At most about `_MOST` points in order, one an iteration: the least and the greatest of each stretch stay."""
    ordered = sorted(dict(points).items())
    size = -(-2 * len(ordered) // _MOST)
    parts, value = (ordered[i : i + size] for i in range(0, len(ordered), size)), itemgetter(1)
    return [each for part in parts for each in sorted({min(part, key=value), max(part, key=value)})]


def _smoothed(points: Points) -> Points:
    """The exponential moving average, without the bias of its start, that weights the last fiftieth of a run."""
    keep = 1 - 1 / max(1.0, len(points) / 50)
    smooth, average, weight = [], 0.0, 0.0
    for iteration, value in points:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((iteration, average / weight))
    return smooth


def _loss(run: Run) -> list[Line]:
    losses = run.column("loss")
    best = [] if run.best is None else [Line(f"best, {run.best[1]:.4f} at {run.best[0]}", [run.best], "best", 1)]
    smooth = [Line("one step", losses, "faint")] if len(losses) > 50 else []
    return [*smooth, Line("training", _smoothed(losses)), Line("validation", run.losses, "dashed", 1), *best]


def _gradient_norm(run: Run) -> list[Line]:
    norms = run.column("grad_norm")
    limit: Any = run.settings.get("max_grad_norm")
    clipped = [(i, norm) for i, norm in norms if is_number(limit) and 0 < limit < norm]
    height = max((norm for _, norm in norms), default=1.0)
    skipped = [(i, height) for i in run.skipped]
    return [
        Line("gradient norm", norms),
        Line(f"clipped ({len(clipped)})", clipped, "dots", 1),
        Line(f"skipped ({len(skipped)})", skipped, "crosses", 4),
    ]


def _tokens_per_second(run: Run) -> list[Line]:
    timed = [(step["iteration"], step["tokens"] / step["seconds"]) for step in run.steps if step["seconds"] > 1e-9]
    return [Line("tokens per second", _smoothed(timed))]


def _memory(run: Run) -> list[Line]:
    return [Line("peak memory", [(i, peak / 1e9) for i, peak in run.column("memory")])]


CHARTS = {
    "loss": Chart(_loss),
    "gradient norm": Chart(_gradient_norm, log=True),
    "learning rate": Chart(lambda run: [Line("learning rate", run.column("learning_rate"))]),
    "tokens per second": Chart(_tokens_per_second, zero=True),
    "peak memory, GB": Chart(_memory, zero=True),
    "gradient traces": Chart(lambda run: [Line("traces", run.column("traces"), "steps")], zero=True),
}
