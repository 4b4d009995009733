"""The tables of `step`, `saving`, `numerics` and `quality` as people read them."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from . import numerics
from .spread import NOISY

Row = dict[str, Any]


def step(rows: list[Row], reference: str, environment: Row) -> Table:
    table = Table(
        title=f"Fine-tuning with LoRA, MLX {environment['mlx']}, {environment['device']}, {environment['blas']}",
        caption=f"medians over interleaved runs; ratio: of tokens/s to {reference} within a round, with its range;"
        " extras off: what mlx_lm does, Adam without bias correction; compiled_adam: with bias correction, clipping,"
        f" guard and log; {NOISY}",
    )
    table.add_column("contender")
    for column in ("tokens/s", "ratio", "first step ms", "new shape ms", "traces of 6 shapes", "peak MB", "last loss"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}){' noisy' * row['ratio_noisy']}",
            f"{row['first_step_ms']:.0f}",
            f"{row['new_shape_ms']:.0f}",
            f"{row['traces']:.0f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['loss']:.5f}",
        )
    return table


def saving(record: Row, environment: Row) -> Table:
    table = Table(
        title=f"Saving {record['parameters'] / 1e6:.0f} M parameters and their state, MLX {environment['mlx']}",
        caption=f"ratio {record['ratio']:.2f} (within a round {record['ratios'][0]:.2f}-{record['ratios'][-1]:.2f})"
        f"{', noisy' * record['ratio_noisy']}; {NOISY}",
    )
    for column in ("contender", "s", "GB/s"):
        table.add_column(column, justify="right")
    for name, seconds in record["seconds"].items():
        table.add_row(name, f"{seconds:.2f}", f"{record['bytes'] / seconds / 1e9:.2f}")
    return table


def of_numerics(rows: list[Row], environment: Row) -> Table:
    table = Table(
        title=f"{numerics.STEPS} updates of {numerics.SIZE} half-precision weights, MLX {environment['mlx']}",
        caption="movement and decay: of float32's and of the exact; worst: relative error of a weight",
    )
    for column in ("dtype", "learning rate", "contender", "movement", "decay", "worst"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [numerics.percent(row["movement"]), numerics.percent(row["decay"])]
        worst = "nan" if row["worst_error"] is None else f"{row['worst_error']:.1e}"
        table.add_row(row["dtype"], f"{row['learning_rate']:g}", row["contender"], *cells, worst)
    return table


def quality(rows: list[Row], environment: Row) -> Table:
    """The eval loss of each seed, their mean, and how far it is from ours with float32 weights and moments."""
    seeds = sorted({row["seed"] for row in rows})
    runs: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        runs.setdefault((row["dtype"], row["policy"]), {})[row["seed"]] = row
    means = {  # of runs that ended early there is none: other seeds have another mean
        key: statistics.mean(row["eval_loss"] for row in by_seed.values())
        for key, by_seed in runs.items()
        if by_seed.keys() == set(seeds)
    }
    best = means.get(("float32", "float32"))
    table = Table(
        title=f"A byte-level language model, {rows[0]['steps'] if rows else 0} steps, MLX {environment['mlx']}",
        caption="eval loss after training; mlx: stock AdamW, the others: compiled_adam's by how it stores moments; all:"
        " same start, batches, schedule, clipping, weight decay and bias correction; computed in float32 whatever the"
        " weights' dtype; to float32: the mean less that of float32 weights and moments",
    )
    columns = ("weights", "optimizer", *(f"seed {seed}" for seed in seeds), "mean", "to float32", "state B/parameter")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for (dtype, policy), by_seed in runs.items():
        mean = means.get((dtype, policy))
        table.add_row(
            dtype,
            policy,
            *(f"{by_seed[seed]['eval_loss']:.4f}" if seed in by_seed else "-" for seed in seeds),
            "-" if mean is None else f"{mean:.4f}",
            "-" if mean is None or best is None else f"{mean - best:+.4f}",
            f"{next(iter(by_seed.values()))['state_bytes_per_parameter']:.2f}",
        )
    return table
