"""What is compared: each contender keeps parameters and state of its own and applies one AdamW update when asked.

All have the same constants and bias correction, get the same gradients, and evaluate parameters and state together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import mlx.core as mx
import mlx.optimizers as optim

import compiled_adam as ca

Tree = dict[str, mx.array]
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


class Contender(Protocol):
    @property
    def parameters(self) -> Tree:
        """As they are after the last update."""

    def build(self, gradients: Tree) -> list[mx.array]:
        """One update, not yet evaluated: everything it changes."""


class Eager:
    """An optimizer called as in an uncompiled training loop; ours compiles its update itself."""

    def __init__(self, optimizer: optim.Optimizer, parameters: Tree) -> None:
        self.parameters, self._optimizer = parameters, optimizer
        optimizer.init(parameters)

    def build(self, gradients: Tree) -> list[mx.array]:
        self.parameters = self._optimizer.apply_gradients(gradients, self.parameters)
        return [*self.parameters.values(), *_leaves(self._optimizer.state)]


class Compiled:
    """An optimizer under ``mx.compile`` with captured state, as MLX's documentation and mlx-lm do it."""

    def __init__(self, optimizer: optim.Optimizer, parameters: Tree) -> None:
        self._tree = {"parameters": parameters}
        self._optimizer = optimizer
        optimizer.init(parameters)
        state = [self._tree, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def update(gradients: Tree) -> None:
            self._tree["parameters"] = optimizer.apply_gradients(gradients, self._tree["parameters"])

        self._update = update

    @property
    def parameters(self) -> Tree:
        return self._tree["parameters"]

    def build(self, gradients: Tree) -> list[mx.array]:
        self._update(gradients)
        return [*self.parameters.values(), *_leaves(self._optimizer.state)]


def _leaves(state: dict) -> list[mx.array]:
    return [leaf for value in state.values() for leaf in (value.values() if isinstance(value, dict) else [value])]


def _stock() -> optim.Optimizer:
    return optim.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY, bias_correction=True)


def _ours() -> optim.Optimizer:
    return ca.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY, bias_correction=True)


CONTENDERS: dict[str, Callable[[Tree], Contender]] = {
    "mlx eager": lambda parameters: Eager(_stock(), parameters),
    "mlx compiled": lambda parameters: Compiled(_stock(), parameters),
    "compiled_adam": lambda parameters: Eager(_ours(), parameters),
}
