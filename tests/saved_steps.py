"""Steps with everything that a checkpoint has, and their comparison."""

from __future__ import annotations

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tests.nets import batch, masked_error, net

FILES = ["weights.safetensors", "optimizer.safetensors", "window.safetensors", "meta.json"]  # of a checkpoint


def weighted_error(model: nn.Module, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    return masked_error(model, x, y, mx.ones((x.shape[0], 1), x.dtype))


def make(policy: str = "float32", dtype: mx.Dtype = mx.float32, accumulate: int = 3, rate=None) -> ca.TrainStep:
    """A step of a net with dropout, batch normalisation and a frozen layer."""
    model = net(dropout=0.3)
    model.set_dtype(dtype)
    rate = ca.schedulers.cosine(1e-2, 20, warmup=3) if rate is None else rate
    optimizer = ca.AdamW(rate, weight_decay=0.1, moments=policy, max_grad_norm=1.0, skip_nonfinite=True)
    return ca.make_step(model, weighted_error, optimizer, accumulate=accumulate, weighted=True)


def advance(step: ca.TrainStep, first: int, last: int) -> list[float]:
    dtype = step.model.layers[0].weight.dtype
    return [step(*(array.astype(dtype) for array in batch(i))).loss.item() for i in range(first, last)]


def everything(step: ca.TrainStep) -> dict[str, mx.array]:
    model, random = tree_flatten(step.model.parameters()), step.state_dict()["random"]["key"]
    return dict(model) | {f"state.{k}": v for k, v in tree_flatten(step.optimizer.state)} | {"random": random}


def assert_identical(a: dict[str, mx.array], b: dict[str, mx.array]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and mx.array_equal(a[path], b[path], equal_nan=True).item(), path
