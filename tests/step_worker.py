"""What each worker of tests/test_distributed.py runs: updates of a small net on its part of the same global batches.

Arguments: a JSON object of options. Writes losses, norms and weights to ``<out>-<rank>.safetensors`` and prints a JSON
object of counts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import compiled_adam as ca

ROWS, UPDATES = 16, 6
calls: list[int] = []  # bytes of each all_sum, while it is traced


def counted(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    calls.append(x.nbytes)
    return all_sum(x, group=group, stream=stream)


all_sum = mx.distributed.all_sum


def model(options: dict[str, Any]) -> nn.Module:
    mx.random.seed(7)
    width = options.get("width", 8)
    made = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    made.set_dtype(getattr(mx, options.get("dtype", "float32")))
    return made


def masked_error(model: nn.Module, x: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    tokens = mask.sum()
    error = mx.square(model(x).astype(mx.float32) - x.sum(axis=1, keepdims=True)) * mask
    return error.sum() / tokens, tokens


def batch(index: int, poisoned: bool) -> tuple[mx.array, mx.array]:
    """Rows of which some count; in every third batch none of the odd ones does. In a poisoned one row 1 is nan."""
    x = mx.random.normal((ROWS, 4), key=mx.random.key(index))
    mask = mx.random.uniform(shape=(ROWS, 1), key=mx.random.key(1000 + index)) < 0.6
    if index % 3 == 2:
        mask = mx.logical_and(mask, (mx.arange(ROWS) % 2 == 0)[:, None])
    if poisoned:
        x[1, 0] = float("nan")
        mask[1] = True
    return x, mask


def main(options: dict[str, Any]) -> None:
    world = mx.distributed.init()
    rank, size = world.rank(), world.size()
    mx.distributed.all_sum = counted
    net = model(options)
    rate = 0.02
    if options.get("differs") == "parameters" and rank == 1:
        net.layers[0].bias = net.layers[0].bias + 1e-6
    if options.get("differs") == "settings" and rank == size - 1:
        rate = 0.03
    optimizer = ca.AdamW(
        ca.schedulers.cosine(rate, 50),
        bias_correction=True,
        max_grad_norm=0.1,
        skip_nonfinite=True,
        moments=options.get("moments", "float32"),
    )
    accumulate = options.get("accumulate", 1)
    group = {"world": world, None: None}[options.get("group", "world")]
    step = ca.make_step(
        net,
        masked_error,
        optimizer,
        accumulate=accumulate,
        weighted=True,
        group=group,
        reduce_dtype=options.get("reduce_dtype", "float32"),
    )
    start = 0
    if "load" in options:
        start = ca.load_checkpoint(options["load"], step)["batch"]
    losses, norms, votes = [], [], []
    calls.clear()
    for index in range(start, options.get("batches", UPDATES * accumulate)):
        x, mask = batch(index, index == options.get("poisoned"))
        step.vote = float(rank + 1 if index == 1 else 0)
        result = step(x[rank::size], mask[rank::size])
        tokens = result.aux[0].astype(mx.float32)
        parts = mx.stack([mx.where(tokens > 0, result.loss * tokens, 0.0), tokens])
        sums = all_sum(parts, group=world)
        losses.append((sums[0] / sums[1]).item())
        if result.updated:
            norms.append(result.grad_norm.item())
            votes.append(None if result.votes is None else result.votes.item())
    if "save" in options:
        ca.save_checkpoint(options["save"], step, {"batch": options["batches"]})
    flushed = step.flush() if "save" not in options else None
    if flushed is not None:
        losses.append(flushed.loss.item())
    arrays = dict(tree_flatten(net.parameters())) | {"losses": mx.array(losses), "norms": mx.array(norms)}
    mx.save_safetensors(f"{options['out']}-{rank}.safetensors", arrays)
    skipped = optimizer.skipped
    print(json.dumps({"calls": calls, "votes": votes, "traces": step.traces, "skipped": skipped.item()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
