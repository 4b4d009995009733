"""``make_step``: a compiled train step, made of a gradient graph per batch signature and one update graph.

The gradient graph depends on the shapes of the batch. The update graph does not. They are separate compiled functions
whose lazy results are evaluated together. So a new sequence length needs a new trace (a recording of the Python code as
a graph) of the forward and backward pass only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..base import Assignments, InputError, Row, random_state, undone_on_error
from ..distributed import shard, workers
from ..optimizers import Adam, any_optimizer, check_schedules, of_any
from ..update import window
from . import signature as batches
from .bound import Bound, bind, check_parameters
from .guards import Traced, evaluate, take_out_placeholders
from .result import StepResult
from .settings import LossFunction, check_arguments, checked
from .state import StepState
from .update_graph import Update


class TrainStep:
    """A compiled train step: ``step(*batch)`` computes the loss and the gradient, and updates the model in place.

    With ``accumulate=N`` every N-th call makes an update. The N micro-batches between two updates are the window. The
    update uses their mean gradient ``sum_i w_i g_i / sum_i w_i``, summed in float32. The weight ``w_i`` is 1, or the
    second value that loss_fn returns if ``weighted=True``.

    MLX traces loss_fn: the Python code runs once for each new batch signature and records a graph, the trace. A trace
    keeps the Python values of that moment: arrays of other objects, attributes such as a dropout rate, activation
    functions. Pass changing values in the batch. Other models that loss_fn refers to when `make_step` is called (a
    discriminator, a teacher) are followed: the step uses their present arrays, and trains none of them. A change of a
    module's ``training`` flag makes the step use (or trace) another graph. A schedule must be a pure function of the
    step.

    Args:
        model: the module to train. The step updates the trainable parameters and keeps arrays that the forward pass
            assigns (such as running statistics). The random state (dropout) advances as it does without a step.
        loss_fn: ``loss_fn(model, *args, **kwargs)`` returns the loss (a 0-d float array), or a tuple that begins
            with the loss, or a dict that has the loss as ``"loss"``. Random numbers must come from ``mx.random``.
        optimizer: any ``mlx.optimizers`` optimizer, or an object with ``init(parameters)`` and
            ``apply_gradients(gradients, parameters)``, whose arrays are in its attributes. Default ``Adam(1e-3)``.
        accumulate: micro-batches per update, at least 1. Default 1.
        weighted: whether the second item of loss_fn's tuple is the weight of the batch: a 0-d array of at least 0,
            usually the number of tokens that the loss is a mean over. A batch of weight 0 adds nothing to the gradient,
            even if the loss is NaN. If all batches of an update have weight 0, the gradient is 0. Default False.
        max_traces: how many gradient traces are kept. A trace belongs to a batch signature (structure, shapes,
            dtypes, Python constants) and the modules' ``training`` flags. The least recently used trace is dropped
            first. Default 64.
        group: the ``mx.distributed`` workers that train the same model, each on a different part of every batch. All
            workers must make the same calls. Gradients are averaged over the workers once per update, before
            clipping and the ``skip_nonfinite`` check, with the weights of the batches. The returned loss is the loss of
            this worker. Default None: a single worker.
        reduce_dtype: the dtype of exchanged gradients: "float32" (default), "bfloat16", or "param" (the parameter's).
        shard_state: split the optimizer's state over the workers. Each worker keeps the state of some parameters (a
            shard), updates these parameters, and receives the others from the other workers. The results are
            bit-identical, because no parameter is split. A checkpoint has the whole state. Default False. No effect
            without other workers.

    A call returns a `StepResult`. ``flush()`` applies a partly filled window. ``traces`` counts how often the Python
    code of each graph ran: once per trace, or at every call if compiling is disabled. ``extra`` is a number that the
    next update sums over the workers; `StepResult.extra` is the sum.

    Raises:
        TypeError, ValueError: `make_step` raises them for an unusable argument, for a model without trainable
            parameters, and on all workers if one has other parameters, options or package versions (the message names
            the rank). A call raises them if the loss is no scalar, inside another ``mx.compile``, and if parameters
            were frozen, unfrozen or added since `make_step`.

    If a call raises, model, optimizer, window and random state are as they were before the call. Ctrl-C leaves them
    either all as before the call, or all as after the call. For this, everything except the update is evaluated before
    anything is assigned. The first update of a trace is tested on one parameter of each kind, which needs memory for a
    second copy of these parameters. A step cannot undo an update that runs out of memory.

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
            workers.check_alike(others, {"shard_state": shard_state})  # first: it decides which arrays are exchanged
            shard.complete(self._optimizer, others, model.parameters())
        for part in any_optimizer.parts(self._optimizer):
            check_schedules(any_optimizer.schedules(part))
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
        """The optimizer. Each update changes the state of this object."""
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
        """The workers that train together. None without other workers."""
        return self._settings.group

    @property
    def traces(self) -> dict[str, int]:
        """How often the Python code of each graph ran, and how many gradient traces were dropped ("evicted")."""
        gradients, graph = self._bound.gradients, self._bound.graph
        now = {"grad": gradients.made, "accumulate": graph.added, "update": graph.updated, "evicted": gradients.evicted}
        return {name: self._earlier[name] + count for name, count in now.items()}

    def __repr__(self) -> str:
        size = sum(array.size for array in self._bound.parameters.read())
        model, optimizer = f"{type(self._model).__name__} of {size:,} trainable parameters", of_any(self._optimizer)
        return f"TrainStep({model}, {optimizer}, accumulate={self.accumulate}, traces={self.traces})"

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """Computes ``loss_fn(model, *args, **kwargs)`` and the gradient. The last call of a window makes the update."""
        batch, signature = batches.flatten(args, kwargs)
        try:
            evaluate(batch)
            self._current()
            return self._all_or_nothing(partial(self._micro_batch, signature, batch))
        except Traced:
            places, arrays, state, key = self._known
            model = [(*place, array) for place, array in zip(places.places, arrays, strict=True)]
            take_out_placeholders([*model, *state], key)
            raise

    def flush(self) -> StepResult | None:
        """Makes an update from a partly filled window, with the mean over the present micro-batches. None if empty."""
        if not self._state.filled:
            return None
        self._current()
        return self._all_or_nothing(self._rest_of_window)

    def _all_or_nothing(self, work: Callable[[Assignments], StepResult]) -> StepResult:
        """Runs ``work``, which makes lazy arrays and then assigns all of them at once. An error changes nothing."""
        key = random_state.get()
        made: dict[str, bool] = {}
        assignments = Assignments()
        assignments.add(made, "all", True)

        def undo() -> None:
            if not made:  # nothing was assigned except the random state, which a compiled function assigns itself
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
            mx.eval(*made)  # errors of MLX's worker thread, such as the inverse of a singular matrix, raise only here
        del made, gradients  # MLX reuses the memory only if nothing but the graph refers to these arrays
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
        """Assigns the results of the forward pass and of the update, and the window, all at once."""
        bound = self._bound
        for index, array in assigned.items():
            container, key = bound.inputs.containers[index], bound.inputs.keys[index]
            if len(bound.parameters) <= index < len(bound.arrays):
                self._state.note_buffer(bound.arrays.paths[index], container[key], assignments)
            if update is None or index >= len(bound.parameters):
                assignments.add(container, key, array)
        if update is not None:
            bound.trees.assign(update.parameters, update.state, assignments)
        self._state.assign_window(sums, filled, assignments)
        assignments.make()

    def _result(self, loss: mx.array, aux: list[Any], update: Update | None) -> StepResult:
        """Starts the evaluation of every changed array and returns the result of the call."""
        grad_norm = None if update is None else update.grad_norm
        skipped = sum(any_optimizer.skipped(self._optimizer), mx.array(0))
        extra = update.sums[2] if update is not None and update.sums else None
        rate = any_optimizer.learning_rate(self._optimizer)
        self._remember()  # before the evaluation, because the update overwrites the memory of the old arrays
        state = None if update is None else update.state
        _, arrays, *_ = self._known
        changed = [arrays, state, self._state.window, random_state.get()]
        evaluate(loss, aux, grad_norm, skipped, extra, rate, changed)
        # New array objects, so that editing the arrays of the state in place does not change this result.
        grad_norm, rate = (None if array is None else array[...] for array in (grad_norm, rate))
        return StepResult(
            (loss, *aux),
            grad_norm=grad_norm,
            learning_rate=rate,
            updated=update is not None,
            skipped=skipped,
            extra=extra,
        )

    # Saving and continuing.

    def state_dict(self, *, everywhere: bool = True) -> dict[str, dict[str, mx.array]]:
        """Everything that an exact continuation needs, as dictionaries of arrays by ``tree_flatten``'s paths.

        ``"model"`` has the trainable parameters and the other arrays that the forward pass assigns. ``"optimizer"`` has
        the state of the optimizer. ``"window"`` has the sums of a partly filled window, or is empty. ``"random"`` has
        the ``key`` of MLX's random state. With several workers all must call this method: it sums their windows and
        gathers sharded state. With ``everywhere=False`` only the first worker gets the gathered state.
        """
        return self._state.whole(everywhere)

    def load_state_dict(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> None:
        """Continues from a `state_dict`: replaces the content of model, optimizer, window and MLX's random state.

        With ``convert`` the optimizer's state may come from MLX's own Adam or AdamW, or have moments stored in another
        way. Missing arrays (residuals, counters) then start at zero. Arrays that the forward pass assigns, such as
        running statistics, get the dtype that they have in ``state``. A state from before the first batch may lack
        them: they then get the values that they had before the first batch.

        Raises:
            ValueError: the state does not fit. The message has a table of all mismatches. Nothing is changed then.
        """
        self._state.load(state, convert)

    def mismatches(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> list[Row]:
        """The mismatches of a `state_dict`, as rows (path, here, in the state). An empty list: it can be loaded."""
        return self._state.mismatches(state, convert)

    def keeps(self, part: str, path: str) -> bool:
        """Whether this worker needs the array at ``path`` of a `state_dict`."""
        return part != "optimizer" or self._bound.shard is None or self._bound.shard.has(path)

    def description(self) -> dict[str, Any]:
        """The options that the updates depend on, by name. JSON can hold all values."""
        own: dict[str, Any] = {"accumulate": self.accumulate, "weighted": self.weighted}
        reduce_dtype = self._settings.reduce_dtype
        own |= {"reduce_dtype": reduce_dtype} if reduce_dtype != "float32" else {}
        return own | any_optimizer.description(self._optimizer)

    # The arrays of the model and of the optimizer.

    def _bind(self) -> None:
        bound = bind(self._model, self._loss_fn, self._optimizer, self._settings)
        for path, array in bound.running_statistics().items():
            self._state.buffers.setdefault(path, array)
        earlier = Counter(self.traces) if hasattr(self, "_bound") else self._earlier
        vars(self).update(_earlier=earlier, _bound=bound)  # in one call: an interrupt must not count traces twice
        self._remember()

    def _current(self) -> Bound:
        """Binds anew if a caller has replaced containers of model or state. Raises if the parameters changed."""
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
        """Keeps references to the present arrays, for `take_out_placeholders`, and drops the references to older ones.

        This takes extra memory only for arrays that a caller replaces, until the next step.
        """
        inputs = self._bound.inputs
        self._known = inputs, inputs.read(), self._bound.trees.places(), random_state.get()


make_step = TrainStep
