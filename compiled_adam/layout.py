"""The flattened tree: where its arrays live, read and written in place, without walking the tree at every step.

A tree is what MLX means by it: arrays nested in dicts and lists; an ``nn.Module`` is such a dict. Paths are those of
``mlx.utils.tree_flatten``: ``"layers.0.weight"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import InputError


class Places:
    """Array leaves of a tree by the container that holds them, so that what others assign is seen at once."""

    def __init__(self, places: Sequence[tuple[str, Any, Any]]) -> None:
        self.paths = tuple(path for path, _, _ in places)
        self.places = [(container, key) for _, container, key in places]

    def __len__(self) -> int:
        return len(self.places)

    def read(self) -> list[mx.array]:
        return [container[key] for container, key in self.places]

    def exchange(self, arrays: Mapping[int, mx.array]) -> dict[int, mx.array]:
        """Assigns some by their index, and returns what was there."""
        before = {}
        for index, array in arrays.items():
            container, key = self.places[index]
            before[index], container[key] = container[key], array
        return before

    def write(self, arrays: Sequence[mx.array]) -> None:
        for (container, key), array in zip(self.places, arrays, strict=True):
            container[key] = array


class Structure:
    """The containers of a tree: whether they still are what they were, and a way back to it.

    A container that occurs twice (tied modules) counts once, under its first path. Tuples are looked into for
    containers, but arrays that stand in a tuple cannot be assigned and are left alone, as MLX itself does.
    """

    def __init__(self, root: Any) -> None:
        self._nodes: list[tuple[Any, Any, list[tuple[Any, Any]], set[str] | None]] = []
        self.modules: list[nn.Module] = []
        leaves: list[tuple[str, Any, Any]] = []
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
                elif isinstance(value, mx.array) and not isinstance(node, tuple):
                    leaves.append((path, node, key))
            pending.extend((f"{prefix}{key}.", value) for key, value in reversed(children))
            if isinstance(node, nn.Module):
                self.modules.append(node)
            if not isinstance(node, tuple):
                frozen = set(node._no_grad) if isinstance(node, nn.Module) else None
                self._nodes.append((node, _keys(node), children, frozen))
        self.leaves = leaves

    def intact(self) -> bool:
        """Whether no container gained, lost or replaced a child, and no module was frozen or unfrozen."""
        return all(
            _keys(node) == keys
            and (frozen is None or node._no_grad == frozen)
            and all(node[key] is child for key, child in children)
            for node, keys, children, frozen in self._nodes
        )

    def snapshot(self) -> list[Any]:
        """The present content of every container, and the attributes of modules, for `restore`."""
        return [(list(node) if isinstance(node, list) else dict(node), _attributes(node)) for node, *_ in self._nodes]

    def restore(self, snapshot: list[Any], attributes: bool = False) -> None:
        """Puts back the arrays of a `snapshot`, and with ``attributes`` everything else that modules had."""
        for (node, *_), (content, state) in zip(self._nodes, snapshot, strict=True):
            if isinstance(node, list):
                node[:] = content
            else:
                node.clear()
                dict.update(node, content)  # nn.Module.update means something else
            if attributes and isinstance(node, nn.Module):
                # Assigning an array to an attribute that was None moves it from here to the dictionary.
                vars(node).clear()
                vars(node).update(state)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    return iter(node.items()) if isinstance(node, dict) else enumerate(node)


def _keys(node: Any) -> Any:
    return list(node) if isinstance(node, dict) else len(node)


def _attributes(node: Any) -> dict[str, Any]:
    """A module's attributes that are not in its dictionary; sets, such as its frozen keys, are copied."""
    attributes = vars(node) if isinstance(node, nn.Module) else {}
    return {name: set(value) if isinstance(value, set) else value for name, value in attributes.items()}


def along(template: Any, tree: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places (path, container, key) in ``tree`` of the leaves of ``template``, which has its shape or less.

    >>> [(path, key) for path, _, key in along({"a": [1, 2]}, {"a": [mx.array(1), mx.array(2)], "b": {}})]
    [('a.0', 0), ('a.1', 1)]
    """
    for key, value in _items(template):
        if isinstance(value, (dict, list, tuple)):
            yield from along(value, tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree, key


def indexed(tree: Any, indices: dict[str, int], prefix: str = "") -> Any:
    """``tree`` with the index of its path at each leaf, and without the leaves that have none.

    Those are tied parameters under a further path: an update, or the norm, must not count them again. In a list, where
    leaving one out would move the others, it is an empty dict, as MLX has it for a frozen layer.
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
    """The places (path, container, key) of a model's trainable parameters, and their tree, with indices for arrays.

    Raises TypeError for one that has no gradient, ValueError if there is none.
    """
    trainable = model.trainable_parameters()
    seen: dict[tuple[int, Any], int] = {}
    paths: set[str] = set()
    places: list[tuple[str, Any, Any]] = []
    for path, container, key in along(trainable, model):
        if not mx.issubdtype(container[key].dtype, mx.floating):
            raise TypeError(
                f"the trainable parameter {path!r} is {container[key].dtype}, which has no gradient;"
                " freeze it, for example with model.freeze(recurse=False, keys=[...]) of its module"
            )
        if (id(container), key) not in seen:  # else: tied, the same container under another path
            if path in paths:
                raise InputError(f"two parameters have the path {path!r}; rename one, so that their states have places")
            paths.add(path)
            seen[id(container), key] = len(places)
            places.append((path, container, key))
    if not places:
        raise InputError("the model has no trainable parameters; unfreeze some with model.unfreeze()")
    return places, indexed(trainable, {path: i for i, (path, _, _) in enumerate(places)})


class Aligned:
    """Gradients with the parameter and the optimizer state of each, as flat lists in the gradients' order.

    ``gradients`` may be a subset of ``parameters``. Raises ValueError or TypeError, naming the path, for a gradient
    without a parameter and for one that is not an array. Leaves that have no state yet are in `without_state`.
    """

    def __init__(self, gradients: Any, parameters: Any, state: Any) -> None:
        self.gradients: list[mx.array] = []
        self.parameters: list[mx.array] = []
        self.states: list[dict[str, mx.array]] = []
        self.without_state: list[str] = []
        paths: list[str] = []
        self._walk(gradients, parameters, state, "", paths)
        self.paths = tuple(paths)

    def _walk(self, gradient: Any, parameter: Any, state: Any, path: str, paths: list[str]) -> None:
        if isinstance(gradient, (dict, list, tuple)):
            for key, value in _items(gradient):
                below = f"{path}.{key}" if path else str(key)
                if not _has(parameter, key):
                    raise InputError(f"there is a gradient for {below!r}, but the parameters have no such path")
                # An empty subtree, which MLX writes for a frozen layer, needs no state.
                self._walk(value, parameter[key], state[key] if _has(state, key) else None, below, paths)
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


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else isinstance(node, (list, tuple)) and key < len(node)
