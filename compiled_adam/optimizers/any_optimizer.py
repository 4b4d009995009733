"""Functions by which a train step reads and converts the state of any optimizer: ours, MLX's, or of one's own class.

One's own class has ``init(parameters)`` and ``apply_gradients(gradients, parameters)``. All arrays in its
attributes are its state.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from ..base import InputError, Row, Structure, along, below, differences, indexed
from .options import as_scalar

# Two schedules are functions and cannot be compared. Their values at these steps can.
_SAMPLED = (0, 1, 2, 5, *(factor * 10**power for power in range(1, 6) for factor in (1, 2, 5)))

_OF_A_FORM = {"residual", "m_scale", "v_scale"}  # arrays that only some forms of storage have
_NO_OPTIONS = {"_initialized"}  # numbers that an update does not depend on
# Other arrays that a state may lack: `convert_state` creates them.
_MADE = {
    "learning_rate",
    *(f"{under}{name}" for under in ("", "_") for name in ("rounding_key", "grad_norm", "skipped")),
}


def is_mlxs(optimizer: object) -> bool:
    """Whether the optimizer is of a class of MLX or derived from one, as ours are."""
    return isinstance(optimizer, optim.Optimizer)


def tree(optimizer: optim.Optimizer) -> Any:
    """The tree that has the optimizer's arrays: the state, or the attributes of an optimizer of one's own class."""
    return optimizer.state if is_mlxs(optimizer) else vars(optimizer)


def states(optimizer: optim.Optimizer) -> list[Any]:
    """The tree of the optimizer, or of each optimizer inside a MultiOptimizer."""
    return [tree(part) for part in parts(optimizer)]


def schedules(optimizer: optim.Optimizer) -> dict[str, Callable[[mx.array], Any]]:
    """The schedules of one part by the name of the value that each determines."""
    return optimizer._schedulers if is_mlxs(optimizer) else {}


def init(optimizer: optim.Optimizer, parameters: Any) -> None:
    """Creates missing state. Arrays that exist are kept, unless they belong to a parameter of another shape."""
    if isinstance(optimizer, optim.MultiOptimizer) and type(optimizer).init is optim.MultiOptimizer.init:
        for child, its in split(optimizer, parameters):
            init(child, its)
        return
    if is_mlxs(optimizer):
        optimizer.init(parameters)
        return
    before = flat_state(optimizer)
    optimizer.init(parameters)
    structure = Structure(vars(optimizer))
    if structure.modules:
        raise InputError(f"{type(optimizer).__name__} keeps a module in its attributes; keep arrays and numbers only")
    for path, container, key in structure.leaves:
        if path in before and before[path].shape == container[key].shape:
            container[key] = before[path]


class Wrapping(optim.Optimizer):
    """An optimizer whose state is that of another one."""

    wrapped: optim.Optimizer


def every(optimizer: optim.Optimizer) -> list[optim.Optimizer]:
    """The optimizer, and all optimizers inside it."""
    return [optimizer, *(each for child in _children(optimizer) for each in every(child))]


def parts(optimizer: optim.Optimizer) -> list[optim.Optimizer]:
    """The optimizer itself, or the optimizers inside a MultiOptimizer or a `Wrapping`."""
    return [each for each in every(optimizer) if not _children(each)]


def _children(optimizer: optim.Optimizer) -> list[optim.Optimizer]:
    if isinstance(optimizer, Wrapping):
        return [optimizer.wrapped]
    return optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else []


def split(optimizer: optim.MultiOptimizer, tree: Any) -> list[tuple[optim.Optimizer, Any]]:
    """The optimizers of a MultiOptimizer, each with its part of the tree. Lists keep their lengths.

    In MLX they end at the last array of a part. Then MLX cannot create state beside a longer state, and cannot merge
    [a] with [{}, {}, b].
    """
    parts = optimizer._split_dictionary(tree)
    return [
        (child, indexed(tree, {path: container[key] for path, container, key in along(its, its)}))
        for child, its in zip(optimizer.optimizers, parts, strict=True)
    ]


def updated(optimizer: optim.Optimizer, gradients: Any, parameters: Any) -> list[mx.array]:
    """The updated parameters in the order of ``gradients``: what ``apply_gradients`` returns, as a list."""
    own = type(optimizer).apply_gradients is not optim.MultiOptimizer.apply_gradients
    if own or not isinstance(optimizer, optim.MultiOptimizer):
        new = optimizer.apply_gradients(gradients, parameters)
        return [container[key] for _, container, key in along(gradients, new)]
    found: dict[str, mx.array] = {}
    for child, its in split(optimizer, gradients):
        found |= zip((path for path, _, _ in along(its, its)), updated(child, its, parameters), strict=True)
    return [found[path] for path, _, _ in along(gradients, gradients)]


def places(optimizer: optim.Optimizer, parameters: Any) -> list[tuple[optim.Optimizer, Any, Any]]:
    """The place of each parameter's state: the optimizer that updates the parameter, the container and the key."""
    if not isinstance(optimizer, optim.MultiOptimizer):
        return [(optimizer, container, key) for _, container, key in along(parameters, optimizer._state)]
    found: dict[str, tuple[optim.Optimizer, Any, Any]] = {}
    for child, its in zip(optimizer.optimizers, optimizer._split_dictionary(parameters), strict=True):
        found |= zip((path for path, _, _ in along(its, its)), places(child, its), strict=True)
    return [found[path] for path, _, _ in along(parameters, parameters)]


