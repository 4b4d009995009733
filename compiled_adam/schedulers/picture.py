"""Pictures of schedules: as lines of block characters for a terminal or a pipe, and as a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..base import InputError
from .schedules import Schedule, check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 20_000  # most points of a curve
BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", "    ####"


def curve(schedule: Callable[[Any], Any], steps: int) -> tuple[list[int], list[float]]:
    """The steps from 0 to ``steps``, at most `MOST` evenly spaced ones, and the learning rate at each."""
    last = min(steps, MOST - 1)
    points = [round(i * steps / last) for i in range(last + 1)]
    return points, rates_at(schedule, points)


def rates_at(schedule: Callable[[Any], Any], points: Sequence[int]) -> list[float]:
    """The learning rate at each of ``points``."""
    # Adding zero times the step gives a constant schedule one value per step, like the others.
    rates = mx.vmap(lambda step: schedule(step) + 0.0 * step)(mx.array(list(points), mx.float32))
    return cast(list[float], rates.tolist())


def text(rates: Sequence[float], steps: int, width: int = 64, height: int = 10, blocks: str = BLOCKS) -> list[str]:
    """A bar chart as lines of text. Each column shows the highest rate in one part of the run. The axis begins at 0.

    >>> print("\\n".join(text([0.0, 0.5, 1.0, 1.0], 3, width=4, height=2)))
    1.00e+00 |  ██
    5.00e-01 | ███
           0 +----
              0  3
    """
    width = min(width, len(rates))
    columns = [max(rates[len(rates) * i // width : len(rates) * (i + 1) // width]) for i in range(width)]
    highest = max(columns) or 1.0
    full = len(blocks) - 1
    filled = [round(height * full * rate / highest) for rate in columns]
    lines = []
    for row in reversed(range(height)):
        label = f"{highest:.2e}" if row == height - 1 else f"{highest / 2:.2e}" if 2 * (row + 1) == height else ""
        cells = "".join(blocks[min(max(level - row * full, 0), full)] for level in filled)
        lines.append(f"{label:>8} |{cells}".rstrip())
    middle, last = str(steps // 2), str(steps)
    gap = max(width - 1 - len(last), 1)
    ticks = f"{middle:^{gap - 1}} " if len(middle) < gap - 1 else " " * gap
    return [*lines, f"{'0':>8} +{'-' * width}", f"{'':9} 0{ticks}{last}"]


def canvas() -> Figure:
    """An empty figure, which a notebook shows as a picture. Raises ImportError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"drawing needs matplotlib ({error}); install it with `pip install 'compiled-adam[plot]'`"
        ) from error

    made = Figure(figsize=(6.4, 3.6), layout="constrained")
    # A notebook knows how to show the figures of pyplot only. Pyplot would also keep each figure for ever.
    vars(made)["_repr_png_"] = partial(_png, made)
    return made


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def plot(schedule: Schedule | Mapping[str, Schedule], steps: int, *, at: Sequence[int] = ()) -> Figure:
    """A matplotlib figure of the learning rate from update 0 to ``steps``: ``plot(...).savefig("rate.svg")``.

    Args:
        schedule: one schedule, or a mapping of labels to schedules for a comparison.
        steps: the last update to draw, at least 1.
        at: updates to mark with a point. Default: none.

    Raises:
        ImportError: matplotlib is missing. The message says how to install it.
        ValueError: an argument is out of range. The message names the argument.
    """
    check_count("steps", steps, 1)
    for i, mark in enumerate(at):
        check_count(f"at[{i}]", mark, 0)
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule}
    if not schedules or not all(callable(each) for each in schedules.values()):
        raise InputError(f"schedule is {schedule!r}; it must be a schedule, or a mapping of labels to schedules")
    made = canvas()
    axes = made.subplots()
    for label, each in schedules.items():
        (line,) = axes.plot(*curve(each, steps), label=label)
        if at:
            axes.plot(at, rates_at(each, at), "o", color=line.get_color(), markersize=4)
    axes.set_xlabel("update")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(schedules) > 1:
        axes.legend(fontsize="small")
    else:
        axes.set_title(next(iter(schedules)), fontsize="medium")
    return made
