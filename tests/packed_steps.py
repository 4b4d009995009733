"""A model of many small parameters, trained by a step that packs them and by the optimizer alone."""

from __future__ import annotations

from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from compiled_adam.update import packing, residual
from mlx.utils import tree_flatten


class Many(nn.Module):
    """Many small parameters of two shapes beside one that is too large to be packed."""

    def __init__(self, dtype: mx.Dtype = mx.float32, count: int = 12) -> None:
        super().__init__()
        mx.random.seed(3)
        self.scales = [mx.random.normal((4,)).astype(dtype) for _ in range(count)]
        self.tables = [mx.random.normal((3, 4)).astype(dtype) for _ in range(count)]
        self.large = mx.random.normal((packing.SMALL // 4 + 1, 4)).astype(dtype)
        self.scalar = mx.array(0.5, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        for scale, table in zip(self.scales, self.tables, strict=True):
            x = mx.tanh(x * scale + (x[:, :3] @ table)) * self.scalar
        return x @ self.large[:7].T + self.large.mean()


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return mx.square(model(x).astype(mx.float32) - 1).mean()


def batch(i: int) -> mx.array:
    return mx.random.normal((5, 4), key=mx.random.key(100 + i))


def optimizer(**options) -> ca.AdamW:
    return ca.AdamW(**{"learning_rate": 1e-2, "weight_decay": 0.1, "bias_correction": True} | options)


def values(model: nn.Module, state: dict) -> dict[str, np.ndarray]:
    """Everything, as float32; weights that have a residual as what both stand for."""
    arrays = dict(tree_flatten({"model": model.parameters(), "state": state}))
    for path in [path for path in arrays if path.endswith(".residual")]:
        weight = path.replace("state", "model", 1).removesuffix(".residual")
        arrays[weight] = residual.join(arrays[weight], arrays.pop(path))
    return {path: np.array(array.astype(mx.float32)) for path, array in arrays.items()}


def compared(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        # The norm is summed in another order, and products and sums are contracted in other kernels: a last bit each
        # time, which Adam divides by the gradient's own size.
        np.testing.assert_allclose(found[path], array, rtol=2e-5, atol=1e-6, err_msg=path)


Edit = Callable[[nn.Module, ca.Adam], None]


def eagerly(edits: dict[int, Edit], dtype: mx.Dtype, steps: int = 6, **options) -> dict[str, np.ndarray]:
    model, adam = Many(dtype), optimizer(**options)
    value_and_grad = nn.value_and_grad(model, loss_fn)
    for i in range(steps):
        if i in edits:
            edits[i](model, adam)
        _, gradients = value_and_grad(model, batch(i))
        adam.update(model, gradients)
        mx.eval(model.parameters(), adam.state)
    return values(model, adam.state)


def packed(edits: dict[int, Edit], dtype: mx.Dtype, steps: int = 6, **options) -> dict[str, np.ndarray]:
    model, adam = Many(dtype), optimizer(**options)
    step = ca.make_step(model, loss_fn, adam)
    for i in range(steps):
        if i in edits:
            edits[i](model, adam)
        step(batch(i))
    assert step.traces["update"] == 1
    return values(model, adam.state)
