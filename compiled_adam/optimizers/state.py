"""The state of an `Adam`: a dictionary for each parameter, beside a few scalars."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim

from ..base import Assignments, InputError, along
from ..update import FLOATS, Stored, check_patterns
from .leaf_update import LeafUpdate
from .options import as_scalar, assigned_rate

_SCALARS = ("rounding_key", "grad_norm", "skipped")  # optional scalars; step and learning_rate are always there


class Keeper(Protocol):
    """An object that keeps a part of an optimizer's state outside the tree."""

    def show(self) -> None:
        """Puts that part into the tree of the state."""


class State:
    """The state that an `Adam` keeps from one update to the next.

    ``keeper`` is the train step that holds a part of the state at present. The tree is incomplete until `complete`.
    """

    def __init__(self, optimizer: optim.Adam, leaves: LeafUpdate) -> None:
        self._optimizer, self._leaves = optimizer, leaves
        self.keeper: Keeper | None = None
        scalars = ("step", "learning_rate", *leaves.options.scalars())
        self._places = {name: name for name in scalars}  # the key of each scalar in the tree

    def complete(self) -> None:
        """Lets the keeper put the missing part into the tree."""
        if self.keeper is not None:
            self.keeper.show()
            self.keeper = None  # after `show`, because an interrupt may come in between

    def scalar(self, name: str) -> mx.array:
        return self._optimizer._state[self._places[name]]

    def scalars(self) -> Stored:
        """The part of the state that belongs to no parameter: 0-d arrays, and the rounding key.

        A Python number that a caller assigned to the step or the learning rate becomes an array in the state, too.
        """
        tree = self._optimizer._state
        if not isinstance(tree["step"], mx.array):
            tree["step"] = as_scalar("step", tree["step"], mx.uint64)
        if not isinstance(rate := tree.get("learning_rate"), (mx.array, type(None))):
            tree["learning_rate"] = assigned_rate(rate)
        return {name: tree[place] for name, place in self._places.items() if place in tree}

    def places(self) -> list[tuple[Any, Any, mx.array]]:
        """The places of the `scalars` in the tree, as (container, key, array)."""
        tree = self._optimizer._state
        return [(tree, key, tree[key]) for key in self._places.values() if isinstance(tree.get(key), mx.array)]

    def assign_scalars(self, scalars: Stored, assignments: Assignments) -> None:
        """Adds new `scalars` to ``assignments``."""
        for name, array in scalars.items():
            assignments.add(self._optimizer._state, self._places[name], array)

    def init(self, parameters: dict, all_parameters: dict | None = None) -> None:
        """Creates missing state of ``parameters``. Patterns must match paths among ``all_parameters``."""
        self.create(parameters, parameters if all_parameters is None else all_parameters, parameters)
        evaluate(self._optimizer._state)

    def init_part(self, part: dict, parameters: dict) -> None:
        """`init` for a ``part`` of the parameters. Other workers update the others."""
        for path, container, key in along(parameters, parameters):
            self._leaves.group(path, container[key])  # `Adam.options` describes all parameters
        self.create(part, parameters, parameters)
        evaluate(self._optimizer._state)

    def create(self, parameters: dict, all_parameters: dict, trainable: dict) -> None:
        """`init` that evaluates nothing. ``parameters`` is ``trainable`` or a part of it."""
        options, optimizer = self._leaves.options, self._optimizer
        check_patterns([path for path, _, _ in along(all_parameters, all_parameters)], options.patterns)
        leaves = [(path, container[key]) for path, container, key in along(parameters, parameters)]
        for path, parameter in leaves:
            if parameter.dtype not in FLOATS:
                raise TypeError(
                    f"the parameter {path!r} is {parameter.dtype}; Adam updates float32, bfloat16 and float16:"
                    " convert it, freeze it, or pass model.trainable_parameters()"
                )
            self._leaves.group(path, parameter)
        self._check_scalars(trainable)
        optimizer.state.setdefault("learning_rate", mx.array(0.0))  # a schedule overwrites it
        self._make_room_for_scalars(trainable)
        optim.Optimizer.init(optimizer, parameters)
        assignments = Assignments()
        for (path, parameter), (_, states, key) in zip(leaves, along(parameters, optimizer.state), strict=True):
            try:
                converted = options.form(parameter).converted(path, parameter, states[key])
            except KeyError as missing:
                raise InputError(f"the state of {path!r} has no {missing}; assign a complete one") from None
            if converted is not states[key]:
                assignments.add(states, key, converted)
        assignments.make()

    def _check_scalars(self, trainable: dict) -> None:
        for name in ("step", *(() if self._optimizer._schedulers else ("learning_rate",))):
            if name in trainable:
                raise InputError(
                    f"the model has parameters named {name!r}, a name that the optimizer's state needs; rename the"
                    " parameters"
                )
            if name not in self._optimizer.state:
                raise InputError(f"the optimizer's state has no {name!r}; assign a complete one")

    def _make_room_for_scalars(self, parameters: Any) -> None:
        """Adds the scalars that the options need to the state, and removes the scalars of other options.

        If a parameter has the same name as a scalar, the scalar gets a leading underscore, as no parameter name has.
        """
        own, tree = self._leaves.options.scalars(), self._optimizer._state
        for name in _SCALARS:
            place = f"_{name}" if name in parameters else name
            if name in own:
                old = tree.get(self._places[name])
                tree.setdefault(place, old if isinstance(old, mx.array) else own[name])
                self._places[name] = place
            if isinstance(tree.get(name), mx.array) and not (name in own and place == name):
                del tree[name]


def evaluate(state: Any) -> None:
    """Evaluates the state, because another thread may use it first and could not evaluate lazy arrays of this one."""
    try:
        mx.eval(state)
    except ValueError:  # MLX raises it while a caller's transformation is being traced
        return
