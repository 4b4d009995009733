"""The picture of a run: one HTML file, made from the log beside the adapters, that opens anywhere without a network."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..base import InputError
from ..checkpoint import output
from ..finetune.log import is_number, read
from ..finetune.names import CONFIG, LOG
from ..finetune.packages import needed

with needed("drawing", "matplotlib", "plot"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_A_STEP = ("tokens", "grad_norm", "learning_rate", "skipped", "traces", "seconds", "memory")  # what is drawn
# A picture for a phone's width; two to three stand beside each other on a desk.
SIZE = (5.2, 3.2)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1rem; color: #222 }
figure { display: inline-block; margin: 0 1% 1rem 0; width: 48%; min-width: 320px; vertical-align: top }
svg { width: 100%; height: auto } h1 { font-size: 1.4rem; overflow-wrap: anywhere } .scroll { overflow-x: auto }
table { border-collapse: collapse; margin-bottom: 1.5rem } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
tr { border-bottom: 1px solid #ddd } @media (max-width: 700px) { figure { width: 100%; margin: 0 0 1rem } }
"""


class Run(NamedTuple):
    """The log of one run, taken apart, and the options it was started with."""

    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    settings: dict[str, Any]

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Iterations and values of what a line of a step has; where it is null there is no point."""
        known = [(step["iteration"], step[name]) for step in self.steps if step[name] is not None]
        return [iteration for iteration, _ in known], [value for _, value in known]

    def skipped(self) -> list[int]:
        """The iterations whose update was skipped."""
        counts = [step["skipped"] for step in self.steps]
        before = [0, *counts[:-1]]
        return [step["iteration"] for step, a, b in zip(self.steps, before, counts, strict=True) if b > a]


def write(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of the runs in ``folders``, which are compared in the same pictures, to the file ``out``.

    Raises:
        InputError: a folder has no log of a run, or a damaged one, or it has no step yet; ``out`` is something else
            than a file, which is never replaced.
    """
    text = render([load(folder) for folder in folders])
    output.write(out, text.encode("utf-8", errors="replace"))  # JSON can have half a pair of surrogates


def load(folder: Path) -> Run:
    """The run whose adapters are in ``folder``."""
    file = folder / LOG
    if not file.is_file():
        raise InputError(f"{folder} has no {LOG}; give a folder that `compiled-adam lora` wrote its adapters to")
    entries = read(file)
    steps = [entry for entry in entries if "loss" in entry]
    for number, entry in enumerate(entries, start=1):
        if "loss" in entry and (missing := [name for name in OF_A_STEP if name not in entry]):
            raise InputError(f"{file} is not the log of a run: line {number} has no {missing[0]}")
    if not steps:
        raise InputError(f"{file} has no step yet; train first")
    settings = _settings(folder / CONFIG)
    return Run(str(folder), steps, [entry for entry in entries if "val_loss" in entry], settings)


def _settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    if not file.is_file():
        raise InputError(f"{file} is no file; remove it, or put back what `compiled-adam lora` wrote there")
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is not JSON ({error}); repair it, or remove it: then the report shows no settings"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(f"{file} is not an object of settings; repair it, or remove it: then the report shows none")
    return settings


def render(runs: Sequence[Run]) -> str:
    """The HTML of a report: a summary, the pictures, and the settings; no script, and nothing loaded from elsewhere."""
    title = f"Training report: {', '.join(run.name for run in runs)}"
    pictures = "".join(f"<figure>{_picture(draw, name, runs)}</figure>" for name, draw in PICTURES.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{_table('', runs, [_summary(run) for run in runs])}{pictures}"
        f"<h2>Settings</h2>{_table('setting', runs, [run.settings for run in runs])}</body></html>\n"
    )


