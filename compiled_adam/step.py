"""``make_step``: a compiled train step, made of a gradient graph per batch signature and one update graph.

The gradient graph depends on the batch's shapes, the update never does. They are separate compiled functions,
joined lazily and evaluated together: a new sequence length traces the forward and backward pass only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from . import batch as batches
from . import rule
from .layout import Places, Structure, along
from .optimizers import Adam


class StepResult(NamedTuple):
    """What one call of a `TrainStep` gives. Arrays are lazy: reading one waits for the step."""

    loss: mx.array  # 0-d, of this batch before the update; from `flush` the mean over the window
    aux: tuple[Any, ...]  # what loss_fn returned after the loss
    grad_norm: mx.array | None  # 0-d float32, global norm of the (mean) gradient; None where nothing was updated
    learning_rate: mx.array | None  # 0-d, of the last update; None for an optimizer that has none
    updated: bool  # whether this call applied an update
    skipped: mx.array  # 0-d, how many updates were skipped so far


class _Gradient(NamedTuple):
    """The compiled loss and gradient of one batch signature."""

    run: Callable[..., Any]
    assigned: list[int]  # which arrays other than parameters the forward pass assigns; known once traced


class TrainStep:
    """A training step that is called with a batch; made by `make_step`, where the arguments are described."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        optimizer: optim.Optimizer | None = None,
        *,
        accumulate: int = 1,
        weighted: bool = False,
        max_traces: int = 64,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; pass an mlx.nn.Module")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn is {type(loss_fn).__name__}; pass a function loss_fn(model, *batch)")
        if optimizer is not None and not isinstance(optimizer, optim.Optimizer):
            raise TypeError(
                f"optimizer is {type(optimizer).__name__}; pass an optimizer such as AdamW(learning_rate=1e-3)"
            )
        for name, value in (("accumulate", accumulate), ("max_traces", max_traces)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer: optim.Optimizer = Adam(1e-3) if optimizer is None else optimizer
        self.accumulate = accumulate
        self.weighted = weighted
        self.max_traces = max_traces
        # How often the Python of each graph ran: once a trace, or at every call where nothing is compiled.
        self.traces = {"grad": 0, "accumulate": 0, "update": 0, "evicted": 0}
        self._gradients: OrderedDict[Hashable, _Gradient] = OrderedDict()
        self._window: Any
        self._add = mx.compile(self._trace_accumulate)
        self._update = mx.compile(self._trace_update)
        self._bind_model()
        self._bind_optimizer()
        self._open_window()

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """One (micro-)batch: ``loss_fn(model, *args, **kwargs)``, its gradient and, at a window's end, the update."""
        self._rebind_if_changed()
        arrays, signature = batches.flatten(args, kwargs)
        assigned, (loss, aux, buffers, gradients, weight) = self._gradient(signature, arrays)
        grad_norm = None
        if self.accumulate == 1:
            grad_norm = self._apply(gradients, weight)
        else:
            self._window = self._add(self._window, gradients, weight, loss)
            self._filled += 1
        del gradients  # the graph alone must hold them, or their memory cannot be reused
        if self._filled == self.accumulate:
            grad_norm = self._close_window()
        self._others.write_at(assigned, buffers)
        return self._finish(loss, aux, grad_norm)

    def flush(self) -> StepResult | None:
        """Applies a window that is only partly filled, as the mean over what it has; None if it is empty."""
        if not self._filled:
            return None
        self._rebind_if_changed()
        _, weight, loss = self._window
        return self._finish(loss / weight, (), self._close_window())

    def _finish(self, loss: mx.array, aux: Any, grad_norm: mx.array | None) -> StepResult:
        """Starts the evaluation of everything the call has changed, all at once."""
        mx.async_eval(
            loss,
            aux,
            grad_norm,
            self._parameters.read(),
            self._state.read(),
            self._others.read(),
            self._window,
            _random_key(),
        )
        learning_rate = _learning_rate(self.optimizer)
        return StepResult(loss, tuple(aux), grad_norm, learning_rate, grad_norm is not None, mx.array(0))

    # The gradient, one compiled function for each batch signature.

    def _gradient(self, signature: Hashable, arrays: list[mx.array]) -> tuple[list[int], Any]:
        # Layers read `training` while they are traced, so a trace holds for one setting of it only.
        key = signature, tuple([module.training for module in self._structure.modules])
        gradient = self._gradients.pop(key, None)
        if gradient is None:
            while len(self._gradients) >= self.max_traces:
                self._gradients.popitem(last=False)
                self.traces["evicted"] += 1
            gradient = self._compile_gradient(signature)
        random_key = _random_key()
        try:
            result = gradient.run(self._parameters.read(), self._others.read(), arrays)
        except BaseException:
            # A trace that ends early leaves a placeholder in MLX's random state, where nothing else can be assigned.
            if _random_key() is not random_key:
                high, low = cast(list[int], random_key.tolist())
                mx.random.seed(high << 32 | low)
            raise
        self._gradients[key] = gradient  # the most recently used comes last
        return gradient.assigned, result

    def _compile_gradient(self, signature: Hashable) -> _Gradient:
        assigned: list[int] = []

        def gradient(parameters: list[mx.array], others: list[mx.array], arrays: list[mx.array]) -> Any:
            self.traces["grad"] += 1
            args, kwargs = batches.rebuild(signature, iter(arrays))

            # Everything but the loss leaves by a list: as a further output of value_and_grad it gets a
            # stop_gradient, over which mx.compile loses outputs (IndexError) if a cast occurs in the loss as well.
            rest: list[Any] = []

            def forward(parameters: list[mx.array]) -> mx.array:
                self._parameters.write(parameters)
                self._others.write(others)
                loss, aux, weight = _checked(self.loss_fn(self.model, *args, **kwargs), self.weighted)
                self._refuse_new_arrays()
                now = self._others.read()
                assigned[:] = [i for i, array in enumerate(now) if array is not others[i]]
                rest.extend((aux, [now[i] for i in assigned], weight))
                return loss

            before = self._structure.snapshot()
            try:
                loss, gradients = mx.value_and_grad(forward)(parameters)
            except BaseException:
                self._structure.restore(before, attributes=True)
                raise
            self._structure.restore(before)
            aux, buffers, weight = rest
            return loss, aux, buffers, gradients, weight

        random_state = [mx.random.state]
        return _Gradient(mx.compile(gradient, inputs=random_state, outputs=random_state), assigned)

    def _refuse_new_arrays(self) -> None:
        if not self._structure.intact():
            new = {path for path, *_ in Structure(self.model).leaves} - {p for p, *_ in self._structure.leaves}
            raise ValueError(
                f"loss_fn changed the structure of the model ({', '.join(sorted(new)) or 'replaced a container'});"
                " what the forward pass assigns must exist before make_step, so create it in __init__"
            )

    # The window of accumulated gradients.

    def _open_window(self) -> None:
        self._filled = 0
        totals = [mx.zeros(p.shape, mx.float32) for p in self._parameters.read()] if self.accumulate > 1 else []
        self._window = (totals, mx.array(0.0), mx.array(0.0))  # gradient, weight and loss

    def _trace_accumulate(self, window: Any, gradients: list[mx.array], weight: mx.array, loss: mx.array) -> Any:
        self.traces["accumulate"] += 1
        totals, total_weight, total_loss = window
        totals = [t + weight * g.astype(mx.float32) for t, g in zip(totals, gradients, strict=True)]
        return totals, total_weight + weight, total_loss + weight * loss.astype(mx.float32)

    def _close_window(self) -> mx.array:
        totals, weight, _ = self._window
        grad_norm = self._apply(totals, weight)
        self._open_window()
        return grad_norm

    # The update, one compiled function.

    def _apply(self, gradients: list[mx.array], weight: mx.array) -> mx.array:
        parameters, state, grad_norm = self._update(self._parameters.read(), gradients, weight, self._state.read())
        self._parameters.write(parameters)
        self._state.write(state)
        return grad_norm

    def _trace_update(
        self, parameters: list[mx.array], gradients: list[mx.array], weight: mx.array, state: list[mx.array]
    ) -> tuple[list[mx.array], list[mx.array], mx.array]:
        self.traces["update"] += 1
        if self.accumulate > 1:
            # Rounded once, to the dtype that the gradient of one big batch would have.
            gradients = [(g / weight).astype(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        before = self._state_structure.snapshot()
        try:
            self._state.write(state)
            updated = self.optimizer.apply_gradients(self._tree(gradients), self._tree(parameters))
            if not self._state_structure.intact():
                raise ValueError("the optimizer changed the structure of its state; create all of it in init_single")
            state = self._state.read()
        finally:
            self._state_structure.restore(before)
        leaves = {path: container[key] for path, container, key in along(self._template, updated)}
        return [leaves[path] for path in self._parameters.paths], state, rule.global_norm(gradients)

    def _tree(self, arrays: list[mx.array]) -> Any:
        """The flat ``arrays`` as a tree of parameters; tied parameters get the same array in every place."""
        return tree_map(lambda index: arrays[index], self._template)

    # What the graphs are bound to.

    def _bind_model(self) -> None:
        """Finds every array of the model: the trainable ones, and the others (frozen parameters and buffers)."""
        trainable = self.model.trainable_parameters()
        self._structure = Structure(self.model)
        index: dict[tuple[int, Any], int] = {}
        places: list[tuple[str, Any, Any]] = []
        indices = []
        for path, container, key in along(trainable, self.model):
            if not mx.issubdtype(container[key].dtype, mx.floating):
                raise TypeError(
                    f"the trainable parameter {path!r} is {container[key].dtype}, which has no gradient;"
                    " freeze it, for example with model.freeze(recurse=False, keys=[...]) of its module"
                )
            if (id(container), key) not in index:  # else: tied, the same container under another path
                index[id(container), key] = len(places)
                places.append((path, container, key))
            indices.append(index[id(container), key])
        if not places:
            raise ValueError("the model has no trainable parameters; unfreeze some with model.unfreeze()")
        self._parameters = Places(places)
        self._others = Places([leaf for leaf in self._structure.leaves if (id(leaf[1]), leaf[2]) not in index])
        order = iter(indices)
        self._template = tree_map(lambda _: next(order), trainable)

    def _bind_optimizer(self) -> None:
        # State exists before the first trace, or that trace would hold for the first step only.
        self.optimizer.init(self.model.trainable_parameters())
        self._state_roots = _states(self.optimizer)
        self._state_structure = Structure(self._state_roots)
        self._state = Places(self._state_structure.leaves)

    def _rebind_if_changed(self) -> None:
        """Follows a model or optimizer whose containers were replaced; refuses other trainable parameters."""
        if not self._structure.intact():
            trainable = self.model.trainable_parameters()
            before = {path for path, *_ in along(self._template, self._template)}
            now = {path for path, *_ in along(trainable, trainable)}
            if before != now:
                changes = [
                    f"{what}: {', '.join(sorted(paths))}"
                    for what, paths in (
                        ("no longer trainable", before - now),
                        ("newly trainable", now - before),
                    )
                    if paths
                ]
                raise ValueError(
                    f"the model's parameters changed since make_step ({'; '.join(changes)});"
                    " call make_step again, with the same optimizer to keep its moments"
                )
            self._bind_model()
            self._gradients.clear()  # they may contain replaced layers
        states = _states(self.optimizer)
        same = len(states) == len(self._state_roots) and all(
            a is b for a, b in zip(states, self._state_roots, strict=True)
        )
        if not same or not self._state_structure.intact():
            self._bind_optimizer()


def make_step(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: optim.Optimizer | None = None,
    *,
    accumulate: int = 1,
    weighted: bool = False,
    max_traces: int = 64,
) -> TrainStep:
    """A compiled train step: ``step(*batch)`` computes the loss and its gradient and updates the model in place.

    With ``accumulate=N`` every N-th call updates, with the mean gradient ``sum_i w_i g_i / sum_i w_i`` of the N
    micro-batches (summed in float32), where ``w_i`` is 1, or with ``weighted=True`` what loss_fn returns second.

    Args:
        model: the module to train: its trainable parameters are updated, and arrays that the forward pass assigns
            (such as running statistics) are kept. The random state (dropout) advances as it does without a step.
        loss_fn: ``loss_fn(model, *args, **kwargs)`` returns the loss, a 0-d float array, or a tuple that begins
            with it. It is traced: it runs when a batch has a new signature, not at every call.
        optimizer: any ``mlx.optimizers`` optimizer. Default ``Adam(1e-3)``.
        accumulate: micro-batches per update, at least 1. Default 1.
        weighted: whether the second item of loss_fn's tuple is the weight of the batch, a 0-d array, usually its
            number of tokens. The loss is then a mean over that many. Default False.
        max_traces: how many gradient traces are kept. A trace belongs to a batch signature (structure, shapes,
            dtypes, Python constants) and the modules' ``training`` flags; the least recently used goes first.

    Returns:
        a `TrainStep`: call it with a batch for a `StepResult`; ``flush()`` applies a partly filled window;
        ``traces`` counts traces of each graph.

    Raises:
        TypeError, ValueError: here for an unusable argument or a model without trainable parameters; at a call
            for a loss that is no scalar, or if parameters were frozen, unfrozen or added since. If loss_fn
            raises, model, optimizer and random state are as before the call.

    >>> model = nn.Linear(2, 1)
    >>> step = make_step(model, lambda model, x, y: mx.square(model(x) - y).mean(), Adam(0.1))
    >>> x, y = mx.array([[1.0, 2.0], [3.0, 4.0]]), mx.array([[1.0], [2.0]])
    >>> losses = [step(x, y).loss.item() for _ in range(50)]
    >>> losses[-1] < 0.1 * losses[0], step.traces
    (True, {'grad': 1, 'accumulate': 0, 'update': 1, 'evicted': 0})
    """
    return TrainStep(model, loss_fn, optimizer, accumulate=accumulate, weighted=weighted, max_traces=max_traces)


def _checked(output: Any, weighted: bool) -> tuple[mx.array, list[Any], mx.array]:
    """What loss_fn returned as (loss, aux, weight); raises an error that says what to return instead."""
    loss, *aux = output if isinstance(output, (tuple, list)) and output else (output,)
    if not isinstance(loss, mx.array):
        raise TypeError(
            f"loss_fn returned {type(loss).__name__} as the loss; return an mx.array of shape (),"
            " or a tuple that begins with one"
        )
    if loss.shape != ():
        raise ValueError(f"loss_fn returned a loss of shape {loss.shape}; reduce it to a scalar, as with .mean()")
    if not mx.issubdtype(loss.dtype, mx.floating):
        raise TypeError(f"loss_fn returned a loss of dtype {loss.dtype}; return a float")
    if not weighted:
        return loss, aux, mx.array(1.0)
    if not aux:
        raise ValueError("weighted=True needs loss_fn to return (loss, weight, ...); it returned the loss alone")
    weight = aux[0]
    if isinstance(weight, bool) or not isinstance(weight, (mx.array, int, float)):
        raise TypeError(f"loss_fn returned {type(weight).__name__} as the weight; return a 0-d array or a number")
    weight = mx.array(weight, mx.float32)
    if weight.shape != ():
        raise ValueError(f"loss_fn returned a weight of shape {weight.shape}; reduce it to a scalar, as with .sum()")
    return loss, aux, weight


def _random_key() -> mx.array:
    """MLX's global random state, which code can read here but only ``mx.random.seed`` and ``mx.compile`` can set."""
    return mx.random.state[0]  # type: ignore[index]


def _states(optimizer: optim.Optimizer) -> list[Any]:
    """The state dictionaries of an optimizer, or of those that a MultiOptimizer delegates to."""
    if isinstance(optimizer, optim.MultiOptimizer):
        return [state for part in optimizer.optimizers for state in _states(part)]
    return [optimizer.state]


def _learning_rate(optimizer: optim.Optimizer) -> mx.array | None:
    while isinstance(optimizer, optim.MultiOptimizer):
        optimizer = optimizer.optimizers[0]
    return optimizer.state.get("learning_rate")
