"""Where the parameters and the state of any MLX optimizer live, and its update as a function of their arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from . import any_optimizer
from .layout import Places, Structure, along


class Trees:
    """The places of ``parameters`` and of an optimizer's state; ``template`` is the tree of the former's indices."""

    def __init__(self, optimizer: optim.Optimizer, parameters: Places, template: Any) -> None:
        self._optimizer, self._parameters, self._template = optimizer, parameters, template
        self._structure = Structure(any_optimizer.states(optimizer))
        self._state = Places(self._structure.leaves)

    def read(self) -> tuple[list[mx.array], list[mx.array]]:
        """The parameters, and all arrays of the state."""
        return self._parameters.read(), self._state.read()

    def write(self, parameters: list[mx.array], state: list[mx.array]) -> None:
        """Assigns what `update` has returned."""
        self._parameters.write(parameters)
        self._state.write(state)

    def update(
        self, gradients: list[mx.array], parameters: list[mx.array], state: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array], mx.array | None]:
        """What `read` returned after one update, and the gradients' norm if the optimizer knows it; for a trace."""
        before = self._structure.snapshot()
        try:
            self._state.write(state)
            updated = self._optimizer.apply_gradients(self._tree(gradients), self._tree(parameters))
            if not self._structure.intact():
                raise ValueError("the optimizer changed the structure of its state; create all of it in init_single")
            state = self._state.read()
            norm = self._optimizer.state.get("grad_norm")
        finally:
            self._structure.restore(before)
        leaves = {path: container[key] for path, container, key in along(self._template, updated)}
        return [leaves[path] for path in self._parameters.paths], state, norm

    def _tree(self, arrays: list[mx.array]) -> Any:
        """The flat ``arrays`` as a tree of parameters."""
        return tree_map(lambda index: arrays[index], self._template)
