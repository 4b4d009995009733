"""``python -m bench traces``: what a new batch shape costs, ours against a whole step under one ``mx.compile``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.table import Table

import compiled_adam as ca

from .spread import NOISY, noisy, ratios, spread

LAYERS, WIDTH, VOCABULARY, BATCH = 32, 64, 256, 2  # 32 layers of 7 linear layers: 448 tensors of adapters
LENGTHS = tuple(range(9, 33, 2))  # short: a slow BLAS would take seconds for a step, and its noise is not a trace
RATE = 1e-5
Batch = tuple[mx.array, mx.array]
Step = Callable[[mx.array, mx.array], Any]  # does the whole step, and waits for it


def model() -> nn.Module:
    """A Llama as deep as one of 7 B parameters and so narrow that tracing is most of a first step."""
    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=2 * WIDTH,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )
    made = llama.Model(arguments)
    made.freeze()
    linear_to_lora_layers(made, LAYERS, {"rank": 8, "dropout": 0.0, "scale": 20.0})
    mx.eval(made.parameters())
    return made


class Counted:
    """mlx-lm's loss, and how often its Python ran: once for each trace."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(self, model: nn.Module, tokens: mx.array, lengths: mx.array) -> Any:
        self.traces += 1
        return default_loss(model, tokens, lengths)


def whole_step(loss: Counted) -> Step:
    """One compiled function with captured state, written as `mlx_lm.tuner.trainer.train` writes it."""
    trained, optimizer = model(), optim.Adam(RATE)
    loss_and_gradient = nn.value_and_grad(trained, loss)
    state = [trained.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, lengths: mx.array) -> Any:
        (value, count), gradient = loss_and_gradient(trained, tokens, lengths)
        optimizer.update(trained, gradient)
        return value, count

    def run(tokens: mx.array, lengths: mx.array) -> Any:
        value, count = step(tokens, lengths)
        mx.eval(state, value, count)
        return value

    return run


def our_step(loss: Counted) -> Step:
    trained = model()
    step = ca.make_step(trained, loss, ca.Adam(RATE), weighted=True)

    def run(tokens: mx.array, lengths: mx.array) -> Any:
        result = step(tokens, lengths)
        mx.eval(trained.trainable_parameters(), step.optimizer.state, result.loss)
        return result.loss

    return run


WHOLE, OURS = "mx.compile of the whole step", "compiled_adam.make_step"
CONTENDERS: dict[str, Callable[[Counted], Step]] = {WHOLE: whole_step, OURS: our_step}


def batch(length: int) -> Batch:
    tokens = mx.random.randint(1, VOCABULARY, (BATCH, length), key=mx.random.key(length))
    return tokens, mx.array([[0, length - 1]] * BATCH)


def measure(shapes: int) -> dict[str, Any]:
    """Three steps on each of ``shapes`` sequence lengths, the contenders in turn: a dictionary with a list of rows.

    For each contender ``traces`` (of the loss), ``first_step_ms``, and over the shapes after the first ``new_shape_ms``
    with ``p10_ms`` and ``p90_ms``: what the first step of a shape takes longer than those after it, tracing and all
    that a trace entails; ``ratio`` to the whole step with its spread; ``loss``, the last, which shows that both do the
    same.
    """
    losses = {name: Counted() for name in CONTENDERS}
    steps = {name: make(losses[name]) for name, make in CONTENDERS.items()}
    extra: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    first: dict[str, float] = {}
    values: dict[str, float] = {}
    names = list(CONTENDERS)
    for length in LENGTHS[:shapes]:
        names.reverse()
        for name in names:
            times = []
            for _ in range(3):
                arrays = batch(length)
                mx.eval(arrays)
                begin = time.perf_counter()
                values[name] = float(steps[name](*arrays))
                times.append(1e3 * (time.perf_counter() - begin))
            if name not in first:
                first[name] = times[0]
            else:
                extra[name].append(times[0] - statistics.median(times[1:]))
    tensors = len(tree_flatten(model().trainable_parameters()))
    rows = []
    for name in CONTENDERS:
        within = ratios(extra[name], extra[WHOLE])
        (p10, median, p90), (low, ratio, high) = spread(extra[name]), spread(within)
        rows.append(
            {
                "contender": name,
                "traces": losses[name].traces,
                "first_step_ms": first[name],
                "new_shape_ms": median,
                "p10_ms": p10,
                "p90_ms": p90,
                "ratio": ratio,
                "ratio_p10": low,
                "ratio_p90": high,
                "ratio_noisy": noisy(within),
                "loss": values[name],
            }
        )
    return {"tensors": tensors, "shapes": shapes, "rows": rows}


def table(record: dict[str, Any], environment: dict[str, Any]) -> Table:
    result = Table(
        title=f"{record['shapes']} batch shapes, LoRA of {record['tensors']} tensors, MLX {environment['mlx']},"
        f" {environment['device']}",
        caption="traces: of the loss and its gradient; new shape: what the first step of a shape takes longer than the"
        f" next two, median over shapes; ratio to {WHOLE} for the same shape; {NOISY}",
    )
    result.add_column("contender")
    for column in ("traces", "first step ms", "new shape ms", "p10-p90", "ratio", "last loss"):
        result.add_column(column, justify="right")
    for row in record["rows"]:
        ratio = "1"
        if row["contender"] != WHOLE:
            ratio = f"{row['ratio']:.2f} ({row['ratio_p10']:.2f}-{row['ratio_p90']:.2f})"
            ratio += " noisy" if row["ratio_noisy"] else ""
        result.add_row(
            row["contender"],
            f"{row['traces']}",
            f"{row['first_step_ms']:.0f}",
            f"{row['new_shape_ms']:.0f}",
            f"{row['p10_ms']:.0f}-{row['p90_ms']:.0f}",
            ratio,
            f"{row['loss']:.5f}",
        )
    return result
