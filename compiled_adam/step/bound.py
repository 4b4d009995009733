"""The places of the arrays of a model and an optimizer, and the graphs that a train step has made for them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import InputError, Places, Structure, along, trainable_places
from ..distributed import Shard
from ..optimizers import Adam, ForSteps, any_optimizer
from .apply import Trees
from .apply_packed import PackedTrees
from .gradient import GradientGraphs
from .other_models import other_models
from .settings import LossFunction, Settings
from .update_graph import UpdateGraph


class Bound(NamedTuple):
    structure: Structure
    parameters: Places
    arrays: Places  # all arrays of the model; the parameters come first
    inputs: Places  # the same, and after them the arrays of other models that loss_fn uses
    others: Structure  # these other models
    paths: set[str]  # the paths of the trainable parameters; a tied parameter has several
    template: Any  # the tree of parameters with an index in place of each array
    shard: Shard | None
    trees: Trees | PackedTrees
    gradients: GradientGraphs
    graph: UpdateGraph

    def intact(self) -> bool:
        """Whether the arrays of the model and of the optimizer are still in the same containers."""
        return self.structure.intact() and self.trees.intact() and self.others.intact()

    def tree(self, arrays: list[mx.array]) -> Any:
        """A flat list of one array per parameter, as a tree."""
        return tree_map(lambda index: arrays[index], self.template)

    def running_statistics(self) -> dict[str, mx.array]:
        """The running statistics of BatchNorm layers. A checkpoint from before the first step needs them, too."""
        return {
            path: container[key]
            for path, (container, key) in zip(self.arrays.paths, self.arrays.places, strict=True)
            if isinstance(container, nn.BatchNorm) and key in ("running_mean", "running_var")
        }


def bind(model: nn.Module, loss_fn: LossFunction, optimizer: optim.Optimizer, settings: Settings) -> Bound:
    """Finds every array of the model and of the optimizer's state, creates missing state, and makes the graphs."""
    trainable = model.trainable_parameters()
    structure = Structure(model)
    found, template = trainable_places(model)
    seen = {(id(container), key) for _, container, key in found}
    others = [leaf for leaf in structure.leaves if (id(leaf[1]), leaf[2]) not in seen]
    parameters, arrays = Places(found), Places([*found, *others])
    weights = parameters.read()
    dtypes = [weight.dtype for weight in weights]
    if settings.group is not None and mx.complex64 in dtypes:
        path = parameters.paths[dtypes.index(mx.complex64)]
        raise InputError(f"{path!r} is complex64, which several workers cannot train together; freeze it")
    # The state is created before the first trace, or that trace would fit the first step only. All is evaluated,
    # because another thread may make the first step, and that thread could not evaluate lazy arrays of this one.
    tree = tree_map(lambda i: weights[i], template)
    shard = None
    if settings.shard_state and settings.group is not None:
        shard = Shard(optimizer, tree, parameters.paths, settings.group)
    if reshaped := any_optimizer.begin_anew(optimizer, tree):
        warnings.warn(f"the moments of {', '.join(reshaped)} had another shape; they begin anew", stacklevel=5)
    init(optimizer, tree, shard)
    mx.eval(arrays.read(), any_optimizer.states(optimizer))
    trees = trees_of(model, optimizer, parameters, template, settings, shard)
    its = other_models(loss_fn, model)
    known = {(id(container), key) for container, key in arrays.places}  # layers that both models have
    inputs = Places([*found, *others, *(leaf for leaf in its.leaves if (id(leaf[1]), leaf[2]) not in known)])
    gradients = GradientGraphs(model, loss_fn, structure, its, inputs, len(found), settings, trees.pack)
    graph = UpdateGraph(optimizer, trees, dtypes, settings)
    paths = {path for path, _, _ in along(trainable, trainable)}
    return Bound(structure, parameters, arrays, inputs, its, paths, template, shard, trees, gradients, graph)


def trees_of(
    model: nn.Module,
    optimizer: optim.Optimizer,
    parameters: Places,
    template: Any,
    settings: Settings,
    shard: Shard | None = None,
) -> Trees | PackedTrees:
    """The places of parameters and state, packed if that can be."""
    if settings.group is not None:
        # No packing: the norm and the kernels must be the same to the last bit with and without shards.
        for part in any_optimizer.parts(optimizer):
            if isinstance(part, Adam):
                ForSteps(part).leaves.join_none()
    elif isinstance(optimizer, Adam) and not ForSteps(optimizer).has_own_update:
        return PackedTrees(optimizer, parameters, template)
    return Trees(model, optimizer, parameters, template, shard)


def init(optimizer: optim.Optimizer, parameters: Any, shard: Shard | None) -> None:
    """Creates missing state of the optimizer."""
    if shard is None:
        any_optimizer.init(optimizer, parameters)
    else:
        shard.init(parameters)


def check_parameters(model: nn.Module, bound: Bound) -> None:
    """Raises ValueError if parameters were frozen, unfrozen or added. The message names the paths."""
    trainable = model.trainable_parameters()
    now = {path for path, *_ in along(trainable, trainable)}
    if bound.paths == now:
        return
    changes = [
        f"{what}: {', '.join(sorted(paths))}"
        for what, paths in (("no longer trainable", bound.paths - now), ("newly trainable", now - bound.paths))
        if paths
    ]
    raise InputError(
        f"the model's parameters changed since make_step ({'; '.join(changes)});"
        " call make_step again, with the same optimizer to keep its moments"
    )
