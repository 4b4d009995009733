"""The update of any MLX optimizer as a function of flat lists of arrays, and the places of these arrays in trees."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import Assignments, InputError, Places, Structure, Written, along, undone_on_error
from ..distributed import Shard
from ..optimizers import Adam, Compensated, any_optimizer
from ..update import counted, global_norm, residual


class Trees:
    """The places of the ``parameters`` of ``model`` and of an optimizer's state.

    ``template`` is the tree of parameters with an index in place of each array. With a ``shard`` (the parameters whose
    state this worker keeps) the state and the update cover the shard only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        parameters: Places,
        template: Any,
        shard: Shard | None = None,
    ) -> None:
        self._model, self._optimizer, self._parameters, self._template = model, optimizer, parameters, template
        self._shard = shard
        self._indices = [container[key] for _, container, key in along(template, template)]
        any_optimizer.take_numbers(optimizer)
        self._roots = any_optimizer.states(optimizer)
        self._structure = Structure(self._roots)
        self._state = Places(self._structure.leaves)
        places = {path: j for j, path in enumerate(self._state.paths)}
        # Index of each compensated parameter -> index of the residual (the rounding error of the weight) in the state.
        self._residuals = {
            i: places[name]
            for i, path in enumerate(parameters.paths)
            for root in range(len(self._roots))
            if (name := f"{root}.{path}.residual") in places
        }
        self._shapes = [parameter.shape for parameter in parameters.read()]
        self._written: dict[int, tuple[Written, Written]] = {}  # each compensated parameter and the residual

    def intact(self) -> bool:
        """Whether the state is still in the same containers."""
        roots = any_optimizer.states(self._optimizer)
        same = len(roots) == len(self._roots) and all(a is b for a, b in zip(roots, self._roots, strict=True))
        return same and self._structure.intact()

    def read(self, assigned: Mapping[int, mx.array] = MappingProxyType({})) -> tuple[list[mx.array], list[mx.array]]:
        """All parameters and all arrays of the state. ``assigned`` has parameters that the forward pass replaced."""
        any_optimizer.take_numbers(self._optimizer)
        parameters, state = self._parameters.read(), self._state.read()
        parameters = [assigned.get(i, parameter) for i, parameter in enumerate(parameters)]
        for i, (weight, rest) in self._written.items():
            j = self._residuals[i]
            if not weight.are([parameters[i]]) and rest.are([state[j]]):
                state[j] = residual.of_replaced(state[j], weight.own[0], parameters[i])
        return parameters, state

    def settle(self) -> None:
        """Resets in the state the residuals of weights that a caller has replaced, as the next update would do."""
        parameters = self._parameters.read()
        if not all(weight.are([parameters[i]]) for i, (weight, _) in self._written.items()):
            self.write(*self.read())
            mx.async_eval(self.state())

    def state(self) -> list[mx.array]:
        """All arrays of the state."""
        return self._state.read()

    def places(self) -> list[tuple[Any, Any, mx.array]]:
        """The places of the state's arrays in the trees that users see, as (container, key, array)."""
        return [(container, key, container[key]) for container, key in self._state.places]

    def write(self, parameters: list[mx.array], state: list[mx.array]) -> None:
        """Assigns the arrays that `update` has returned."""
        assignments = Assignments()
        self.assign(parameters, state, assignments)
        assignments.make()

    def assign(self, parameters: list[mx.array], state: list[mx.array], assignments: Assignments) -> None:
        """Adds the arrays that `update` has returned to ``assignments``."""
        self._parameters.assign(parameters, assignments)
        self._state.assign(state, assignments)
        written = {i: (Written([parameters[i]]), Written([state[j]])) for i, j in self._residuals.items()}
        assignments.attribute(self, "_written", written)

    def named(self, parameters: list[mx.array], state: list[mx.array]) -> list[tuple[str, mx.array]]:
        """The arrays of an update with names. Arrays of the same kind have the same last part of the name."""
        return [("parameter", p) for p in parameters] + list(zip(self._state.paths, state, strict=True))

    def pack(self, gradients: list[mx.array]) -> list[mx.array]:
        """The gradients as `update` needs them: nothing is packed here."""
        return gradients

    def update(
        self,
        gradients: list[mx.array],
        parameters: list[mx.array],
        state: list[mx.array],
        after: mx.array | None = None,
        weight: mx.array | None = None,
    ) -> tuple[list[mx.array], list[mx.array], mx.array]:
        """Returns updated parameters and state, as from `read`, and the norm of the gradients. Call it while tracing.

        ``after`` is the result of the last communication, if there are other workers. With a ``weight`` of 0 the
        gradients count as 0.
        """
        if weight is not None:
            gradients = [counted(g, weight) for g in gradients]
        numbers = any_optimizer.other_values(self._optimizer)
        put_back = self._structure.snapshot()
        weights = self._parameters.read()
        mlxs = [vars(part) for part in any_optimizer.parts(self._optimizer) if any_optimizer.is_mlxs(part)]
        roots = [attributes["_state"] for attributes in mlxs]  # an update may assign another dictionary

        def all_back() -> None:
            put_back()
            for attributes, root in zip(mlxs, roots, strict=True):
                attributes["_state"] = root
            self._parameters.write(weights)

        def traced() -> tuple[list[mx.array], list[mx.array], mx.array]:
            self._state.write(state)
            if self._shard is not None and after is not None:
                norm = global_norm(gradients)
                new = self._shard.update(gradients, parameters, norm, after)
            else:
                try:
                    new = self._updated(gradients, parameters)
                except ValueError as error:
                    self._refuse_other_shapes(parameters, error)
                    raise
                known = getattr(self._optimizer, "grad_norm", None)  # our `Adam` has computed it if it clips or skips
                norm = known if isinstance(known, mx.array) else global_norm(gradients)
            new_state = self._new_state()
            self._refuse_other_numbers(numbers)
            all_back()
            return new, new_state, norm

        return undone_on_error(traced, all_back)

    def _new_state(self) -> list[mx.array]:
        """The arrays of the state after the update, also if it has replaced containers, as with ``tree_map``."""
        if self.intact():
            return self._state.read()
        now = {p: container[key] for p, container, key in Structure(any_optimizer.states(self._optimizer)).leaves}
        if now.keys() != set(self._state.paths):
            names = ", ".join(sorted(now.keys() ^ set(self._state.paths)))
            raise InputError(
                f"the optimizer's update adds or removes arrays of its state ({names}); create all in init"
            )
        return [now[path] for path in self._state.paths]

    def _refuse_other_shapes(self, parameters: list[mx.array], error: ValueError) -> None:
        for path, array, shape in zip(self._parameters.paths, parameters, self._shapes, strict=True):
            if array.shape != shape:
                raise InputError(
                    f"{path!r} has become an array of shape {array.shape}; it was of shape {shape}: call make_step"
                    " again, with the same optimizer to keep the moments of parameters whose shape is the same"
                ) from error

    def _refuse_other_numbers(self, before: dict[str, Any]) -> None:
        """Raises ValueError if the update changes numbers of the state: a trace would contain the old ones for ever."""
        now = any_optimizer.other_values(self._optimizer)
        for path, value in before.items():
            if now.get(path) is not value and now.get(path) != value:
                raise InputError(
                    f"the optimizer's update changes {path!r} of its state, which is {type(value).__name__}, not"
                    " an array: make it an mx.array in init_single or init"
                )

    def _updated(self, gradients: list[mx.array], parameters: list[mx.array]) -> list[mx.array]:
        optimizer = self._optimizer
        if getattr(type(optimizer), "update", None) not in (
            *(None, optim.Optimizer.update, Adam.update, Compensated.update),
        ):
            # A subclass overrides `update` and expects a model with parameters, so call it on the model.
            self._parameters.write(parameters)
            optimizer.update(self._model, self._tree(gradients))
            return self._parameters.read()
        updated = any_optimizer.updated(optimizer, self._tree(gradients), self._tree(parameters))
        new = list(parameters)
        for i, array in zip(self._indices, updated, strict=True):
            new[i] = array
        return new

    def _tree(self, arrays: list[mx.array]) -> Any:
        """The flat ``arrays`` as a tree of parameters."""
        return tree_map(lambda index: arrays[index], self._template)
