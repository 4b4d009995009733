"""``python -m bench step``: how fast and how large is a whole fine-tuning, by ``mlx_lm.lora`` and by ours?

Both commands train the same model on the same examples for one epoch, from the same seed.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from rich.table import Table

from . import jobs, tables
from .jobs import Job
from .measure import NOISY, Row, Stage, noisy

REFERENCE = "mlx_lm.lora"
# mlx-lm's Adam has no bias correction, so its first updates are larger. With the same Adam on both sides, a difference
# of the held-out losses comes from the batches and from the loss in chunks.
SAME_ADAM = "--no-bias-correction"
# Name -> the command, and its options beside those of the job.
CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    REFERENCE: (REFERENCE, ()),
    "compiled-adam lora": ("compiled-adam lora", (SAME_ADAM,)),
    "compiled-adam lora --batch-tokens": ("compiled-adam lora", (SAME_ADAM, "--batch-tokens", "1024")),
}
_LARGE = Job(hidden=64, vocabulary=100_352, examples=8, length=512, pretraining=0, options=("--grad-checkpoint",))
QUICK = {
    "mixed lengths": Job(examples=24, pretraining=20),
    "mixed lengths, prompts masked": Job(examples=24, masked=True, pretraining=20),
}
JOBS: dict[str, Job] = {
    "mixed lengths": Job(),
    "mixed lengths, prompts masked": Job(masked=True),
    "large vocabulary, 4 x 512": _LARGE,
}


@contextlib.contextmanager
def folders(chosen: Mapping[str, Job]) -> Iterator[dict[str, Path]]:
    """A folder with the model and the data of each job."""
    with tempfile.TemporaryDirectory() as top:
        made = {name: Path(top) / str(i) for i, name in enumerate(chosen)}
        for name, folder in made.items():
            folder.mkdir()
            jobs.make(folder, chosen[name])
        yield made


def of_model(model: str) -> dict[str, Job]:
    """The job of a user's own model."""
    return {"mixed lengths": Job(model=model)}


def stages(made: Mapping[str, Path], chosen: Mapping[str, Job], rounds: int) -> list[Stage]:
    """Each job by every contender, ``rounds`` times with another seed, in a new order each round."""
    names = list(CONTENDERS)
    shuffle = random.Random(0).shuffle
    found = []
    for i in range(rounds):
        for job in chosen:
            shuffle(names)
            for name in names:
                stage = partial(_run, name, job, made[job], chosen[job], i)
                found.append(Stage(f"round {i + 1}, {job}, {name}", stage))
    return found


def _run(name: str, job: str, folder: Path, what: Job, seed: int) -> list[Row]:
    command, options = CONTENDERS[name]
    return [{"job": job, "contender": name, "seed": seed, **jobs.run(folder, what, command, options, seed)}]


def summary(runs: list[Row]) -> list[Row]:
    """A row for each job and contender over the rounds that all contenders have finished.

    Medians of the figures of `jobs.run`, and the ratios to mlx-lm within a round: ``ratio`` of the tokens per second
    with ``ratio_low``, ``ratio_high`` and ``ratio_noisy``; ``memory_ratio`` of the peaks; ``first_step_ratio``, and
    ``held_out_ratio``, of which the farthest from 1.
    """
    rows = []
    for job in dict.fromkeys(run["job"] for run in runs):
        of = {name: [run for run in runs if run["job"] == job and run["contender"] == name] for name in CONTENDERS}
        rounds = min(map(len, of.values()))
        for name in CONTENDERS if rounds else ():
            own, stock = of[name][:rounds], of[REFERENCE][:rounds]

            def within(key: str, own: list[Row] = own, stock: list[Row] = stock) -> list[float]:
                return [a[key] / b[key] for a, b in zip(own, stock, strict=True)]

            row: Row = {key: statistics.median(run[key] for run in own) for key in jobs.FIGURES if key in own[0]}
            speeds = within("tokens_per_second")
            row |= {"ratio": statistics.median(speeds), "ratio_low": min(speeds), "ratio_high": max(speeds)}
            row |= {"memory_ratio": statistics.median(within("peak_bytes"))}
            if "first_step_ms" in row:
                row |= {"first_step_ratio": statistics.median(within("first_step_ms"))}
            if "held_out" in row:
                row |= {"held_out_ratio": max(within("held_out"), key=lambda ratio: abs(ratio - 1))}
            rows.append({"job": job, "contender": name, **row, "ratio_noisy": noisy(speeds), "rounds": rounds})
    return rows


def table(rows: list[Row], environment: Row) -> Table:
    made = tables.table(
        f"One epoch of LoRA, MLX {environment['mlx']}, {environment['device']}, {environment['blas']}",
        f"medians over interleaved runs, ours with {SAME_ADAM}; in brackets: to mlx_lm.lora within a round, of the"
        " held-out loss the farthest from 1; tokens: those that are learned; memory: the peak above the weights;"
        f" {NOISY}",
        ("job", "contender"),
        ("tokens/s", "positions per token", "shapes", "memory", "first step", "held-out loss"),
    )
    last = None
    for row in rows:
        if last not in (None, row["job"]):
            made.add_section()
        made.add_row(
            row["job"] if row["job"] != last else "",
            row["contender"],
            f"{row['tokens_per_second']:,.0f} ({row['ratio']:.2f}, {row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
            f"{' noisy' * row['ratio_noisy']}",
            f"{row['positions_per_token']:.2f}",
            f"{row['shapes']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f} MB ({row['memory_ratio']:.2f})",
            f"{row['first_step_ms']:.0f} ms ({row['first_step_ratio']:.2f})" if "first_step_ms" in row else "-",
            f"{row['held_out']:.4f} ({row['held_out_ratio']:.4f})" if "held_out" in row else "-",
        )
        last = row["job"]
    return made
