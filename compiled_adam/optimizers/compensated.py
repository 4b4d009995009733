"""The class `Compensated`, which makes any MLX optimizer right for bfloat16 and float16 weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import Aligned, Assignments, Compiled, InputError, Structure, along, below, filled, shown, undone_on_error
from ..update import Keep, Stored, clip_factor, global_norm, guard, residual, unfused
from . import any_optimizer
from .adam import Adam
from .leaf_update import MOST_TRACES
from .options import assigned_rate, check_options, scheduled
from .shown import of_any

_NORM, _SKIPPED = "_grad_norm", "_skipped"  # in the state of the first optimizer; no parameter of MLX begins with "_"


class Compensated(any_optimizer.Wrapping):
    """Any MLX optimizer with float32 arithmetic, and bfloat16 or float16 weights that lose nothing to rounding.

    The ``optimizer`` sees float32 gradients and float32 parameters, so its state is float32, too. The parameters are
    each weight joined with its residual, the rounding error in 2 bytes. The new value is split into both again. Where
    no weight is half precision, the results are those of the ``optimizer`` alone. The whole update is one compiled
    graph, traced once for each set of paths, shapes and dtypes. `Adam` and `AdamW` do the same without this class.

    Args:
        optimizer: any ``mlx.optimizers`` optimizer, also a ``MultiOptimizer`` or a subclass of your own.
        max_grad_norm: the largest allowed global norm of the gradients, computed in float32. Larger gradients are
            scaled down to this norm. Default None: no clipping.
        skip_nonfinite: skip an update if the global norm of the gradients or a learning rate is NaN or infinite, or
            a learning rate is negative. Parameters and state then keep their values bit for bit, and ``skipped`` goes
            up by one. Default False.

    ``state`` is the state of the ``optimizer``, with an array ``residual`` beside those of each half-precision weight.
    A state of the ``optimizer`` alone can be assigned to it. ``learning_rate`` and ``step`` are those of the (first)
    optimizer. ``grad_norm`` (before clipping) and ``skipped`` are 0-d arrays, or None if no option needs the norm.

    Raises:
        ValueError: ``optimizer`` is no MLX optimizer, or has residuals already (`Adam`, `AdamW`, `Compensated`), or an
            option is out of range.

    >>> weights = {"w": mx.array([1.0], mx.bfloat16)}
    >>> optimizer = Compensated(optim.SGD(learning_rate=2.0**-10))
    >>> for _ in range(8):  # bfloat16 alone would lose each of these
    ...     weights = optimizer.apply_gradients({"w": mx.array([-1.0], mx.bfloat16)}, weights)
    >>> weights
    {'w': array([1.00781], dtype=bfloat16)}
    """

    def __init__(
        self, optimizer: optim.Optimizer, *, max_grad_norm: float | None = None, skip_nonfinite: bool = False
    ) -> None:
        _check(optimizer)
        check_options("float32", True, max_grad_norm, skip_nonfinite, "auto")
        super().__init__()
        self.wrapped = optimizer
        self._max_grad_norm, self._skip = max_grad_norm, skip_nonfinite
        self.traces = 0
        self._compiled = self._compile()
        self._make_scalars()

    def __repr__(self) -> str:
        options = [f"max_grad_norm={self._max_grad_norm}"] if self._max_grad_norm is not None else []
        options += [f"skip_nonfinite=True; skipped={shown(self.skipped)}"] if self._skip else []
        return f"Compensated({', '.join([of_any(self.wrapped), *options])})"

    @property
    def state(self) -> dict[str, Any]:
        """The state of the optimizer, and residuals, as a tree of arrays."""
        return self.wrapped.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._initialized = False
        self.wrapped.state = state

    @property
    def step(self) -> mx.array:
        return self._first["step"]

    @property
    def learning_rate(self) -> mx.array:
        return self._first["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.wrapped.learning_rate = assigned_rate(learning_rate)

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last update's gradients, before clipping: 0-d float32. None if no option needs it."""
        return self._first.get(_NORM)

    @property
    def skipped(self) -> mx.array | None:
        """How many updates were skipped since the start: 0-d int32. None if no option needs the norm."""
        return self._first.get(_SKIPPED)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {"compensated": True, "max_grad_norm": self._max_grad_norm, "skip_nonfinite": self._skip}

    @property
    def _first(self) -> dict[str, Any]:
        return any_optimizer.parts(self)[0]._state

    def _compile(self) -> Compiled:
        return Compiled(self._traced, MOST_TRACES, draws=True)

    def _make_scalars(self) -> None:
        needed: Stored = {_NORM: mx.array(0.0), _SKIPPED: mx.array(0, mx.int32)}
        for name, zero in needed.items():
            if self._skip or self._max_grad_norm is not None:
                self._first.setdefault(name, zero)
            else:
                self._first.pop(name, None)

    def init(self, parameters: dict) -> None:
        """Creates missing state. Existing arrays are kept; those of half-precision weights become float32.

        An error or an interrupt leaves the state as it was. MLX takes a parameter with one of two arrays for complete.
        """
        undone_on_error(lambda: self._create(parameters), Structure(self.wrapped.state).snapshot())
        self._initialized = True

    def _create(self, parameters: dict) -> None:
        full = tree_map(_float32, parameters)
        any_optimizer.init(self.wrapped, full)
        pairs = zip(along(parameters, parameters), along(full, full), strict=True)
        for ((_, c, key), (_, values, _)), (part, states, its) in zip(
            pairs, any_optimizer.places(self.wrapped, full), strict=True
        ):
            weight, state = c[key], states[its]
            if residual.applies_to(weight.dtype):
                fresh: dict[str, Any] = {}
                part.init_single(values[key], fresh)
                for name in fresh.keys() & state.keys():
                    if isinstance(array := fresh[name], mx.array) and state[name].dtype != array.dtype:
                        state[name] = state[name].astype(array.dtype)
                rest = state.get("residual")
                if rest is None or rest.shape != weight.shape or not residual.belongs_to(weight.dtype, rest):
                    state["residual"] = residual.zeros(weight)
        for part in any_optimizer.parts(self.wrapped):
            for name in part._schedulers:
                part._state.setdefault(name, mx.array(0.0))
        self._make_scalars()

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Updates the parameters of ``model`` in place. An interrupt leaves model and state both old or both new."""
        assignments = Assignments()
        new, places = self._updated(gradients, model, None, assignments)
        assignments.add_all(*places, new)
        assignments.make()

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Returns the updated parameters as a tree like ``gradients``, which may cover a part of the tree only.

        Raises ValueError or TypeError if a gradient has no parameter or no state, is not an array, or differs from the
        parameter in shape. The message names the path. Nothing is changed then.
        """
        return self.apply_part(gradients, parameters, None)

    def apply_part(self, gradients: dict, parameters: dict, norm: mx.array | None) -> dict:
        """`apply_gradients`, where ``norm`` is that of all gradients if other workers update the other parts."""
        assignments = Assignments()
        updated = iter(self._updated(gradients, parameters, norm, assignments)[0])
        assignments.make()
        return filled(gradients, updated)

    def _updated(
        self, gradients: dict, parameters: dict, norm: mx.array | None, assignments: Assignments
    ) -> tuple[list[mx.array], tuple[list[Any], list[Any]]]:
        """The new parameters in the order of ``gradients``, and the containers and keys of the old ones."""
        leaves = Aligned(gradients, parameters, {})
        weights = iter(leaves.parameters)
        tree = filled(gradients, weights)
        if not self._initialized:
            self.init(tree)
        any_optimizer.take_numbers(self.wrapped)
        places = any_optimizer.places(self.wrapped, tree)
        for path, (_, container, key) in zip(leaves.paths, places, strict=True):
            if not isinstance(below(container, key), dict):
                raise InputError(
                    f"the optimizer has no state for {path!r}: it was initialised without it; call"
                    " optimizer.init(parameters) with all parameters (existing state is kept)"
                )
        states = [container[key] for _, container, key in places]
        parts = any_optimizer.parts(self.wrapped)
        scalars = [_scalars(part._state) for part in parts]
        # Outside the compiled function, because a schedule may be any Python function of the step's value.
        rates = [{name: scheduled(name, f, part.step) for name, f in part._schedulers.items()} for part in parts]
        constants = any_optimizer.constants(self.wrapped)
        new, stored, common = self._compiled(gradients, tree, states, scalars, rates, norm, constants)
        assignments.add_contents([*states, *(part._state for part in parts)], [*stored, *common])
        return new, (leaves.containers, leaves.keys)

    def _traced(
        self,
        gradients: dict,
        parameters: dict,
        states: list[dict[str, Any]],
        scalars: list[dict[str, Any]],
        rates: list[Stored],
        norm: mx.array | None,
        constants: list[float],
    ) -> tuple[list[mx.array], list[Stored], list[Stored]]:
        """The new parameters, states and scalars. ``constants`` is not read: other values of it cause a new trace."""
        self.traces += 1
        leaves = Aligned(gradients, parameters, {})
        for leaf in zip(leaves.paths, leaves.gradients, leaves.parameters, states, strict=True):
            _check_leaf(*leaf)
        current = [{**its, **rate} for its, rate in zip(scalars, rates, strict=True)]
        keep, clip, counted = self._global(leaves.gradients, current, norm)
        values = map(_value, leaves.parameters, states)
        tree = filled(gradients, values)
        clipped = tree_map(lambda g: _float32(g) if clip is None else clip * _float32(g), gradients)
        twin = any_optimizer.twin(self.wrapped, current)
        mine = [dict(state) for state in states]
        for (_, container, key), own in zip(any_optimizer.places(twin, tree), mine, strict=True):
            container[key] = own
        updated = any_optimizer.updated(twin, clipped, tree)
        new, stored = [], []
        for now, weight, old, own in zip(updated, leaves.parameters, states, mine, strict=True):
            kept = _kept(old, own, keep)
            if residual.applies_to(weight.dtype):
                weight, kept["residual"] = residual.split(now.astype(mx.float32), weight, old["residual"], keep)
            else:
                weight = keep(now, weight)
            new.append(weight)
            stored.append(kept)
        parts = any_optimizer.parts(twin)
        common = [_kept(old, _scalars(part._state), keep) for old, part in zip(scalars, parts, strict=True)]
        common[0] |= counted
        return new, stored, common

    def _global(
        self, gradients: list[mx.array], scalars: list[dict[str, Any]], norm: mx.array | None
    ) -> tuple[Keep, mx.array | None, Stored]:
        """What selects between new and old values, the factor of the gradients, and the norm and count to store."""
        if not (self._skip or self._max_grad_norm is not None):
            return residual.new_value, None, {}
        norm = global_norm(gradients) if norm is None else norm
        clip = None if self._max_grad_norm is None else unfused(clip_factor(norm, self._max_grad_norm))
        if not self._skip:
            return residual.new_value, clip, {_NORM: norm}
        finite = guard(norm, [its["learning_rate"] for its in scalars if "learning_rate" in its])
        return (
            lambda new, old: mx.where(finite, new, old),
            clip,
            {_NORM: norm, _SKIPPED: scalars[0][_SKIPPED] + mx.logical_not(finite)},
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compiled = self._compile()  # compiled functions can be neither copied nor pickled


def _check(optimizer: object) -> None:
    if not isinstance(optimizer, optim.Optimizer):
        raise InputError(f"optimizer is {optimizer!r}; it must be an optimizer of MLX, such as optim.Muon(0.02)")
    for each in any_optimizer.every(optimizer):
        name = type(each).__name__
        if isinstance(each, (Adam, Compensated)):
            hint = "" if each is optimizer else f"; put mlx.optimizers.{name} there"
            raise InputError(
                f"{name} keeps residuals of half-precision weights itself; use it without Compensated{hint}"
            )
        if type(each).update is not optim.Optimizer.update:
            raise InputError(
                f"{name} has an update method of its own, which Compensated would not call; override apply_single or"
                " apply_gradients instead"
            )
    for part in any_optimizer.parts(optimizer):
        if not any_optimizer.has_init_single(part):
            raise InputError(
                f"{type(part).__name__} has no init_single, with which Compensated makes the state of a parameter;"
                " override init_single and apply_single"
            )


def _check_leaf(path: str, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> None:
    if gradient.shape != parameter.shape:
        raise InputError(
            f"the gradient of {path!r} has shape {gradient.shape}, but the parameter has {parameter.shape}; they must"
            " be the same"
        )
    rest = state.get("residual")
    if residual.applies_to(parameter.dtype) and (rest is None or not residual.belongs_to(parameter.dtype, rest)):
        raise InputError(
            f"the state of {path!r} was made for another dtype; call optimizer.init(parameters), which converts it"
        )


def _float32(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if residual.applies_to(x.dtype) else x


def _value(weight: mx.array, state: dict[str, Any]) -> mx.array:
    """What a weight stands for, float32 if it is half precision."""
    return residual.join(weight, state["residual"]) if residual.applies_to(weight.dtype) else weight


def _scalars(state: dict[str, Any]) -> dict[str, Any]:
    """The part of an optimizer's state that belongs to no parameter."""
    return {name: value for name, value in state.items() if not isinstance(value, (dict, list, tuple))}


def _kept(old: dict[str, Any], new: dict[str, Any], keep: Keep) -> dict[str, Any]:
    """The arrays of ``new``, or those of ``old`` if the guard skips. Raises ValueError if something else changed."""
    if old.keys() != new.keys():
        raise InputError("the optimizer changed the structure of its state; create all of it in init_single")

    def kept(now: Any, before: Any) -> Any:
        if isinstance(now, mx.array):
            return keep(now, before)
        if now != before:
            raise InputError(f"the optimizer changed {before!r} in its state, which is no array; make it an mx.array")
        return now

    chosen = tree_map(kept, new, old)
    return {name: value for name, value in chosen.items() if isinstance(value, (mx.array, dict, list))}
