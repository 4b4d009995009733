"""Small models, batches and losses for the tests of the step."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


class Net(nn.Module):
    """A frozen layer, batch normalisation and dropout: everything that a step must carry besides parameters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        # No bias before the normalisation: its gradient is zero but for rounding, which Adam would blow up.
        self.layers = [
            nn.Linear(4, 8, bias=False),
            nn.BatchNorm(8),
            nn.Dropout(dropout),
            nn.Linear(8, 8),
            nn.Linear(8, 1),
        ]
        self.layers[3].freeze()

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def net(dropout: float = 0.0) -> Net:
    mx.random.seed(7)
    return Net(dropout)


def squared_error(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return mx.square(model(x) - y).mean()


def batch(step: int = 0, rows: int = 16) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((rows, 4), key=mx.random.key(step))
    return x, x.sum(axis=1, keepdims=True)


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {path: np.array(array) for path, array in tree_flatten(model.parameters())}


def assert_same(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=tolerance, atol=tolerance, err_msg=path)


def masked_error(model: nn.Module, x: mx.array, y: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    tokens = mask.sum()
    return (mx.square(model(x) - y) * mask).sum() / tokens, tokens


def ragged_batch(step: int) -> tuple[mx.array, mx.array, mx.array]:
    """16 rows of which 4 micro-batches of 4 have 1, 4, 2 and 3 that count."""
    counts = [1, 4, 2, 3]
    mask = mx.concatenate([(mx.arange(4) < n)[:, None] for n in counts])
    return *batch(step), mask


def linear_net() -> nn.Module:
    mx.random.seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mx.zeros((2,)), mx.zeros((2,))

    def __call__(self, x: mx.array) -> mx.array:
        return (self.a * x).sum() * 100 + (self.b * x).sum() * 0.01


class Leaves(nn.Module):
    """So many arrays of one size."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        mx.random.seed(7)
        self.leaves = [mx.random.normal((size // 256, 256)) for _ in range(count)]


class Counting(nn.Module):
    """Small and large layers, dropout, and a buffer that counts the forward passes."""

    def __init__(self, dtype: mx.Dtype) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 192, bias=False), nn.Linear(192, 192)
        self.dropout, self.count = nn.Dropout(0.2), mx.array(0)
        self.freeze(recurse=False, keys=["count"])
        self.set_dtype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        self.count = self.count + 1
        return self.second(mx.tanh(self.first(self.dropout(x.astype(self.first.weight.dtype))))) * 0.1