def twin(optimizer: optim.Optimizer, scalars: Sequence[dict[str, Any]]) -> optim.Optimizer:
    """A copy of the optimizer with containers of its own, to trace an update without changing the optimizer.

    ``scalars`` has for each of the `parts` what belongs to no parameter. Schedules have been followed there.
    """
    made = copy.copy(optimizer)
    if isinstance(made, optim.MultiOptimizer):
        left = iter(scalars)
        made.optimizers = [twin(child, [next(left) for _ in parts(child)]) for child in made.optimizers]
    else:
        state = tree_map(lambda value: value, made._state)
        made._state, made._schedulers, made._initialized = {**state, **scalars[0]}, {}, True
    return made


def flat_state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The arrays of the state by their paths."""
    take_numbers(optimizer)
    return {path: container[key] for path, container, key in Structure(tree(optimizer)).leaves}


def other_values(optimizer: optim.Optimizer) -> dict[str, Any]:
    """The values in the state that are no arrays, such as Python numbers, by path."""
    leaves: Any = tree_flatten(states(optimizer))
    return {path: value for path, value in leaves if not isinstance(value, mx.array)}


def learning_rate(optimizer: optim.Optimizer) -> mx.array | None:
    """The 0-d learning rate of the (first) optimizer. None for an optimizer without a learning rate."""
    first = parts(optimizer)[0]
    state = first._state if is_mlxs(first) else vars(first)  # `Adam.state` would put all moments into the tree
    rate = state.get("learning_rate")
    return rate if isinstance(rate, mx.array) else None


def skipped(optimizer: optim.Optimizer) -> list[mx.array]:
    """How many updates each `Adam` and `Compensated` has skipped."""
    counts = [getattr(each, "skipped", None) for each in every(optimizer)]
    return [count for count in counts if isinstance(count, mx.array)]


def take_numbers(optimizer: optim.Optimizer) -> None:
    """Converts a step or learning rate that a caller assigned to the state as a Python number to an array.

    Raises TypeError if the assigned value is no number.
    """
    for part in filter(is_mlxs, parts(optimizer)):
        state = part._state  # `Adam.state` would put all moments into the tree
        for name, dtype in (("step", mx.uint64), ("learning_rate", mx.float32)):
            if name in state and not isinstance(state[name], (mx.array, dict)):
                state[name] = as_scalar(name, state[name], dtype)


def begin_anew(optimizer: optim.Optimizer, parameters: Any) -> list[str]:
    """Replaces the state of each parameter whose shape has changed by new state; returns the paths."""
    found = []
    for part in filter(has_init_single, parts(optimizer)):
        for path, parameter, container, key in list(_with_state(parameters, part.state, "")):
            fresh: dict[str, Any] = {}
            part.init_single(parameter, fresh)
            old = container[key]
            if any(name in old and old[name].shape != array.shape for name, array in _arrays(fresh)):
                container[key] = fresh
                found.append(path)
    return found


def has_init_single(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer makes the state of one parameter at a time, as MLX's do."""
    return is_mlxs(optimizer) and type(optimizer).init_single is not optim.Optimizer.init_single


def _with_state(parameters: Any, state: Any, prefix: str) -> Iterator[tuple[str, mx.array, Any, Any]]:
    """The parameters that have a state, as (path, parameter, container of the state, key)."""
    for key, value in parameters.items() if isinstance(parameters, dict) else enumerate(parameters):
        its = below(state, key)
        if isinstance(value, (dict, list, tuple)):
            if its is not None:
                yield from _with_state(value, its, f"{prefix}{key}.")
        elif isinstance(its, dict) and its:
            yield f"{prefix}{key}", value, state, key


def _arrays(state: dict[str, Any]) -> list[tuple[str, mx.array]]:
    return [(name, value) for name, value in state.items() if isinstance(value, mx.array)]


def constants(optimizer: optim.Optimizer) -> list[float]:
    """The numbers among the attributes, also of a subclass. A trace of the update contains them as constants."""
    return [x for part in parts(optimizer) for value in _numbers(part).values() for x in value]


