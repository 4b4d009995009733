"""A whole fine-tuning step: mlx-lm's loop and ours on the same model, batches and seed."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers

import compiled_adam as ca
from compiled_adam.commands import demo

from .spread import noisy, ratios

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


def compare(folder: str | Path, rounds: int, windows: int) -> dict[str, dict[str, Any]]:
    """Every contender in turn, ``rounds`` times; for each a dictionary of figures by name.

    ``tokens_per_second`` (median over windows of ten steps of one shape, without the first twenty), ``ratio`` of it
    to the reference (median of the ratios within a round) with ``ratio_low`` and ``ratio_high`` (least and greatest)
    and ``ratio_noisy``, ``rounds``, ``first_step_ms``, ``new_shape_ms`` (the first step of a shape less the second),
    ``traces`` over six shapes, ``peak_bytes`` and the last ``loss``, which shows that all do the same.
    """
    vocabulary = load(str(folder))[0].args.vocab_size
    steady = [batch(65, vocabulary, seed) for seed in range(WARM_UP + WINDOW * windows)]
    shapes = [batch(length, vocabulary, seed) for length in LENGTHS for seed in (1, 2)]
    found: dict[str, dict[str, list[Any]]] = {name: {} for name in CONTENDERS}
    names = list(CONTENDERS)
    for _ in range(rounds):
        names = names[1:] + names[:1]
        for name in names:
            run = train(name, folder, steady, WINDOW)
            seconds = statistics.median(run["times"][WARM_UP // WINDOW :])
            tokens = WINDOW * BATCH * 64
            traced = train(name, folder, shapes, 1)
            pairs = list(zip(traced["times"][2::2], traced["times"][3::2], strict=True))
            figures = {
                "tokens_per_second": tokens / seconds,
                "first_step_ms": 1e3 * traced["times"][0],
                "new_shape_ms": 1e3 * statistics.median(first - second for first, second in pairs),
                "traces": traced["traces"],
                "peak_bytes": run["peak_bytes"],
                "loss": run["loss"],
            }
            for key, value in figures.items():
                found[name].setdefault(key, []).append(value)
    result = {}
    for name, lists in found.items():
        within = ratios(lists["tokens_per_second"], found[REFERENCE]["tokens_per_second"])
        result[name] = {key: statistics.median(values) for key, values in lists.items()}
        result[name] |= {"ratio": statistics.median(within), "ratio_low": min(within), "ratio_high": max(within)}
        result[name] |= {"ratio_noisy": noisy(within), "rounds": rounds}
    return result


def measure(model: str | None, rounds: int, windows: int) -> dict[str, dict[str, Any]]:
    """`compare` on a model (a folder or an id on the Hugging Face Hub), or on the demo's small Llama."""
    if model is not None:
        return compare(model, rounds, windows)
    with tempfile.TemporaryDirectory() as folder:
        mx.random.seed(0)
        demo.make_model(Path(folder) / "model", demo.texts()[1])
        return compare(Path(folder) / "model", rounds, windows)
