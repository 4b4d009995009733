"""``make_step``: a compiled train step, made of a gradient graph per batch signature and one update graph.

The gradient graph depends on the batch's shapes, the update never does. They are separate compiled functions,
joined lazily and evaluated together: a new sequence length traces the forward and backward pass only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..base import Assignments, InputError, Row, random_state, undone_on_error
from ..distributed import shard, workers
from ..optimizers import Adam, any_optimizer, check_schedules
from ..update import window
from . import signature as batches
from .bound import Bound, bind, check_parameters
from .guards import Place, Traced, evaluate, take_out_placeholders
from .settings import LossFunction, check_arguments, checked
from .state import StepState
from .update_graph import Update


class StepResult(NamedTuple):
    """What one call of a `TrainStep` gives. Arrays are lazy: reading one waits for the step."""

    loss: mx.array  # 0-d, of this batch before the update; from `flush` the mean over the window
    aux: tuple[Any, ...]  # what loss_fn returned after the loss
    grad_norm: mx.array | None  # 0-d float32, global norm of the (mean) gradient; None where nothing was updated
    learning_rate: mx.array | None  # 0-d, of the last update; None for an optimizer that has none
    updated: bool  # whether this call applied an update
    skipped: mx.array  # 0-d, how many updates were skipped so far
    extra: mx.array | None = None  # 0-d, sum of the workers' `extra`; None without other workers or an update


class TrainStep:
    """A compiled train step: ``step(*batch)`` computes the loss and its gradient and updates the model in place.

    With ``accumulate=N`` every N-th call updates, with the mean gradient ``sum_i w_i g_i / sum_i w_i`` of the N
    micro-batches (summed in float32), where ``w_i`` is 1, or with ``weighted=True`` what loss_fn returns second.

    loss_fn is traced: its Python runs when a batch has a new signature, not at every call. A trace keeps the values
    that Python had when it was made: arrays of other objects (a second model in a closure), attributes such as a
    dropout rate, activation functions. Pass what changes in the batch. Changes of the modules' ``training`` flags are
    followed.
    A schedule must be a pure function of the step.

    Args:
        model: the module to train: its trainable parameters are updated, and arrays that the forward pass assigns
            (such as running statistics) are kept. The random state (dropout) advances as it does without a step.
        loss_fn: ``loss_fn(model, *args, **kwargs)`` returns the loss, a 0-d float array, or a tuple that begins
            with it.
        optimizer: any ``mlx.optimizers`` optimizer. Default ``Adam(1e-3)``.
        accumulate: micro-batches per update, at least 1. Default 1.
        weighted: whether the second item of loss_fn's tuple is the weight of the batch, a 0-d array of at least 0,
            usually its number of tokens. The loss is then a mean over so many tokens. A batch of weight 0 adds
            nothing to the gradient, whatever its loss. An update whose batches all have weight 0 has the gradient 0.
            Default False.
        max_traces: how many gradient traces are kept. A trace belongs to a batch signature (structure, shapes,
            dtypes, Python constants) and the modules' ``training`` flags; the least recently used is dropped first.
        group: workers of ``mx.distributed`` that train the same model, each with its own part of every batch; all call
            the step alike. Gradients are averaged over them once per update, weighted like micro-batches, before
            clipping and guard; a step's loss stays this worker's. Default None: no others.
        reduce_dtype: what gradients are communicated in: "float32" (default), "bfloat16" or "param", the parameters'.
        shard_state: whether each worker of the group keeps the optimizer's state of its part of the parameters only,
            updates those, and gets the others' new weights. Same results to the bit, for parameters are dealt out
            whole; a checkpoint has the whole state. Default False. No effect without other workers.

    A call returns a `StepResult`; ``flush()`` applies a partly filled window; ``traces`` counts how often the Python
    of each graph ran, which is once a trace, or at every call where nothing is compiled. ``extra`` is a number that is
    summed over the workers with the next update, for `StepResult.extra`.

    Raises:
        TypeError, ValueError: `make_step` raises them for an unusable argument, a model without trainable parameters,
            and workers with other parameters, options or package versions (at all workers, naming the rank). A call
            raises them for a loss that is no scalar, inside another ``mx.compile``, and if parameters were frozen,
            unfrozen or added since `make_step`.

    If anything in a call raises, model, optimizer, window and random state are as they were before the call. Ctrl-C
    leaves all of them as before the call, or all as after it. For that, everything but the update is evaluated before
    anything is assigned. The first update of a trace is tested on one parameter of each kind, which takes the memory of
    these parameters once more. A step cannot undo an update that runs out of memory.

    >>> mx.random.seed(0)
    >>> model = nn.Linear(2, 1)
    >>> step = make_step(model, lambda model, x, y: mx.square(model(x) - y).mean(), Adam(0.1))
    >>> x, y = mx.array([[1.0, 2.0], [3.0, 4.0]]), mx.array([[1.0], [2.0]])
    >>> losses = [step(x, y).loss.item() for _ in range(50)]
    >>> losses[-1] < 0.1 * losses[0], step.traces
    (True, {'grad': 1, 'accumulate': 0, 'update': 1, 'evicted': 0})
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: optim.Optimizer | None = None,
        *,
        accumulate: int = 1,
        weighted: bool = False,
        max_traces: int = 64,
        group: mx.distributed.Group | None = None,
        reduce_dtype: str = "float32",
        shard_state: bool = False,
    ) -> None:
        check_arguments(model, loss_fn, optimizer)
        self._settings = checked(accumulate, weighted, max_traces, group, reduce_dtype, shard_state)
        self._model, self._loss_fn = model, loss_fn
        self._optimizer: optim.Optimizer = Adam(1e-3) if optimizer is None else optimizer
        self.extra = 0.0
        self._earlier: Counter[str] = Counter()  # traces of graphs that are no longer used
        self._bound: Bound
        if self._settings.shard_state:
            shard.check(self._optimizer)
        if (others := self._settings.group) is not None:
            workers.check_alike(others, {"shard_state": shard_state})  # first: it decides what is communicated
            shard.complete(self._optimizer, others, model.parameters())
        for part in any_optimizer.parts(self._optimizer):
            check_schedules(part._schedulers)
        self._state = StepState(self._optimizer, self._settings, self._current)
        self._bind()
        if others is not None:
            workers.check_model(others, model, self.description())

    # Read-only, because traces contain them.

    @property
    def model(self) -> nn.Module:
        """The module that is trained."""
        return self._model

    @property
    def loss_fn(self) -> LossFunction:
        """The loss function."""
        return self._loss_fn

    @property
    def optimizer(self) -> optim.Optimizer:
        """The optimizer, whose state the step updates."""
        return self._optimizer

    @property
    def accumulate(self) -> int:
        """Micro-batches per update."""
        return self._settings.accumulate

    @property
    def weighted(self) -> bool:
        """Whether loss_fn returns the weight of a batch."""
        return self._settings.weighted

    @property
    def group(self) -> mx.distributed.Group | None:
        """The workers that train together; None for a group of size 1, too."""
        return self._settings.group

    @property
    def traces(self) -> dict[str, int]:
        """How often the Python of each graph ran, and how many gradient traces were dropped."""
        gradients, graph = self._bound.gradients, self._bound.graph
        now = {"grad": gradients.made, "accumulate": graph.added, "update": graph.updated, "evicted": gradients.evicted}
        return {name: self._earlier[name] + count for name, count in now.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """One (micro-)batch: ``loss_fn(model, *args, **kwargs)``, its gradient and, at a window's end, the update."""
        batch, signature = batches.flatten(args, kwargs)
        try:
            evaluate(batch)
            self._current()
            return self._all_or_nothing(partial(self._micro_batch, signature, batch))
        except Traced:
            model, state, key = self._known
            take_out_placeholders([*model, *state], key)
            raise

    def flush(self) -> StepResult | None:
        """Applies a window that is only partly filled, as the mean over what it has; None if it is empty."""
        if not self._state.filled:
            return None
        self._current()
        return self._all_or_nothing(self._rest_of_window)

    def _all_or_nothing(self, work: Callable[[Assignments], StepResult]) -> StepResult:
        """``work`` builds what it makes, lazily, and then assigns it at once; it raises before that, or not at all."""
        key = random_state.get()
        made: dict[str, bool] = {}
        assignments = Assignments()
        assignments.add(made, "all", True)

        def undo() -> None:
            if not made:  # a compiled function has assigned the random state already
                random_state.assign(key)

        return undone_on_error(partial(work, assignments), undo)

    def _micro_batch(self, signature: Hashable, batch: list[mx.array], assignments: Assignments) -> StepResult:
        bound, kept = self._bound, self._state
        made = bound.gradients(signature, batch)
        # If the batch, the forward or the backward pass cannot be evaluated, this raises while nothing is assigned.
        evaluate(*made, random_state.get())
        loss, aux, assigned, gradients, weight = made
        sums, filled, update, total_loss = None, 0, None, loss
        if self.accumulate > 1:
            before = window.empty(bound.parameters.read()) if kept.window is None else kept.window
            sums = bound.graph.add(before, gradients, weight, loss)
            del before
            filled = kept.filled + 1
            gradients, weight, total_loss = sums
        if filled in (0, self.accumulate):
            update = bound.graph.update(gradients, weight, total_loss, self.extra, assigned)
            sums, filled = None, 0
        if mx.default_device().type == mx.DeviceType.cpu:
            mx.eval(*made)  # what fails on another thread, such as the inverse of a singular matrix, raises only now
        del made, gradients  # the graph alone must hold them, or their memory cannot be reused
        self._assign(assigned, update, sums, filled, assignments)
        return self._result(loss, aux, update)

    def _rest_of_window(self, assignments: Assignments) -> StepResult:
        assert self._state.window is not None
        gradients, weight, loss = self._state.window
        update = self._bound.graph.update(gradients, weight, loss, self.extra, {})
        del gradients
        self._assign({}, update, None, 0, assignments)
        weight, loss, *_ = update.sums or (weight, loss)
        return self._result(loss / weight, [], update)

    def _assign(
        self,
        assigned: dict[int, mx.array],
        update: Update | None,
        sums: window.Window | None,
        filled: int,
        assignments: Assignments,
    ) -> None:
        """Assigns what the forward pass and the update have made, and the window, all at once."""
        bound = self._bound
        for index, array in assigned.items():
            container, key = bound.arrays.places[index]
            if index >= len(bound.parameters):
                self._state.note_buffer(bound.arrays.paths[index], container[key], assignments)
            if update is None or index >= len(bound.parameters):
                assignments.add(container, key, array)
        if update is not None:
            bound.trees.assign(update.parameters, update.state, assignments)
        self._state.assign_window(sums, filled, assignments)
        assignments.make()

    def _result(self, loss: mx.array, aux: list[Any], update: Update | None) -> StepResult:
        """Starts the evaluation of everything that has changed."""
        grad_norm = None if update is None else update.grad_norm
        skipped = sum(any_optimizer.skipped(self._optimizer), mx.array(0))
        extra = update.sums[2] if update is not None and update.sums else None
        rate = any_optimizer.learning_rate(self._optimizer)
        self._remember()  # before the evaluation, in which the update overwrites the old arrays
        model, _, key = self._known
        state = None if update is None else update.state
        evaluate(loss, aux, grad_norm, skipped, extra, rate, [a for *_, a in model], state, self._state.window, key)
        # Other objects than those in the state, so that what is done to these in place does not change a result.
        grad_norm, rate = (None if array is None else array[...] for array in (grad_norm, rate))
        return StepResult(loss, tuple(aux), grad_norm, rate, update is not None, skipped, extra)

    # What a run continues from.

    def state_dict(self, *, everywhere: bool = True) -> dict[str, dict[str, mx.array]]:
        """Everything that an exact continuation needs, as dictionaries of arrays by ``tree_flatten``'s paths.

        ``"model"``: the trainable parameters, and the other arrays that the forward pass assigns; ``"optimizer"``:
        its state; ``"window"``: the sums of a partly filled window, empty otherwise; ``"random"``: MLX's ``key``.
        With other workers all must call this: the window is the sum of theirs, and state that is sharded is gathered.
        Without ``everywhere`` the first worker alone gets that, where the others have no use for it.
        """
        return self._state.whole(everywhere)

    def load_state_dict(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> None:
        """Continues from a `state_dict`: the model, the optimizer, the window and MLX's random state become its.

        With ``convert`` the optimizer's state may be one of MLX's own Adam or AdamW, or have moments that are stored in
        another way. What the state lacks (residuals, counters) starts at zero. Running statistics, and whatever else
        the forward pass assigns, get the dtype that they have in the state. If the state lacks them, because it is from
        before the first batch, they become what they were before the first batch.

        Raises:
            ValueError: with a table of everything that does not fit; nothing is changed then.
        """
        self._state.load(state, convert)

    def mismatches(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> list[Row]:
        """What of a `state_dict` does not fit here, as rows (path, here, in the state); empty if it can be loaded."""
        return self._state.mismatches(state, convert)

    def keeps(self, part: str, path: str) -> bool:
        """Whether this worker has a use for an array of a `state_dict`."""
        return part != "optimizer" or self._bound.shard is None or self._bound.shard.has(path)

    def description(self) -> dict[str, Any]:
        """What the updates depend on beside the state: options by name, as JSON can hold them."""
        own: dict[str, Any] = {"accumulate": self.accumulate, "weighted": self.weighted}
        reduce_dtype = self._settings.reduce_dtype
        own |= {"reduce_dtype": reduce_dtype} if reduce_dtype != "float32" else {}
        return own | any_optimizer.description(self._optimizer)

    # What the graphs are bound to.

    def _bind(self) -> None:
        bound = bind(self._model, self._loss_fn, self._optimizer, self._settings)
        for path, array in bound.running_statistics().items():
            self._state.buffers.setdefault(path, array)
        earlier = Counter(self.traces) if hasattr(self, "_bound") else self._earlier
        vars(self).update(_earlier=earlier, _bound=bound)  # at once: an interrupt must not count traces twice
        self._remember()

    def _current(self) -> Bound:
        """Follows a model or an optimizer state whose containers were replaced; refuses other parameters."""
        bound = self._bound
        if bound.intact():
            return bound
        check_parameters(self._model, bound)
        if self._state.filled and not bound.structure.intact():
            raise InputError(
                f"layers of the model were replaced after {self._state.filled} of {self.accumulate} micro-batches,"
                " whose gradients belong to the old ones; call flush() before you replace layers"
            )
        self._bind()
        return self._bound

    def _remember(self) -> None:
        """Keeps the arrays that are there now, for `take_out_placeholders`; the old ones are not kept any more.

        They take no memory of their own, except those that somebody replaces, until the next step.
        """
        places = self._bound.arrays.places
        model: list[Place] = [(container, key, container[key]) for container, key in places]
        self._known = model, self._bound.trees.places(), random_state.get()


make_step = TrainStep
