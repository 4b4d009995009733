"""Where the parameters and the state of any MLX optimizer live, and its update as a function of their arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from . import any_optimizer, rule
from .errors import InputError
from .layout import Places, Structure, along
from .shard import Shard


class Trees:
    """The places of ``parameters`` and of an optimizer's state; ``template`` is the tree of the former's indices.

    With a ``shard`` the state, and the update, is that of this worker's part of them.
    """

    def __init__(
        self, optimizer: optim.Optimizer, parameters: Places, template: Any, shard: Shard | None = None
    ) -> None:
        self._optimizer, self._parameters, self._template, self._shard = optimizer, parameters, template, shard
        self._roots = any_optimizer.states(optimizer)
        self._structure = Structure(self._roots)
        self._state = Places(self._structure.leaves)

    def intact(self) -> bool:
        """Whether the state is still in the containers that it was in."""
        roots = any_optimizer.states(self._optimizer)
        same = len(roots) == len(self._roots) and all(a is b for a, b in zip(roots, self._roots, strict=True))
        return same and self._structure.intact()

    def read(self) -> tuple[list[mx.array], list[mx.array]]:
        """The parameters, and all arrays of the state."""
        return self._parameters.read(), self.state()

    def state(self) -> list[mx.array]:
        """All arrays of the state."""
        return self._state.read()

    def write(self, parameters: list[mx.array], state: list[mx.array]) -> None:
        """Assigns what `update` has returned."""
        self._parameters.write(parameters)
        self._state.write(state)

    def update(
        self, gradients: list[mx.array], parameters: list[mx.array], state: list[mx.array], after: mx.array | None
    ) -> tuple[list[mx.array], list[mx.array], mx.array]:
        """What `read` returned after one update, and the gradients' norm; for a trace.

        ``after`` is the last communication before it, if there are other workers.
        """
        before = self._structure.snapshot()
        try:
            self._state.write(state)
            if self._shard is not None and after is not None:
                norm = rule.global_norm(gradients)
                parameters = self._shard.update(self._optimizer, gradients, parameters, norm, after)
            else:
                updated = self._optimizer.apply_gradients(self._tree(gradients), self._tree(parameters))
                leaves = {path: container[key] for path, container, key in along(self._template, updated)}
                parameters = [leaves[path] for path in self._parameters.paths]
                norm = self._optimizer.state.get("grad_norm")  # ours computes it itself if it clips or skips
            if not self._structure.intact():
                raise InputError("the optimizer changed the structure of its state; create all of it in init_single")
            return parameters, self._state.read(), rule.global_norm(gradients) if norm is None else norm
        finally:
            self._structure.restore(before)

    def _tree(self, arrays: list[mx.array]) -> Any:
        """The flat ``arrays`` as a tree of parameters."""
        return tree_map(lambda index: arrays[index], self._template)
