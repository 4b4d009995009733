"""``python -m bench.readme``: writes the tables of README and docs, and a picture, from ``bench/results``."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compiled_adam.base.errors import InputError

from . import numerics, plots
from .contenders import COMPILED, EAGER, OURS, STEP, TORCH

ROOT = Path(__file__).parent.parent
PAGE, NUMERICS, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "numerics.md", ROOT / "README.md"


WORKLOADS = ("1000 x 64", "448 x (8x1024)", "95 M GPT-2")  # of which the page has a row; the record has all


def update_table(record: dict[str, Any]) -> str:
    """The time of an update as a Markdown table, a row for each of some workloads and dtype."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in record["update"]:
        if "median_ms" in row and row["workload"] in WORKLOADS:  # else: what could not be measured
            rows.setdefault((row["workload"], row["dtype"]), {})[row["contender"]] = row
    columns = {
        EAGER: "mlx eager",
        COMPILED: "mlx compiled",
        TORCH: "PyTorch fused",
        OURS: "ours, called",
        STEP: "in a step",
    }
    lines = [
        f"| parameters | dtype | {' | '.join(columns.values())} | to eager | to compiled | to PyTorch |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for (workload, dtype), by_name in rows.items():
        times = [f"{by_name[name]['median_ms']:.1f} ms" if name in by_name else "-" for name in columns]
        ours = by_name[STEP]
        ratios = [f"{ours[key]:.2f}{' (noisy)' if ours[f'{key}_noisy'] else ''}" for key in ("ratio", "compiled_ratio")]
        ratios.append(f"{ours['median_ms'] / by_name[TORCH]['median_ms']:.1f}" if TORCH in by_name else "-")
        lines.append(f"| {workload} | {dtype} | {' | '.join([*times, *ratios])} |")
    return "\n".join(lines)


def numerics_table(record: dict[str, Any]) -> str:
    """How far weights move, and how much of them decays, as parts of what is right; a row for each way to store."""
    rows: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in record["numerics"]:
        if "optimizer" in row:
            continue
        rows.setdefault((row["dtype"], row["contender"]), {})[row["learning_rate"]] = row
    rates = sorted({row["learning_rate"] for row in record["numerics"]}, reverse=True)
    lines = [
        "| weights | optimizer | " + " | ".join(f"movement, lr {rate:g}" for rate in rates) + " | decay, lr 0.0001 |",
        "|---" * (len(rates) + 3) + "|",
    ]
    for (dtype, contender), by_rate in rows.items():
        if contender != numerics.MASTER:
            cells = [numerics.percent(by_rate[rate]["movement"]) for rate in rates]
            cells.append(numerics.percent(by_rate[1e-4]["decay"]))
            lines.append(f"| {dtype} | {contender} | {' | '.join(cells)} |")
    return "\n".join(lines)


def others_table(record: dict[str, Any]) -> str:
    """What MLX's other optimizers do alone and in `Compensated`, to weights of one dtype in a row."""
    rows: dict[tuple[str, str], dict[tuple[float, str], dict[str, Any]]] = {}
    for row in record["numerics"]:
        if "optimizer" in row:
            rows.setdefault((row["optimizer"], row["dtype"]), {})[row["learning_rate"], row["contender"]] = row
    rates = sorted({rate for by_key in rows.values() for rate, _ in by_key}, reverse=True)
    heads = [*(f"movement, lr {rate:g}" for rate in rates), "decay, lr 0.0001"]
    lines = [f"| optimizer | weights | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for (optimizer, dtype), by_key in rows.items():
        cells = [_pair(by_key, rate, "movement") for rate in rates] + [_pair(by_key, 1e-4, "decay")]
        lines.append(f"| {optimizer} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(by_key: dict[tuple[float, str], dict[str, Any]], rate: float, what: str) -> str:
    """A figure of stock and of ours in one cell."""
    stock, ours = by_key[rate, "mlx"], by_key[rate, "compiled_adam"]
    return f"{numerics.percent(stock[what])}, {numerics.percent(ours[what])}" if what in ours else "-"


POLICIES = ("mlx", "float32", "bfloat16", "8bit")  # likewise


def quality_table(record: dict[str, Any]) -> str:
    """The eval loss of the small language model for some optimizers, mean and range over seeds, for each dtype."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record["quality"]:
        runs.setdefault((row["dtype"], row["policy"]), []).append(row)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in runs))
    heads = [f"{dtype} weights: state, bytes per parameter | eval loss" for dtype in dtypes]
    lines = [f"| moments | {' | '.join(heads)} |", "|---" * (1 + 2 * len(dtypes)) + "|"]
    for policy in POLICIES:
        cells = [policy]
        for dtype in dtypes:
            losses = [run["eval_loss"] for run in runs[dtype, policy]]
            cells.append(f"{runs[dtype, policy][0]['state_bytes_per_parameter']:.2f}")
            cells.append(f"{statistics.mean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step_table(record: dict[str, Any]) -> str:
    """One epoch by mlx-lm and by ours, a row for each job and command, with ratios to mlx-lm."""
    columns = ("tokens per second", "positions per token", "memory above the weights", "first step", "held-out loss")
    lines = [f"| job | command | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for row in record["step"]:
        noisy = " (noisy)" if row["ratio_noisy"] else ""
        cells = [f"{row['tokens_per_second']:,.0f}, x {row['ratio']:.2f}{noisy}", f"{row['positions_per_token']:.2f}"]
        cells.append(f"{row['peak_bytes'] / 1e6:.0f} MB, x {row['memory_ratio']:.2f}")
        cells.append(f"x {row['first_step_ratio']:.2f}" if "first_step_ratio" in row else "-")
        cells.append(f"{row['held_out']:.3f}, x {row['held_out_ratio']:.3f}" if "held_out" in row else "-")
        lines.append(f"| {row['job']} | `{row['contender']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "update": update_table,
    "numerics": numerics_table,
    "others": others_table,
    "quality": quality_table,
    "step": step_table,
}
RECORDS = {"others": "numerics"}  # of a table that has not the name of the record
PAGES = {PAGE: ("update", "numerics", "quality", "step"), NUMERICS: ("others",), README: ("step", "others")}


def rendered(page: str, names: Sequence[str]) -> str:
    """``page`` with what stands between the markers of each table replaced by what the records say."""
    for name in names:
        table = TABLES[name]
        record = json.loads(
            (Path(__file__).parent / "results" / f"{RECORDS.get(name, name)}-linux-cpu.json").read_text()
        )
        pattern = re.compile(rf"(<!-- {name} table -->\n)(?:.*?\n)??(<!-- end -->)", re.S)
        page, count = pattern.subn(lambda match: f"{match[1]}{table(record)}\n{match[2]}", page)  # noqa: B023
        if count != 1:
            raise InputError(f"the page has {count} places for the {name} table; it must have one")
    return page


def picture() -> str:
    """What docs/numerics.svg must be: the picture of the numerics record."""
    record = json.loads((Path(__file__).parent / "results" / "numerics-linux-cpu.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        (file,) = plots.write(record, Path(folder))
        return file.read_text()


if __name__ == "__main__":
    (ROOT / "docs" / "numerics.svg").write_text(picture())
    for page, names in PAGES.items():
        page.write_text(rendered(page.read_text(), names))