def _summary(run: Run) -> dict[str, Any]:
    last, losses = run.steps[-1], [v["val_loss"] for v in run.validations if v["val_loss"] is not None]
    seconds = sum(step["seconds"] for step in run.steps)
    tokens = sum(step["tokens"] for step in run.steps)
    return {
        "iterations": last["iteration"],
        "last training loss": _loss_of(last),
        "last validation loss": f"{losses[-1]:.4f}" if losses else "-",
        "best validation loss": f"{min(losses):.4f}" if losses else "-",
        "tokens": f"{tokens:,}",
        "tokens/s": f"{tokens / seconds:,.0f}" if seconds else "-",
        "updates skipped": last["skipped"],
        "gradient traces": last["traces"],
        "peak memory": f"{max(step['memory'] for step in run.steps) / 1e9:.2f} GB",
        "time in steps": f"{seconds / 60:.1f} min",
    }


def _loss_of(step: dict[str, Any]) -> str:
    if not step["tokens"]:
        return "no targets"
    return "not finite" if step["loss"] is None else f"{step['loss']:.4f}"


def _table(heading: str, runs: Sequence[Run], columns: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[heading, *(run.name for run in runs)]] if heading or len(runs) > 1 else []
    rows += [[name, *(str(column.get(name, "-")) for column in columns)] for name in names]
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f'<div class="scroll"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


# The pictures: each draws one run.


def _loss(axes: Axes, run: Run, color: str) -> None:
    iterations, losses = run.column("loss")
    axes.plot(iterations, losses, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(iterations, _smoothed(losses), color=color, label=f"{run.name}, training")
    known = [v for v in run.validations if v["val_loss"] is not None]
    if known:
        # A validation is made before the step of its iteration.
        points = [v["iteration"] - 1 for v in known], [v["val_loss"] for v in known]
        axes.plot(*points, "o--", color=color, markersize=4, label=f"{run.name}, validation")


def _learning_rate(axes: Axes, run: Run, color: str) -> None:
    axes.plot(*run.column("learning_rate"), color=color, label=run.name)


def _gradient_norm(axes: Axes, run: Run, color: str) -> None:
    iterations, norms = run.column("grad_norm")
    axes.plot(iterations, norms, color=color, linewidth=0.8, label=run.name)
    limit: Any = run.settings.get("max_grad_norm")
    clips = is_number(limit) and limit > 0
    clipped = [(i, norm) for i, norm in zip(iterations, norms, strict=True) if clips and norm > limit]
    if clipped:
        axes.plot(*zip(*clipped, strict=True), ".", color=color, markersize=5, label=f"clipped ({len(clipped)})")
    if skipped := run.skipped():
        height = max(norms, default=1.0)
        axes.plot(skipped, [height] * len(skipped), "x", color="black", label=f"skipped ({len(skipped)})")
    if norms and max(norms) > 0:
        axes.set_yscale("log")


def _tokens_per_second(axes: Axes, run: Run, color: str) -> None:
    timed = [step for step in run.steps if step["seconds"]]
    speeds = [step["tokens"] / step["seconds"] for step in timed]
    axes.plot([step["iteration"] for step in timed], _smoothed(speeds), color=color, label=run.name)


def _memory(axes: Axes, run: Run, color: str) -> None:
    iterations, peaks = run.column("memory")
    axes.plot(iterations, [peak / 1e9 for peak in peaks], color=color, label=run.name)


def _traces(axes: Axes, run: Run, color: str) -> None:
    axes.step(*run.column("traces"), color=color, where="post", label=run.name)


PICTURES: dict[str, Callable[[Axes, Run, str], None]] = {
    "loss": _loss,
    "gradient norm": _gradient_norm,
    "learning rate": _learning_rate,
    "tokens per second": _tokens_per_second,
    "peak memory, GB": _memory,
    "gradient traces": _traces,
}
FROM_ZERO = {"tokens per second", "peak memory, GB", "gradient traces"}


def _smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average, without the bias of its start, that weights the last fiftieth of a run."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    smooth, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(average / weight)
    return smooth


def _picture(draw: Callable[[Axes, Run, str], None], name: str, runs: Sequence[Run]) -> str:
    # A Figure of one's own, not pyplot's, which would look for a display. Text stays text, for the reader's fonts, and
    # a dollar in the name of a folder is no formula.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            draw(axes, run, f"C{i % 10}")
        axes.set_title(name)
        if name in FROM_ZERO:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize="small")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
