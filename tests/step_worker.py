"""What workers of tests/test_distributed.py run: updates of a small net, each on its part of the same global batches.

The argument is a JSON list of jobs, each an object of options. For each a worker writes losses, norms and weights to
``<name>-<rank>.safetensors``, and prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from compiled_adam.distributed import reduce, shard
from compiled_adam.optimizers import any_optimizer
from mlx.utils import tree_flatten

from tests import count_calls

ROWS = 16
bytes_sent: list[int] = []  # of each all_sum, while it is traced
bytes_gathered: list[int] = []  # of each all_gather, likewise
all_sum, all_gather, rounds = mx.distributed.all_sum, mx.distributed.all_gather, shard.rounds


def counted(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    bytes_sent.append(x.nbytes)
    return all_sum(x, group=group, stream=stream)


def counted_gather(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    gathered = all_gather(x, group=group, stream=stream)
    bytes_gathered.append(gathered.nbytes)
    return gathered


def model(dtype: str, width: int = 8, depth: int = 0) -> nn.Module:
    """``depth`` square layers between two others; "mixed" is half precision but for the last layer."""
    mx.random.seed(7)
    square = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    made = nn.Sequential(nn.Linear(4, width), nn.Tanh(), *square, nn.Linear(width, 1))
    made.set_dtype(mx.bfloat16 if dtype == "mixed" else getattr(mx, dtype))
    if dtype == "mixed":
        made.layers[-1].set_dtype(mx.float32)
    return made


def optimizer_of(options: dict[str, Any], rate: float) -> optim.Optimizer:
    if name := options.get("stock"):
        return getattr(optim, name)(optim.cosine_decay(rate, 10))
    own = {"max_grad_norm": 0.5, "skip_nonfinite": True, **options.get("optimizer", {})}
    if options.get("several") == "compensated":
        made = optim.MultiOptimizer([optim.Muon(optim.cosine_decay(rate, 10)), optim.AdamW(rate)], [matrix])
        return ca.Compensated(made, max_grad_norm=0.5, skip_nonfinite=True)
    if options.get("several") == "nested":
        inner = [ca.AdamW(rate, **own), ca.Compensated(optim.Lion(rate), max_grad_norm=0.1)]
        inside = optim.MultiOptimizer(inner, [lambda path, _: "layers.0." in path])
        return optim.MultiOptimizer([optim.Adafactor(), inside], [matrix])
    return ca.AdamW(rate, bias_correction=True, **own)


def matrix(path: str, parameter: mx.array) -> bool:
    return parameter.ndim == 2


def masked_error(model: nn.Module, x: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    tokens = mask.sum()
    error = mx.square(model(x).astype(mx.float32) - x.sum(axis=1, keepdims=True)) * mask
    return error.sum() / tokens, tokens


def batch(index: int, poisoned: bool, empty: bool) -> tuple[mx.array, mx.array]:
    """Rows of which some count; in every third batch none of the odd ones does; in an ``empty`` one none at all.

    In a poisoned one row 1 is nan.
    """
    chance = np.random.default_rng(index)
    x, mask = chance.standard_normal((ROWS, 4)).astype(np.float32), chance.random((ROWS, 1)) < 0.6
    if index % 3 == 2:
        mask[1::2] = False
    if empty:
        mask[:] = False
    if poisoned:
        x[1], mask[1] = np.nan, True
    return mx.array(x), mx.array(mask)


def job(name: str, options: dict[str, Any]) -> dict[str, Any]:
    world = mx.distributed.init()
    rank, size = world.rank(), world.size()
    net = model(options.get("dtype", "float32"), options.get("width", 8), options.get("depth", 0))
    rate = 0.02
    if options.get("differs") == "parameters" and rank == 1:
        net.layers[0].bias = net.layers[0].bias + 1e-6
    if options.get("differs") == "settings" and rank == 1:
        rate = 0.03
    optimizer = optimizer_of(options, rate)
    accumulate = options.get("accumulate", 1)
    count_calls.limit = limit = options.get("limit", reduce.LIMIT)
    shard.rounds = partial(rounds, limit=limit)
    step = ca.make_step(
        net,
        masked_error,
        optimizer,
        accumulate=accumulate,
        weighted=True,
        group=world,
        reduce_dtype=options.get("reduce_dtype", "float32"),
        shard_state=options.get("shard_state", False),
    )
    if "resume" in options:
        ca.load_checkpoint(options["resume"], step)
    bytes_sent.clear()
    bytes_gathered.clear()
    count_calls.counts.clear()
    losses, norms, votes = [], [], []
    for index in range(options.get("first", 0), options.get("batches", 6)):
        x, mask = batch(index, index == options.get("poisoned"), index == options.get("empty"))
        step.extra = float(rank + 1 if index == 1 else 0)
        result = step(x[rank::size], mask[rank::size])
        tokens = result.aux[0].astype(mx.float32)
        sums = all_sum(mx.stack([mx.where(tokens > 0, result.loss * tokens, 0.0), tokens]), group=world)
        losses.append((sums[0] / sums[1]).item())
        if result.updated:
            assert result.grad_norm is not None
            norms.append(result.grad_norm.item())
            votes.append(None if result.extra is None else result.extra.item())
    gathered = list(bytes_gathered)
    ca.save_checkpoint(f"{name}-checkpoint", step)  # in the middle of a window, if there is one
    flushed = step.flush()
    if flushed is not None:
        losses.append(flushed.loss.item())
    arrays = dict(tree_flatten(net.parameters())) | {"losses": mx.array(losses or 0.0), "norms": mx.array(norms or 0.0)}
    mx.save_safetensors(f"{name}-{rank}.safetensors", arrays)
    state = any_optimizer.flat_state(optimizer)
    counts = {"bytes": list(bytes_sent), "calls": list(count_calls.counts), "gathered": gathered}
    counts |= {"state": sum(a.nbytes for a in state.values()), "updates": any_optimizer.parts(optimizer)[0].step.item()}
    counted = getattr(optimizer, "skipped", None)
    skipped = None if counted is None else counted.item()
    return counts | {"votes": votes, "traces": step.traces, "skipped": skipped}


if __name__ == "__main__":
    mx.distributed.all_sum, mx.distributed.all_gather = counted, counted_gather
    for name, options in json.loads(sys.argv[1]).items():
        try:
            print(json.dumps(job(name, options)))
        except ValueError as error:
            print(json.dumps({"error": str(error)}))
