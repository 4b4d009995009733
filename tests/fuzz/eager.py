"""The reference for optimizers of MLX's own: the same optimizer, called eagerly on what the step had before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from compiled_adam import AdamW
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from tests.fuzz.shadow import ULP, Arrays, Options, Shadow

NAMES = ("SGD", "Adam", "AdamW", "Lion", "Muon", "MultiOptimizer")


def make(name: str) -> optim.Optimizer:
    """Their eps is large enough for a gradient's rounding not to decide the direction of an update."""
    if name == "MultiOptimizer":
        # Not compensated: its value would be in two arrays.
        both = [AdamW(1e-2, eps=1e-3, compensated=False, max_grad_norm=0.7), optim.SGD(1e-2)]
        return optim.MultiOptimizer(both, [lambda path, p: p.ndim >= 2])
    made: dict[str, Callable[[], optim.Optimizer]] = {
        "SGD": lambda: optim.SGD(1e-2, momentum=0.9, weight_decay=0.01),
        "Adam": lambda: optim.Adam(1e-2, eps=1e-3, bias_correction=True),
        "AdamW": lambda: optim.AdamW(optim.linear_schedule(1e-2, 1e-3, 10), eps=1e-3),
        "Lion": lambda: optim.Lion(1e-3, weight_decay=0.1),
        "Muon": lambda: optim.Muon(1e-2),
    }
    return made[name]()


class Eager(Shadow):
    """``read`` returns the model's trainable parameters and the optimizer's state, as trees."""

    def __init__(
        self, weights: Arrays, dtype: str, options: Options, accumulate: int, name: str, read: Callable[[], Any]
    ) -> None:
        super().__init__(weights, dtype, options, accumulate)
        self.name, self.read, self.has_residual = name, read, False

    def update(self, gradients: Arrays, errors: Arrays) -> None:
        norm = float(np.sqrt(sum(np.square(g).sum() for g in gradients.values())))
        self.norm = norm, float(np.sqrt(sum(np.square(e).sum() for e in errors.values()))) + 1e-5 * norm
        self.step += 1
        parameters, state = self.read()
        results = []
        for sign in (0, 1, -1):  # how much the gradient's rounding may do
            optimizer = make(self.name)
            optimizer.init(parameters)
            optimizer.state = tree_map(lambda array: mx.array(array), state)
            tree = tree_map_with_path(
                lambda path, p: mx.array((gradients[path] + sign * errors[path]).astype(np.float32)).astype(p.dtype),  # noqa: B023
                parameters,
            )
            updated = dict(tree_flatten(optimizer.apply_gradients(tree, parameters)))
            results.append({path: np.array(p.astype(mx.float32), np.float64) for path, p in updated.items()})
        exact, *others = results
        for path, p in exact.items():
            spread = np.maximum(*(np.abs(other[path] - p) for other in others))
            if self.name == "Muon":  # it mixes the elements, in bfloat16
                spread = np.full_like(p, 2 * spread.max() + 2.0**-6 * np.abs(p - self.p[path]).max())
            moved = np.abs(p - self.p[path])
            self.dp[path] = 2 * spread + ULP[self.dtype] * (4 * np.abs(p) + 4 * moved) + 1e-7
            self.p[path] = p
