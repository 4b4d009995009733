"""The picture of the numerics record: docs/numerics.svg, which ``python -m bench.readme`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the numerics of a record into ``folder``; the files written."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = folder / "numerics.svg"
    # The same record gives the same file, byte by byte; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        FigureCanvasSVG(_movement(record["numerics"])).print_svg(str(file), metadata={"Date": None})
    return [file]


def _movement(rows: list[Row]) -> Any:
    """How far bfloat16 weights move, by learning rate, as a part of what float32 weights do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    for contender, label, colour in (
        ("mlx", "mlx.optimizers.AdamW", "#999999"),
        ("compiled_adam", "compiled_adam.AdamW", "#d55e00"),
    ):
        found = sorted(
            (row["learning_rate"], 100 * row["movement"])
            for row in rows
            if row["dtype"] == "bfloat16" and row["contender"] == contender and "optimizer" not in row
        )
        axes.plot(*zip(*found, strict=True), "o-", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_ylim(-4, 108)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("movement, %")
    axes.set_title("bfloat16 weights: movement in 2000 updates, of what float32 weights do")
    axes.legend()
    return figure
