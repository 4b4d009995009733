"""Models and batches for the fuzzer: small, but of everything that a module may be made of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

INPUTS = 5
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# What a model can have between its first and its last layer.
BLOCKS = (
    "linear",
    "layer norm",
    "rms norm",
    "batch norm",
    "conv",
    "dict",
    "digits",
    "list",
    "shared",
    "frozen",
    "bare",
)


class Shape(NamedTuple):
    """A model: its blocks in order, its width and its dtype."""

    blocks: tuple[str, ...]
    width: int
    dtype: str


class Bare(nn.Module):
    """An array that no layer owns, and a module without parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = mx.ones((width,))
        self.nothing = nn.Tanh()
        self.note = "an attribute that is no array"

    def __call__(self, x: mx.array) -> mx.array:
        return self.nothing(x * self.scale)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(1, 1, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.inner(x[..., None])[..., 0]


class Named(nn.Module):
    """Modules in a dictionary."""

    def __init__(self, keys: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.parts = {key: nn.Linear(width, width) for key in keys}

    def __call__(self, x: mx.array) -> mx.array:
        return sum(part(x) for part in self.parts.values()) / len(self.parts)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = self.first

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(mx.tanh(self.first(x)))


class Stack(nn.Module):
    """Nested lists, one of which may hold what has no parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = [[nn.Linear(width, width, bias=False), nn.Dropout(0.0)], [nn.Linear(width, width)]]

    def __call__(self, x: mx.array) -> mx.array:
        for row in self.rows:
            for layer in row:
                x = layer(x)
        return x


def _block(name: str, width: int) -> nn.Module:
    if name == "frozen":
        layer = nn.Linear(width, width)
        layer.freeze()
        return layer
    made = {
        "linear": lambda: nn.Linear(width, width),
        "layer norm": lambda: nn.LayerNorm(width),
        "rms norm": lambda: nn.RMSNorm(width),
        "batch norm": lambda: nn.BatchNorm(width),
        "conv": Conv,
        "dict": lambda: Named(("left", "right"), width),
        "digits": lambda: Named(("0", "1"), width),
        "list": lambda: Stack(width),
        "shared": lambda: Twice(width),
        "bare": lambda: Bare(width),
    }
    return made[name]()


class Net(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, shape.width)
        self.blocks = [_block(name, shape.width) for name in shape.blocks]
        self.last = nn.Linear(shape.width, 1)

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.tanh(self.first(x))
        for block in self.blocks:
            x = mx.tanh(block(x))
        return self.last(x)


def build(shape: Shape) -> Net:
    mx.random.seed(len(shape.blocks))
    model = Net(shape)
    model.set_dtype(DTYPES[shape.dtype])
    mx.eval(model.parameters())
    return model


def loss_fn(model: nn.Module, x: mx.array, y: mx.array, mask: mx.array, fail: str = "") -> tuple[mx.array, mx.array]:
    """The mean squared error over what ``mask`` counts, and how much that is; ``fail`` raises in the forward pass."""
    predicted = model(x)
    if fail:
        raise RuntimeError(fail)
    count = mask.sum()
    return (mx.square(predicted.astype(mx.float32) - y) * mask).sum() / count, count


def mean_loss(model: nn.Module, x: mx.array, y: mx.array, mask: mx.array, fail: str = "") -> mx.array:
    """`loss_fn` without the weight."""
    return loss_fn(model, x, y, mask, fail)[0]


Batch = tuple[mx.array, mx.array, mx.array]


def batch(shape: Shape, seed: int, rows: int, kind: str = "plain") -> Batch:
    """Of ``kind`` "plain", "nan" (an input that is not a number) or "empty" (nothing that counts)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, INPUTS)).astype(np.float32)
    y = (x.sum(axis=1, keepdims=True) + 3).astype(np.float32)
    counted = np.ones((rows, 1), np.float32)
    counted[rows // 2 + 1 :] = 0
    if kind == "nan":
        x[0, 0] = np.nan
    if kind == "empty":
        counted[:] = 0
    arrays = mx.array(x).astype(DTYPES[shape.dtype]), mx.array(y), mx.array(counted)
    mx.eval(arrays)
    return arrays


def foreign(arrays: Batch) -> Batch:
    """The same, computed lazily in another thread, whose stream no other thread has: it cannot be evaluated here."""
    made: list[Batch] = []

    def make() -> None:
        x, y, mask = arrays
        with mx.stream(mx.new_stream(mx.cpu)):
            made.append((x + 0, y + 0, mask + 0))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def places(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Where each trainable parameter stands: (container, key) by its path. Shared ones have several paths."""

    def walk(template: Any, node: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
        for key, child in template.items() if isinstance(template, dict) else enumerate(template):
            if isinstance(child, (dict, list, tuple)):
                yield from walk(child, node[key], f"{path}{key}.")
            else:
                yield f"{path}{key}", (node, key)

    return dict(walk(model.trainable_parameters(), model, ""))