def description(optimizer: optim.Optimizer) -> dict[str, Any]:
    """Everything that the optimizer's updates depend on, except the state: values that JSON can hold, by name.

    A schedule is described by the values at some steps, a learning rate without a schedule by the present value.
    """
    take_numbers(optimizer)
    found: dict[str, Any] = {}
    its = parts(optimizer)
    for i, part in enumerate(its):
        own: dict[str, Any] = {"optimizer": type(part).__name__}
        own |= {name: value[0] if len(value) == 1 else value for name, value in _public(part).items()}
        own |= getattr(part, "options", {})
        for name, schedule in schedules(part).items():
            own[name] = [float(schedule(mx.array(step))) for step in _SAMPLED]
        rate = tree(part).get("learning_rate")
        if isinstance(rate, mx.array) and "learning_rate" not in own:
            own["learning_rate"] = rate.item()
        found |= {name if len(its) == 1 else f"optimizers.{i}.{name}": value for name, value in own.items()}
    for i, each in enumerate(every(optimizer)):
        if isinstance(each, Wrapping):
            before = "" if each is optimizer else f"optimizers.{i}."
            found |= {f"{before}{name}": value for name, value in getattr(each, "options", {}).items()}
    return found


def inconvertible(own: Mapping[str, mx.array], other: Mapping[str, mx.array]) -> list[Row]:
    """The reasons why the flat state ``other`` cannot be converted to the form of ``own``: rows like `differences`.

    Shapes of moments and kinds of numbers must be the same. Arrays that `convert_state` creates may be missing.
    """
    made = {path for path in own.keys() ^ other.keys() if path.rpartition(".")[2] in _MADE} | {
        path for path in own.keys() | other.keys() if path.rpartition(".")[2] in _OF_A_FORM
    }
    forms = [{path: _kind(array) for path, array in state.items() if path not in made} for state in (own, other)]
    return differences(*forms)


def _kind(array: mx.array) -> Any:
    return array.shape if array.ndim else ("integer", mx.issubdtype(array.dtype, mx.integer))


def convert_state(optimizer: optim.Optimizer, state: Mapping[str, mx.array], init: Callable[[], None]) -> None:
    """Gives the optimizer a flat ``state`` that was saved with other options. Missing arrays start at zero.

    `inconvertible` must have returned no rows. ``init`` converts the existing arrays to the optimizer's options and
    creates the missing arrays. If anything raises, the optimizer keeps the state that it had before.
    """
    before = optimizer.state
    new, strange = arranged(before, state)
    if strange:
        raise InputError(f"the state has {min(strange)!r}, but the optimizer has no such parameter")
    try:
        optimizer.state = new
        init()
    except BaseException:
        optimizer.state = before
        init()
        raise


def arranged(template: Any, state: Mapping[str, mx.array]) -> tuple[Any, set[str]]:
    """The flat ``state`` as a tree like ``template`` (the tree of a state), and the paths that fit nowhere in it.

    The containers and keys of ``template`` decide where an array belongs. The text of a path is ambiguous: a name may
    have dots, or be a number. A parameter may have other arrays in ``template``, or an empty dictionary.

    >>> arranged({"a.b": {0: {"m": mx.array(1)}}}, {"a.b.0.m": mx.array(2), "a.b.0.v": mx.array(3), "c.m": mx.array(4)})
    ({'a.b': {0: {'m': array(2, dtype=int32), 'v': array(3, dtype=int32)}}}, {'c.m'})
    """
    groups: dict[str, dict[str, mx.array]] = {}
    for path, array in state.items():
        prefix, _, name = path.rpartition(".")
        groups.setdefault(prefix, {})[name] = array
    used: set[str] = set()
    return _arranged(template, "", state, groups, used), state.keys() - used


def _arranged(
    node: Any, path: str, state: Mapping[str, mx.array], groups: Mapping[str, Mapping[str, mx.array]], used: set[str]
) -> Any:
    found: dict[Any, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        below = f"{path}.{key}" if path else str(key)
        if isinstance(value, (dict, list, tuple)):
            child = _arranged(value, below, state, groups, used)
            if child or not value or not isinstance(node, dict):  # a parameter of another worker's shard has no entry
                found[key] = child
        elif not isinstance(value, mx.array):
            found[key] = value
        elif below in state:
            found[key] = state[below]
            used.add(below)
        elif not isinstance(node, dict):
            raise InputError(f"the state has no {below!r}; assign a complete one")
    if not isinstance(node, dict):
        return type(node)(found.values())
    if not node or any(isinstance(value, mx.array) for value in node.values()):  # else it has containers only
        for name, array in groups.get(path, {}).items():
            below = f"{path}.{name}" if path else name
            if below not in used:
                found[name] = array
                used.add(below)
    return found


def _public(optimizer: optim.Optimizer) -> dict[str, list[float]]:
    return {name: values for name, values in _numbers(optimizer).items() if not name.startswith("_")}


def _numbers(optimizer: optim.Optimizer) -> dict[str, list[float]]:
    found = {}
    for name, value in vars(optimizer).items():
        if name not in _NO_OPTIONS:
            values = value if isinstance(value, (list, tuple)) else [value]
            found[name] = [float(x) for x in values if isinstance(x, numbers.Real)]
    return {name: values for name, values in found.items() if values}
