"""Flat lists of the places of a tree's arrays, to read and write them without walking the tree at every step.

A tree is arrays nested in dicts and lists, as in MLX. An ``nn.Module`` is such a dict. A leaf is an array in a tree.
Paths are written like ``mlx.utils.tree_flatten`` writes them: ``"layers.0.weight"``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .at_once import Assignments, call_all
from .errors import InputError


class Places:
    """The leaves of a tree as (container, key), so that reading sees arrays that callers have assigned."""

    def __init__(self, places: Sequence[tuple[str, Any, Any]]) -> None:
        self.paths = tuple(path for path, _, _ in places)
        self.containers = [container for _, container, _ in places]
        self.keys = [key for _, _, key in places]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def places(self) -> list[tuple[Any, Any]]:
        """The places as (container, key)."""
        return list(zip(self.containers, self.keys, strict=True))

    def read(self) -> list[mx.array]:
        """The present arrays. Raises TypeError if a value is no array. The message names the path."""
        arrays: list[Any] = list(map(operator.getitem, self.containers, self.keys))
        if set(map(type, arrays)) != {mx.array}:  # all in C, because a step reads thousands
            for path, array in zip(self.paths, arrays, strict=True):
                if not isinstance(array, mx.array):
                    raise TypeError(f"{path!r} has become {type(array).__name__}; assign an mx.array")
        return arrays

    def write(self, arrays: Sequence[mx.array]) -> None:
        assignments = Assignments()
        self.assign(arrays, assignments)
        assignments.make()

    def assign(self, arrays: Sequence[mx.array], assignments: Assignments) -> None:
        """Like `write`, but adds to ``assignments`` instead of assigning."""
        assignments.add_all(self.containers, self.keys, arrays)


class Structure:
    """The containers of a tree. It detects whether they have changed, and can restore their content.

    A container that occurs twice (tied modules) counts once, under the first path. Containers inside tuples count.
    Arrays directly in a tuple cannot be assigned and are ignored, as in MLX. With ``freezing=False`` it is no change if
    parameters are frozen or unfrozen.
    """

    def __init__(self, root: Any, *, freezing: bool = True) -> None:
        self._root, self._freezing = root, freezing
        self._nodes: list[tuple[Any, Any, list[tuple[Any, Any]], set[str] | None]] = []
        self._constants: dict[tuple[int, Any], tuple[Any, Any, mx.array]] = {}  # arrays that `follow` has accepted
        self.modules: list[nn.Module] = []
        self.leaves: list[tuple[str, Any, Any]] = []
        self.in_tuples: list[tuple[str, Any, Any]] = []
        seen: set[int] = set()
        pending = [("", root)]
        while pending:
            prefix, node = pending.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            children = []
            for key, value in _items(node):
                path = f"{prefix}{key}"
                if isinstance(value, (dict, list, tuple)):
                    children.append((key, value))
                elif isinstance(value, mx.array):
                    (self.in_tuples if isinstance(node, tuple) else self.leaves).append((path, node, key))
            pending.extend((f"{prefix}{key}.", value) for key, value in reversed(children))
            if isinstance(node, nn.Module):
                self.modules.append(node)
            if not isinstance(node, tuple):
                frozen = set(node._no_grad) if freezing and isinstance(node, nn.Module) else None
                self._nodes.append((node, _keys(node), children, frozen))

    def intact(self) -> bool:
        """Whether all arrays and modules are at the same places, and none was frozen or unfrozen.

        Containers without arrays and modules may change, such as a growing list of numbers or a replaced tuple.
        """
        if any((now := below(c, key)) is not None and now is not array for c, key, array in self._constants.values()):
            return False
        if all(
            _keys(node) == keys
            and (frozen is None or node._no_grad == frozen)
            and all(node[key] is child for key, child in children)
            for node, keys, children, frozen in self._nodes
        ):
            return True
        return self.follow(Structure(self._root, freezing=self._freezing), [])

    def children(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Three lists about all containers below the root: the parent, the key in the parent, and the container."""
        every = [(node, key, child) for node, _, children, _ in self._nodes for key, child in children]
        return [node for node, _, _ in every], [key for _, key, _ in every], [child for _, _, child in every]

    def added(self, now: Structure) -> list[tuple[str, Any, Any]]:
        """The arrays (path, container, key) at new places in ``now``, a later structure of the same tree.

        A constant that was replaced by another array counts as new.
        """
        known = {(id(container), key) for _, container, key in self.leaves}
        known |= {place for place, (c, key, array) in self._constants.items() if below(c, key) is array}
        known_in_tuples = {id(node) for _, node, _ in self.in_tuples}
        return [leaf for leaf in now.leaves if (id(leaf[1]), leaf[2]) not in known] + [
            leaf for leaf in now.in_tuples if id(leaf[1]) not in known_in_tuples
        ]

    def follow(self, now: Structure, constants: Sequence[tuple[str, Any, Any]]) -> bool:
        """Adopts a later structure of the same tree, which may have ``constants`` as new arrays. Returns success.

        It works if all other arrays and modules are at the same places. Constants do not join the `leaves`.
        """
        merged = self._constants | {(id(c), k): (c, k, c[k]) for _, c, k in constants if not isinstance(c, tuple)}
        mine, its = (
            [(path, id(c), key) for path, c, key in structure.leaves if (id(c), key) not in merged]
            for structure in (self, now)
        )
        if mine != its or self._modules() != now._modules() or len(self.added(now)) > len(constants):
            return False
        # If an interrupt comes between these lines, the next call does the rest.
        self._constants = {place: each for place, each in merged.items() if below(each[0], each[1]) is not None}
        self.in_tuples = now.in_tuples
        self._nodes = now._nodes
        return True

    def _modules(self) -> list[tuple[int, set[str]]]:
        return [(id(node), frozen) for node, _, _, frozen in self._nodes if frozen is not None]

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that restores the present content of every container and the attributes of modules."""
        calls: list[Callable[[], object]] = []
        for node, *_ in self._nodes:
            if isinstance(node, list):
                calls.append(partial(operator.setitem, node, slice(None), list(node)))
                continue
            # dict.update, because nn.Module.update means something else.
            calls += [partial(dict.clear, node), partial(dict.update, node, dict(node))]
            if isinstance(node, nn.Module):
                # nn.Module keeps None in the attributes: assigning an array later moves the name to the dictionary.
                attributes = vars(node)
                calls += [partial(dict.clear, attributes), partial(dict.update, attributes, _copied(attributes))]
        return partial(call_all, calls)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    return iter(node.items()) if isinstance(node, dict) else enumerate(node)


def _keys(node: Any) -> Any:
    return list(node) if isinstance(node, dict) else len(node)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with copies of sets, such as the set of frozen keys."""
    return {name: set(value) if isinstance(value, set) else value for name, value in attributes.items()}


