"""``python -m bench``: the time of an update, ours against what an MLX user has; and what the policies do to a loss."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import distributed, measure, numerics
from .contenders import CONTENDERS
from .workloads import DTYPES, WORKLOADS, arrays, parameter_count


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        print(f"bench: the folder of {arguments.json} does not exist; create it first", file=sys.stderr)
        return 2
    if arguments.model and not (arguments.model / "config.json").exists():
        print(f"bench: {arguments.model} is not a folder with a model; it has no config.json", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a pipe has no width, and 80 columns would break the rows
    record: dict[str, Any] = {"environment": measure.environment()}
    run: Callable[[argparse.Namespace, dict[str, Any]], tuple[Any, Table]] = {
        "update": _update,
        "step": _step,
        "saving": _saving,
        "numerics": _numerics,
        "quality": _quality,
        "distributed": lambda arguments, _: distributed.compare(arguments.seconds),
    }[arguments.what]
    record[arguments.what], table = run(arguments, record["environment"])
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _update(arguments: argparse.Namespace, environment: dict[str, Any]) -> tuple[list[dict[str, Any]], Table]:
    record = []
    table = _update_table(environment)
    for workload in arguments.workload or WORKLOADS:
        for dtype in arguments.dtype or DTYPES:
            rows = _measure(workload, dtype, arguments.seconds)
            record += rows
            for i, row in enumerate(rows):
                table.add_row(*_cells(row, first=i == 0), end_section=i == len(rows) - 1)
            print(f"measured {workload}, {dtype}", file=sys.stderr)
    return record, table


def _step(arguments: argparse.Namespace, environment: dict[str, Any]) -> tuple[list[dict[str, Any]], Table]:
    from . import step  # here, because it needs mlx-lm

    quick = arguments.seconds < 20
    figures = step.measure(arguments.model, rounds=2 if quick else 7, windows=3 if quick else 6)
    table = Table(
        title=f"Fine-tuning with LoRA, MLX {environment['mlx']}, {environment['device']}, {environment['blas']}",
        caption=f"medians over interleaved runs; ratio: of tokens/s to {step.REFERENCE} within a round, with its range",
    )
    table.add_column("contender")
    for column in ("tokens/s", "ratio", "first step ms", "new shape ms", "traces of 6 shapes", "peak MB", "last loss"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
            f"{row['first_step_ms']:.0f}",
            f"{row['new_shape_ms']:.0f}",
            f"{row['traces']:.0f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['loss']:.5f}",
        )
    return [{"contender": name, **row} for name, row in figures.items()], table


def _saving(arguments: argparse.Namespace, environment: dict[str, Any]) -> tuple[dict[str, Any], Table]:
    from . import saving

    quick = arguments.seconds < 20
    record = saving.measure(millions=10 if quick else 100, rounds=5 if quick else 15)
    table = Table(
        title=f"Saving {record['parameters'] / 1e6:.0f} M parameters and their state, MLX {environment['mlx']}"
    )
    for column in ("contender", "s", "GB/s"):
        table.add_column(column, justify="right")
    for name, seconds in record["seconds"].items():
        table.add_row(name, f"{seconds:.2f}", f"{record['bytes'] / seconds / 1e9:.2f}")
    table.caption = f"ratio {record['ratio']:.2f} (within a round {record['ratios'][0]:.2f}-{record['ratios'][-1]:.2f})"
    return record, table


def _numerics(arguments: argparse.Namespace, environment: dict[str, Any]) -> tuple[list[dict[str, Any]], Table]:
    record = numerics.measure()
    table = Table(
        title=f"{numerics.STEPS} updates of {numerics.SIZE} half-precision weights, MLX {environment['mlx']}",
        caption="movement and decay: of float32's and of the exact; worst: relative error of a weight",
    )
    for column in ("dtype", "learning rate", "contender", "movement", "decay", "worst"):
        table.add_column(column, justify="right")
    for row in record:
        cells = [numerics.percent(row["movement"]), numerics.percent(row["decay"])]
        worst = "nan" if row["worst_error"] is None else f"{row['worst_error']:.1e}"
        table.add_row(row["dtype"], f"{row['learning_rate']:g}", row["contender"], *cells, worst)
    return record, table


def _quality(arguments: argparse.Namespace, environment: dict[str, Any]) -> tuple[list[dict[str, Any]], Table]:
    from . import quality  # here, because it needs mlx-lm

    record = []
    table = Table(title=f"A byte-level language model, {arguments.steps} steps, MLX {environment['mlx']}")
    for column in ("moments", "seed", "eval loss", "state B/parameter"):
        table.add_column(column, justify="right")
    for seed in quality.SEEDS:
        for policy in quality.POLICIES:
            row = quality.train(policy, seed, steps=arguments.steps)
            record.append(row)
            size = f"{row['state_bytes_per_parameter']:.2f}"
            table.add_row(policy, str(seed), f"{row['eval_loss']:.4f}", size)
            print(f"trained {policy}, seed {seed}: eval loss {row['eval_loss']:.4f}", file=sys.stderr)
    return record, table


def _measure(workload: str, dtype: str, seconds: float) -> list[dict[str, Any]]:
    shapes = WORKLOADS[workload]
    figures = measure.compare(
        CONTENDERS,
        lambda: arrays(shapes, DTYPES[dtype], 0.02, seed=0),
        arrays(shapes, DTYPES[dtype], 1e-3, seed=1),
        seconds,
    )
    size = {"tensors": len(shapes), "parameters": parameter_count(shapes)}
    return [
        {"workload": workload, "dtype": dtype, "contender": name, **size, **values} for name, values in figures.items()
    ]


def _update_table(environment: dict[str, Any]) -> Table:
    table = Table(
        title=f"One AdamW update, MLX {environment['mlx']}, {environment['device']}, {environment['cores']} cores",
        caption="median over interleaved rounds; ratio: median of the ratios to mlx eager within a round;"
        " extra: memory allocated during the update",
    )
    for column in ("workload", "dtype", "contender"):
        table.add_column(column)
    for column in ("ms", "p10-p90", "ratio", "us/tensor", "ns/parameter", "extra MB", "kernels/tensor"):
        table.add_column(column, justify="right")
    return table


def _cells(row: dict[str, Any], *, first: bool) -> list[str]:
    return [
        row["workload"] if first else "",
        row["dtype"] if first else "",
        row["contender"],
        f"{row['median_ms']:.1f}",
        f"{row['p10_ms']:.1f}-{row['p90_ms']:.1f}",
        f"{row['ratio']:.2f}",
        f"{1e3 * row['median_ms'] / row['tensors']:.1f}",
        f"{1e6 * row['median_ms'] / row['parameters']:.2f}",
        f"{row['peak_extra_bytes'] / 1e6:.1f}",
        f"{row['kernels'] / row['tensors']:.2f}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=["update", "step", "saving", "numerics", "quality", "distributed"], default="update"
    )
    parser.add_argument("--steps", type=int, default=600, help="of training, for quality (default: 600)")
    parser.add_argument("--model", type=Path, help="for step: a folder with a model (default: the demo's)")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="one of them; repeatable")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="of the parameters; repeatable")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each workload and dtype (default: 20)")
    parser.add_argument("--quick", dest="seconds", action="store_const", const=3.0, help="the same as --seconds 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
