"""``python -m bench step``: how fast is a whole step, mlx-lm's loop and ours on the same model, batches and seed?

mlx-lm's loop is the stock recipe: forward, backward and update under one ``mx.compile``. Ours steps with `make_step`.
"""

from __future__ import annotations

import contextlib
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.table import Table

import compiled_adam as ca
from compiled_adam.commands import demo

from . import tables
from .measure import NOISY, Row, Stage, noisy

NEVER = 1 << 62  # bytes of cache that no machine has
RATE = 1e-5

Train = Callable[..., None]
# Name -> (loop, optimizer, clear_cache_threshold, keywords of the loop).
CONTENDERS: dict[str, tuple[Train, Callable[[], optim.Optimizer], int, dict[str, Any]]] = {
    "mlx_lm": (trainer.train, lambda: optim.Adam(RATE), 0, {}),
    "mlx_lm, cache kept": (trainer.train, lambda: optim.Adam(RATE), NEVER, {}),
    "compiled_adam, extras off": (ca.train, lambda: ca.Adam(RATE), 0, {}),
    "compiled_adam": (
        ca.train,
        lambda: ca.Adam(RATE, bias_correction=True, skip_nonfinite=True, max_grad_norm=1.0),
        0,
        {"log": True},
    ),
}
REFERENCE = "mlx_lm, cache kept"
BATCH, WARM_UP, WINDOW = 4, 20, 10
LENGTHS = (33, 65, 97, 129, 161, 193)  # mlx-lm's padded lengths

Batch = tuple[mx.array, mx.array]


class _Clock(TrainingCallback):
    """When each report was made; everything before it has been computed then."""

    def __init__(self) -> None:
        self.reports: list[float] = []
        self.loss = float("nan")

    def on_train_loss_report(self, train_info: dict) -> None:
        self.reports.append(time.perf_counter())
        self.loss = train_info["train_loss"]


def batch(length: int, vocabulary: int, seed: int) -> Batch:
    """``BATCH`` sequences of random tokens without padding."""
    tokens = np.random.default_rng(seed).integers(1, vocabulary, (BATCH, length))
    return mx.array(tokens.astype(np.int32)), mx.array([[0, length - 1]] * BATCH)


def train(name: str, folder: str | Path, batches: Sequence[Batch], window: int) -> dict[str, Any]:
    """One run over ``batches``: seconds until the first report and between reports, traces, peak memory, last loss."""
    loop, optimizer, threshold, options = CONTENDERS[name]
    mx.random.seed(0)
    model = load(str(folder))[0]
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "dropout": 0.0, "scale": 20.0})
    mx.eval(model.parameters())
    traced = 0

    def loss(model: Any, tokens: mx.array, lengths: mx.array) -> Any:
        nonlocal traced
        traced += 1  # its Python runs once for each trace
        return trainer.default_loss(model, tokens, lengths)

    def given(dataset: Any, **_: Any) -> Iterator[Batch]:
        return iter(batches)

    clock = _Clock()
    mx.clear_cache()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        args = trainer.TrainingArgs(
            batch_size=BATCH,
            iters=len(batches),
            steps_per_report=window,
            steps_per_save=len(batches) + 1,
            adapter_file=str(Path(out) / "adapters.safetensors"),
            clear_cache_threshold=threshold,
        )
        start = time.perf_counter()
        loop(model, optimizer(), [0], args=args, loss=loss, iterate_batches=given, training_callback=clock, **options)
    times = [b - a for a, b in zip([start, *clock.reports], clock.reports, strict=False)]
    return {"times": times, "traces": traced, "peak_bytes": mx.get_peak_memory(), "loss": clock.loss}


def stages(folder: str | Path, rounds: int, windows: int) -> list[Stage]:
    """Every contender ``rounds`` times, a stage for each run, in a new order each round; `summary` makes rows of it."""
    vocabulary = load(str(folder))[0].args.vocab_size
    steady = [batch(65, vocabulary, seed) for seed in range(WARM_UP + WINDOW * windows)]
    shapes = [batch(length, vocabulary, seed) for length in LENGTHS for seed in (1, 2)]
    names = list(CONTENDERS)
    shuffle = random.Random(0).shuffle
    made = []
    for i in range(rounds):
        shuffle(names)
        made += [Stage(f"round {i + 1}, {name}", partial(_run, name, folder, steady, shapes)) for name in names]
    return made


def _run(name: str, folder: str | Path, steady: Sequence[Batch], shapes: Sequence[Batch]) -> list[Row]:
    run = train(name, folder, steady, WINDOW)
    seconds = statistics.median(run["times"][WARM_UP // WINDOW :])
    traced = train(name, folder, shapes, 1)
    pairs = list(zip(traced["times"][2::2], traced["times"][3::2], strict=True))
    figures = {
        "tokens_per_second": WINDOW * BATCH * 64 / seconds,
        "first_step_ms": 1e3 * traced["times"][0],
        "new_shape_ms": 1e3 * statistics.median(first - second for first, second in pairs),
        "traces": traced["traces"],
        "peak_bytes": run["peak_bytes"],
        "loss": run["loss"],
    }
    return [{"contender": name, **figures}]


def summary(runs: list[Row]) -> list[Row]:
    """A row for each contender over the rounds that all have finished.

    ``tokens_per_second`` (median over windows of ten steps of one shape, without the first twenty), ``ratio`` of it
    to the reference (median of the ratios within a round) with ``ratio_low`` and ``ratio_high`` (least and greatest)
    and ``ratio_noisy``, ``rounds``, ``first_step_ms``, ``new_shape_ms`` (the first step of a shape less the second),
    ``traces`` over six shapes, ``peak_bytes`` and the last ``loss``, which shows that all do the same.
    """
    of = {name: [run for run in runs if run["contender"] == name] for name in CONTENDERS}
    rounds = min(map(len, of.values()))
    if rounds == 0:
        return []
    rows = []
    for name in CONTENDERS:
        own = of[name][:rounds]
        within = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(own, of[REFERENCE], strict=False)]
        row = {key: statistics.median(run[key] for run in own) for key in own[0] if key != "contender"}
        row |= {"ratio": statistics.median(within), "ratio_low": min(within), "ratio_high": max(within)}
        rows.append({"contender": name, **row, "ratio_noisy": noisy(within), "rounds": rounds})
    return rows


@contextlib.contextmanager
def folder_of(model: str | None) -> Iterator[str]:
    """The folder of a model (or its id on the Hugging Face Hub), or else of the demo's small Llama, made here."""
    if model is not None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        mx.random.seed(0)
        demo.make_model(Path(folder) / "model", demo.texts()[1])
        yield str(Path(folder) / "model")


def table(rows: list[Row], environment: Row) -> Table:
    made = tables.table(
        f"Fine-tuning with LoRA, MLX {environment['mlx']}, {environment['device']}, {environment['blas']}",
        f"medians over interleaved runs; ratio: of tokens/s to {REFERENCE} within a round, with its range; extras off:"
        " what mlx_lm does, Adam without bias correction; compiled_adam: with bias correction, clipping, guard and log;"
        f" {NOISY}",
        ("contender",),
        ("tokens/s", "ratio", "first step ms", "new shape ms", "traces of 6 shapes", "peak MB", "last loss"),
    )
    for row in rows:
        made.add_row(
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}){' noisy' * row['ratio_noisy']}",
            f"{row['first_step_ms']:.0f}",
            f"{row['new_shape_ms']:.0f}",
            f"{row['traces']:.0f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['loss']:.5f}",
        )
    return made