def along(template: Any, tree: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places (path, container, key) in ``tree`` of the leaves of ``template``. ``tree`` may have more leaves.

    >>> [(path, key) for path, _, key in along({"a": [1, 2]}, {"a": [mx.array(1), mx.array(2)], "b": {}})]
    [('a.0', 0), ('a.1', 1)]
    """
    for key, value in _items(template):
        if isinstance(value, (dict, list, tuple)):
            if value:  # MLX leaves out empty containers when it splits and merges trees
                yield from along(value, below(tree, key), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree, key


def indexed(tree: Any, indices: dict[str, Any], prefix: str = "") -> Any:
    """``tree`` with an index (or any value) in place of each leaf, and without the leaves whose path has no index.

    Leaves without an index are tied parameters under a second path: the update and the norm must count them once only.
    In a list such a leaf becomes an empty dict, like a frozen layer in MLX, because removing it would move the others.
    """
    if isinstance(tree, dict):
        children = {key: indexed(child, indices, f"{prefix}.{key}") for key, child in tree.items()}
        return {key: child for key, child in children.items() if child is not None}
    if isinstance(tree, (list, tuple)):
        return [
            {} if (child := indexed(each, indices, f"{prefix}.{i}")) is None else child for i, each in enumerate(tree)
        ]
    return indices.get(prefix[1:])


def trainable_places(model: nn.Module) -> tuple[list[tuple[str, Any, Any]], Any]:
    """The places (path, container, key) of a model's trainable parameters, and their tree with indices for arrays.

    Raises TypeError if a parameter's dtype has no gradient, ValueError if there are no trainable parameters.
    """
    trainable = model.trainable_parameters()
    seen: dict[tuple[int, Any], int] = {}
    paths: set[str] = set()
    places: list[tuple[str, Any, Any]] = []
    for path, container, key in along(trainable, model):
        if not mx.issubdtype(container[key].dtype, mx.inexact):
            raise TypeError(
                f"the trainable parameter {path!r} is {container[key].dtype}, which has no gradient;"
                " freeze it, for example with model.freeze(recurse=False, keys=[...]) of its module"
            )
        if (id(container), key) not in seen:  # else it is tied: the same container under another path
            if path in paths:
                raise InputError(f"two parameters have the path {path!r}; rename one of them")
            paths.add(path)
            seen[id(container), key] = len(places)
            places.append((path, container, key))
    if not places:
        raise InputError("the model has no trainable parameters; unfreeze some with model.unfreeze()")
    return places, indexed(trainable, {path: i for i, (path, _, _) in enumerate(places)})


class Aligned:
    """Gradients with their parameters and optimizer states, as flat lists in the order of the gradients.

    ``gradients`` may have fewer leaves than ``parameters``. Raises ValueError or TypeError if a gradient has no
    parameter or is not an array. The message names the path. `without_state` has the paths without state.
    """

    def __init__(self, gradients: Any, parameters: Any, state: Any) -> None:
        self.gradients: list[mx.array] = []
        self.parameters: list[mx.array] = []
        self.states: list[dict[str, mx.array]] = []
        self.containers: list[Any] = []  # of the parameters
        self.keys: list[Any] = []  # of the parameters, in their containers
        self.without_state: list[str] = []
        paths: list[str] = []
        self._walk(gradients, parameters, state, "", paths, (None, None))
        self.paths = tuple(paths)

    def _walk(
        self, gradient: Any, parameter: Any, state: Any, path: str, paths: list[str], place: tuple[Any, Any]
    ) -> None:
        if isinstance(gradient, (dict, list, tuple)):
            if _all_arrays(gradient) and self._add_all(gradient, parameter, state, path, paths):
                return
            for key, value in _items(gradient):
                below = f"{path}.{key}" if path else str(key)
                if not _has(parameter, key):
                    raise InputError(f"there is a gradient for {below!r}, but the parameters have no such path")
                # An empty subtree, which MLX writes for a frozen layer, needs no state.
                its_state = state[key] if _has(state, key) else None
                self._walk(value, parameter[key], its_state, below, paths, (parameter, key))
            return
        if not isinstance(gradient, mx.array):
            raise TypeError(
                f"the gradient of {path!r} is {type(gradient).__name__}, not an array;"
                " leave parameters without a gradient out of the tree"
            )
        if not isinstance(parameter, mx.array):
            raise InputError(f"the gradient of {path!r} is an array, but the parameter is {type(parameter).__name__}")
        if not (isinstance(state, dict) and "m" in state and "v" in state):
            self.without_state.append(path)
        paths.append(path)
        self.gradients.append(gradient)
        self.parameters.append(parameter)
        self.states.append(state)
        self.containers.append(place[0])
        self.keys.append(place[1])

    def _add_all(self, gradients: Any, parameters: Any, states: Any, path: str, paths: list[str]) -> bool:
        """Adds all ``gradients`` of a container, in C, because there may be thousands. False if anything is unusual."""
        keys = list(gradients)
        if not (isinstance(parameters, dict) and isinstance(states, dict)):
            return False
        weights: list[Any] = list(map(parameters.get, keys))
        its_states: list[Any] = list(map(states.get, keys))
        if set(map(type, weights)) != {mx.array} or set(map(type, its_states)) != {dict}:
            return False
        if not all(all(map(operator.contains, its_states, repeat(name))) for name in ("m", "v")):
            return False
        paths += [f"{path}.{key}" for key in keys] if path else map(str, keys)
        self.gradients += gradients.values()
        self.parameters += weights
        self.states += its_states
        self.containers += [parameters] * len(keys)
        self.keys += keys
        return True


def filled(tree: Any, values: Iterator[Any]) -> Any:
    """``tree`` with the next of the ``values`` in place of each leaf.

    >>> filled({"a": [1, 2], "b": 3}, iter("xyz"))
    {'a': ['x', 'y'], 'b': 'z'}
    """
    if _all_arrays(tree):
        return dict(zip(tree, values, strict=False))
    if isinstance(tree, dict):
        return {key: filled(child, values) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(filled(child, values) for child in tree)
    return next(values)


def _all_arrays(node: Any) -> bool:
    return isinstance(node, dict) and set(map(type, node.values())) == {mx.array}


def below(node: Any, key: Any) -> Any:
    """The value of a container at a key. None if there is none."""
    return node[key] if _has(node, key) else None


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else isinstance(node, (list, tuple)) and key in range(len(node))
