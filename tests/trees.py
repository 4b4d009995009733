"""Comparing trees of arrays."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from compiled_adam.update import residual
from mlx.utils import tree_flatten, tree_map


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.array(array.astype(mx.float32)) for path, array in tree_flatten(tree)}


def copied(tree):
    return tree_map(lambda array: mx.array(array), tree)


def assert_identical(a: dict, b: dict) -> None:
    a, b = dict(tree_flatten(a)), dict(tree_flatten(b))
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        # Bit for bit, so that -0.0 and a nan count.
        x, y = (
            np.array(array.view(mx.uint8) if array.ndim else array[None].view(mx.uint8)) for array in (a[path], b[path])
        )
        assert np.array_equal(x, y), path


def value(optimizer: optim.Optimizer, parameters: dict) -> mx.array:
    """The float32 value of the parameter "w", with its residual if there is one."""
    state = optimizer.state["w"]
    return (
        residual.join(parameters["w"], state["residual"]) if "residual" in state else parameters["w"].astype(mx.float32)
    )
