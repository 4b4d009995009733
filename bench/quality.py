"""``python -m bench quality``: does it train as well?

A small byte-level language model is trained on real text, once for each optimizer and dtype of the weights.
The model computes in float32 whatever dtype its weights are stored in, so that runs differ in the update alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pydoc_data import topics
from typing import Any, NamedTuple

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from rich.table import Table

from . import tables
from .measure import Row, Stage

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
STOCK, UNCOMPENSATED = "mlx", "float32 uncompensated"
# Stock AdamW, and ours by how it stores moments. Those that would do the same twice are left out.
POLICIES: dict[str, tuple[str, ...]] = {
    "float32": (STOCK, "float32", "bfloat16", "8bit"),
    "bfloat16": (STOCK, "float32", UNCOMPENSATED, "bfloat16", "8bit", "param"),
}
MAX_NORM = 1.0
STEPS, SEEDS = 600, (0, 1, 2)


class Size(NamedTuple):
    """Of a model and its batches."""

    width: int = 128
    layers: int = 4
    context: int = 128
    batch: int = 8


QUICK = Size(width=64, layers=2, context=32, batch=4)


def text() -> tuple[mx.array, mx.array]:
    """The bytes of Python's help topics, about half a megabyte of English: nine tenths to train on, one to evaluate."""
    data = mx.array(list("".join(topics.topics[key] for key in sorted(topics.topics)).encode()), mx.uint8)
    cut = data.size * 9 // 10
    return data[:cut], data[cut:]


def model(width: int, layers: int) -> nn.Module:
    """A Llama over bytes; 1.07 M parameters at width 128 and 4 layers."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    return llama.Model(arguments)


def loss_fn(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def windows(data: mx.array, count: int, context: int, seed: int) -> mx.array:
    """``count`` random pieces of ``context + 1`` bytes, one a row."""
    starts = mx.random.randint(0, data.size - context - 1, (count, 1), key=mx.random.key(seed))
    return data[starts + mx.arange(context + 1)].astype(mx.int32)


def optimizer(policy: str, steps: int) -> optim.Optimizer:
    """AdamW with a warmup and a cosine; ours clips by itself."""
    rate = ca.schedulers.cosine(3e-3, steps, 3e-4, warmup=steps // 20)
    if policy == STOCK:
        return optim.AdamW(rate, weight_decay=0.1, bias_correction=True)
    return ca.AdamW(
        rate,
        weight_decay=0.1,
        bias_correction=True,
        moments="float32" if policy == UNCOMPENSATED else policy,
        compensated=policy != UNCOMPENSATED,
        max_grad_norm=MAX_NORM,
    )


def stages(dtypes: Sequence[str], seeds: Sequence[int], steps: int, size: Size) -> list[Stage]:
    """A stage for each dtype, seed and policy."""
    return [
        Stage(f"{dtype} weights, {policy}, seed {seed}", partial(_rows, policy, seed, dtype, steps, size))
        for dtype in dtypes
        for seed in seeds
        for policy in POLICIES[dtype]
    ]


def _rows(policy: str, seed: int, dtype: str, steps: int, size: Size) -> list[Row]:
    return [train(policy, seed, dtype, steps, size)]


def train(
    policy: str,
    seed: int,
    dtype: str = "float32",
    steps: int = STEPS,
    size: Size = Size(),  # noqa: B008
) -> dict[str, Any]:
    """Trains one model; the figures of the run. Models of the same seed start alike and see the same batches."""
    train_data, eval_data = text()
    mx.random.seed(seed)
    trained = model(size.width, size.layers)

    def loss(parameters: Any, tokens: mx.array) -> mx.array:
        trained.update(tree_map(lambda p: p.astype(mx.float32), parameters))
        return loss_fn(trained, tokens)

    loss_and_gradient = mx.compile(mx.value_and_grad(loss))
    parameters = tree_map(lambda p: p.astype(DTYPES[dtype]), trained.trainable_parameters())
    adamw = optimizer(policy, steps)
    adamw.init(parameters)
    losses = []
    for i in range(steps):
        value, gradients = loss_and_gradient(
            parameters, windows(train_data, size.batch, size.context, seed * 1_000_000 + i)
        )
        if policy == STOCK:
            gradients, _ = optim.clip_grad_norm(gradients, MAX_NORM)
        parameters = adamw.apply_gradients(gradients, parameters)
        del gradients
        mx.eval(parameters, adamw.state, value)
        losses.append(round(float(value), 5))
    evaluated = [float(loss(parameters, windows(eval_data, size.batch, size.context, i))) for i in range(24)]
    count = sum(array.size for array in dict(tree_flatten(parameters)).values())
    state = sum(array.nbytes for path, array in dict(tree_flatten(adamw.state)).items() if "." in path)
    return {
        "policy": policy,
        "dtype": dtype,
        "seed": seed,
        "steps": steps,
        "parameters": count,
        "state_bytes_per_parameter": state / count,
        "losses": losses,
        "eval_loss": statistics.mean(evaluated),
    }


def table(rows: list[Row], environment: Row) -> Table:
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
    made = tables.table(
        f"A byte-level language model of {rows[0]['parameters'] / 1e6:.2f} M parameters, {rows[0]['steps']} steps,"
        f" MLX {environment['mlx']}",
        "eval loss after training; mlx: stock AdamW, the others: compiled_adam's by how it stores moments; all:"
        " same start, batches, schedule, clipping, weight decay and bias correction; computed in float32 whatever the"
        " weights' dtype; to float32: the mean less that of float32 weights and moments",
        ("weights", "optimizer"),
        (*(f"seed {seed}" for seed in seeds), "mean", "to float32", "state B/parameter"),
    )
    for (dtype, policy), by_seed in runs.items():
        mean = means.get((dtype, policy))
        made.add_row(
            dtype,
            policy,
            *(f"{by_seed[seed]['eval_loss']:.4f}" if seed in by_seed else "-" for seed in seeds),
            "-" if mean is None else f"{mean:.4f}",
            "-" if mean is None or best is None else f"{mean - best:+.4f}",
            f"{next(iter(by_seed.values()))['state_bytes_per_parameter']:.2f}",
        )
    return made
