"""``make_step``: a compiled train step, made of a gradient graph per batch signature and one update graph.

The gradient graph depends on the batch's shapes, the update never does. They are separate compiled functions,
joined lazily and evaluated together: a new sequence length traces the forward and backward pass only.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import (
    Assignments,
    Compiled,
    InputError,
    Places,
    Row,
    Structure,
    along,
    call_all,
    differences,
    is_evaluated,
    random_state,
    table,
    trainable_places,
    undone_on_error,
)
from ..distributed import reduce, shard, workers
from ..optimizers import Adam, ForSteps, any_optimizer, check_schedules
from ..update import LARGE, window
from . import signature as batches
from .apply import Trees
from .apply_packed import PackedTrees
from .gradient import GradientGraphs


class StepResult(NamedTuple):
    """What one call of a `TrainStep` gives. Arrays are lazy: reading one waits for the step."""

    loss: mx.array  # 0-d, of this batch before the update; from `flush` the mean over the window
    aux: tuple[Any, ...]  # what loss_fn returned after the loss
    grad_norm: mx.array | None  # 0-d float32, global norm of the (mean) gradient; None where nothing was updated
    learning_rate: mx.array | None  # 0-d, of the last update; None for an optimizer that has none
    updated: bool  # whether this call applied an update
    skipped: mx.array  # 0-d, how many updates were skipped so far
    votes: mx.array | None = None  # 0-d, sum of the workers' `vote`; None without other workers or an update


class _Update(NamedTuple):
    """What an update makes."""

    parameters: list[mx.array]
    state: Any
    grad_norm: mx.array
    sums: list[mx.array]  # with other workers: of weights, of weighted losses, of votes


class _Bound(NamedTuple):
    """Where a step found the arrays of its model and of its optimizer, and the graphs that it has made for them."""

    structure: Structure
    parameters: Places
    arrays: Places  # all of the model; the parameters come first
    paths: set[str]  # of the trainable parameters, tied ones under each of their paths
    template: Any  # the tree of the parameters' indices
    dtypes: list[mx.Dtype]
    shard: shard.Shard | None
    trees: Trees | PackedTrees
    gradients: GradientGraphs
    add: Compiled
    update: Compiled


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
    of each graph ran, which is once a trace, or at every call where nothing is compiled. ``vote`` is a number that is
    summed over the workers with the next update, for `StepResult.votes`.

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
        loss_fn: Callable[..., Any],
        optimizer: optim.Optimizer | None = None,
        *,
        accumulate: int = 1,
        weighted: bool = False,
        max_traces: int = 64,
        group: mx.distributed.Group | None = None,
        reduce_dtype: str = "float32",
        shard_state: bool = False,
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
                raise InputError(f"{name} is {value!r}; it must be an integer of at least 1")
        if not isinstance(shard_state, bool):
            raise InputError(f"shard_state is {shard_state!r}; it must be True or False")
        if reduce_dtype not in reduce.DTYPES:
            raise InputError(f"reduce_dtype is {reduce_dtype!r}; it must be one of {', '.join(reduce.DTYPES)}")
        self._model = model
        self._loss_fn = loss_fn
        self._optimizer: optim.Optimizer = Adam(1e-3) if optimizer is None else optimizer
        self._accumulate = accumulate
        self._weighted = weighted
        self._max_traces = max_traces
        self._group = group if group is not None and group.size() > 1 else None
        self._reduce_dtype = reduce_dtype
        self._sharded = shard_state and self._group is not None
        self.vote = 0.0
        self.traces = {"grad": 0, "accumulate": 0, "update": 0, "evicted": 0}
        self._window: window.Window | None = None  # while it is empty
        self._filled = 0
        # Arrays that are no parameters, but that the forward pass assigns: by path, what each was before that.
        self._assigned: dict[str, mx.array] = {}
        if self._sharded:
            shard.check(self._optimizer)
        if self._group is not None:
            workers.check_alike(self._group, {"shard_state": shard_state})  # first: it decides what is communicated
            shard.complete(self._optimizer, self._group, model.parameters())
        for part in any_optimizer.parts(self._optimizer):
            check_schedules(part._schedulers)
        self._bind()
        if self._group is not None:
            workers.check_model(self._group, model, self.description())

    # Read-only, because traces contain them.
    model = property(lambda self: self._model)
    loss_fn = property(lambda self: self._loss_fn)
    optimizer = property(lambda self: self._optimizer)
    accumulate = property(lambda self: self._accumulate)
    weighted = property(lambda self: self._weighted)
    group = property(lambda self: self._group)  # None for one of size 1, too

    def __call__(self, *args: Any, **kwargs: Any) -> StepResult:
        """One (micro-)batch: ``loss_fn(model, *args, **kwargs)``, its gradient and, at a window's end, the update."""
        batch, signature = batches.flatten(args, kwargs)
        try:
            _evaluate(batch)
            self._rebind_if_changed()
            return self._all_or_nothing(partial(self._micro_batch, signature, batch))
        except _Traced:
            self._take_out_placeholders()
            raise

    def flush(self) -> StepResult | None:
        """Applies a window that is only partly filled, as the mean over what it has; None if it is empty."""
        if not self._filled or self._window is None:
            return None
        self._rebind_if_changed()
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
        made = self._bound.gradients(signature, batch)
        # If the batch, the forward or the backward pass cannot be evaluated, this raises while nothing is assigned.
        _evaluate(*made, random_state.get())
        loss, aux, assigned, gradients, weight = made
        sums, filled, update, total_loss = None, 0, None, loss
        if self._accumulate > 1:
            sums = self._add(gradients, weight, loss)
            filled = self._filled + 1
            gradients, weight, total_loss = sums
        if filled in (0, self._accumulate):
            update = self._apply(gradients, weight, total_loss, assigned)
            sums, filled = None, 0
        if mx.default_device().type == mx.DeviceType.cpu:
            mx.eval(*made)  # what fails on another thread, such as the inverse of a singular matrix, raises only now
        del made, gradients  # the graph alone must hold them, or their memory cannot be reused
        self._assign(assigned, update, sums, filled, assignments)
        return self._result(loss, aux, update)

    def _take_out_placeholders(self) -> None:
        """Puts back the arrays in whose place ``mx.compile`` has put others to trace a function that calls this step.

        It does not do so itself after an error, and they cannot be evaluated: the model would be lost.
        """
        arrays, state, key = self._known
        assignments = Assignments()
        model = [(*place, array) for place, array in zip(self._bound.arrays.places, arrays, strict=True)]
        for container, index, array in (*model, *state):
            if not is_evaluated(container[index]):
                assignments.add(container, index, array)
        assignments.make()
        if not is_evaluated(random_state.get()):
            random_state.assign(key)

    def _rest_of_window(self, assignments: Assignments) -> StepResult:
        assert self._window is not None
        gradients, weight, loss = self._window
        update = self._apply(gradients, weight, loss, {})
        del gradients
        self._assign({}, update, None, 0, assignments)
        weight, loss, *_ = update.sums or (weight, loss)
        return self._result(loss / weight, [], update)

    def _assign(
        self,
        assigned: dict[int, mx.array],
        update: _Update | None,
        sums: window.Window | None,
        filled: int,
        assignments: Assignments,
    ) -> None:
        """Assigns what the forward pass and the update have made, and the window, all at once."""
        bound = self._bound
        for index, array in assigned.items():
            if update is None or index >= len(bound.parameters):
                assignments.add(*bound.arrays.places[index], array)
        if update is not None:
            bound.trees.assign(update.parameters, update.state, assignments)
        assignments.attribute(self, "_window", sums)
        assignments.attribute(self, "_filled", filled)
        assignments.make()

    def _result(self, loss: mx.array, aux: list[Any], update: _Update | None) -> StepResult:
        """Starts the evaluation of everything that has changed."""
        grad_norm = None if update is None else update.grad_norm
        skipped = sum(any_optimizer.skipped(self._optimizer), mx.array(0))
        votes = update.sums[2] if update is not None and update.sums else None
        rate = any_optimizer.learning_rate(self._optimizer)
        self._remember()  # before the evaluation, in which the update overwrites the old arrays
        model, _, key = self._known
        state = None if update is None else update.state
        _evaluate(loss, aux, grad_norm, skipped, votes, rate, model, state, self._window, key)
        # Other objects than those in the state, so that what is done to these in place does not change a result.
        grad_norm, rate = (None if array is None else array[...] for array in (grad_norm, rate))
        return StepResult(loss, tuple(aux), grad_norm, rate, update is not None, skipped, votes)

    # What a run continues from.

    def state_dict(self, *, everywhere: bool = True) -> dict[str, dict[str, mx.array]]:
        """Everything that an exact continuation needs, as dictionaries of arrays by ``tree_flatten``'s paths.

        ``"model"``: the trainable parameters, and the other arrays that the forward pass assigns; ``"optimizer"``:
        its state; ``"window"``: the sums of a partly filled window, empty otherwise; ``"random"``: MLX's ``key``.
        With other workers all must call this: the window is the sum of theirs, and state that is sharded is gathered.
        Without ``everywhere`` the first worker alone gets that, where the others have no use for it.
        """
        state = self.own_state()
        if self._bound.shard is not None and self._group is not None:
            every = everywhere or self._group.rank() == 0
            own = {"optimizer": state["optimizer"]}
            state |= workers.share(self._group, own, lambda part, path: every or self.keeps(part, path))
        if self._group is not None and state["window"]:
            summed = reduce.sum_arrays([a.astype(mx.float32) for a in state["window"].values()], self._group)
            state["window"] = dict(zip(state["window"], summed, strict=True)) | {"batches": mx.array(self._filled)}
        return state

    def own_state(self) -> dict[str, dict[str, mx.array]]:
        """The `state_dict` whose window, and sharded state, is this worker's alone."""
        self._rebind_if_changed()
        self._bound.trees.settle()
        bound = self._bound
        everything = self._everything()
        paths = (*bound.parameters.paths, *sorted(self._assigned.keys() & everything.keys()))
        sums = window.to_dict(self._window, bound.parameters.paths, self._filled) if self._window is not None else {}
        state = {
            "model": {path: everything[path] for path in paths},
            "optimizer": any_optimizer.flat_state(self._optimizer),
            "window": sums,
            "random": {"key": random_state.get()},
        }
        # Other objects than those in the trees, which may be edited in place.
        return {part: {path: array[...] for path, array in arrays.items()} for part, arrays in state.items()}

    def load_state_dict(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> None:
        """Continues from a `state_dict`: the model, the optimizer, the window and MLX's random state become its.

        With ``convert`` the optimizer's state may be one of MLX's own Adam or AdamW, or have moments that are stored in
        another way. What the state lacks (residuals, counters) starts at zero. Running statistics, and whatever else
        the forward pass assigns, get the dtype that they have in the state. If the state lacks them, because it is from
        before the first batch, they become what they were before the first batch.

        Raises:
            ValueError: with a table of everything that does not fit; nothing is changed then.
        """
        if rows := self.mismatches(state, convert=convert):
            raise InputError("the state does not fit:\n" + table(("what", "here", "state"), rows))
        filled = cast(int, state["window"]["batches"].item()) if state["window"] else 0
        if filled >= self._accumulate:
            raise InputError(
                f"the state has a window of {filled} micro-batches, but accumulate is {self._accumulate};"
                f" make it {filled + 1} or more (accumulate=..., --grad-accumulation-steps)"
            )
        mx.eval(state)  # what cannot be read raises here
        assignments = Assignments()
        parameters = self._bound.parameters.read()
        if convert:
            tree = tree_map(lambda index: parameters[index], self._bound.template)
            init = partial(self._init, tree, self._bound.shard)
            any_optimizer.convert_state(self._optimizer, self._own(state["optimizer"]), init)
            self._rebind_if_changed()
        else:
            for path, container, key in Structure(self._optimizer.state).leaves:
                assignments.add(container, key, state["optimizer"][path][...])
        paths = self._bound.parameters.paths
        everything = self._everything()
        for path in state["model"].keys() - set(paths) - self._assigned.keys():
            assignments.add(self._assigned, path, everything[path])
        # What the forward pass assigns is not in a state from before it did: then it becomes what it was.
        model = {**self._assigned, **state["model"]}
        for path, place in zip(everything, self._bound.arrays.places, strict=True):
            if path in model:
                assignments.add(*place, model[path][...])
        sums = None
        if filled and self._group is not None and self._group.rank() > 0:
            sums = window.empty(parameters)  # the first worker has the sum
            mx.eval(sums)
        elif filled:
            sums = window.from_dict(state["window"], paths)
        assignments.attribute(self, "_window", sums)
        assignments.attribute(self, "_filled", filled)
        self._bound.trees.forget()
        call_all([assignments.ready(), random_state.assignment(state["random"]["key"])])

    def mismatches(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> list[Row]:
        """What of a `state_dict` does not fit here, as rows (path, here, in the state); empty if it can be loaded."""
        self._rebind_if_changed()
        everything = self._everything()
        # The forward pass may give what it assigns another dtype, and assigns what a state from before lacks.
        bound = self._bound
        buffers = (everything.keys() & state["model"].keys()) - set(bound.parameters.paths)
        fitting = {path for path in buffers if state["model"][path].shape == everything[path].shape}
        wanted = {*bound.parameters.paths, *buffers} - fitting
        its_model = {path: array for path, array in state["model"].items() if path not in fitting}
        rows = differences({path: everything[path] for path in wanted}, its_model)
        if state["window"]:
            own = window.to_dict(window.empty(bound.parameters.read()), bound.parameters.paths, 1)
            rows += differences(own, state["window"])
        own, its = any_optimizer.flat_state(self._optimizer), self._own(state["optimizer"])
        if convert:
            return rows + any_optimizer.inconvertible(own, its)
        return rows + differences(own, its)

    def _everything(self) -> dict[str, mx.array]:
        """Every array of the model by its path."""
        paths = self._bound.arrays.paths
        everything = dict(zip(paths, self._bound.arrays.read(), strict=True))
        if len(everything) < len(paths):
            twice = next(path for path, count in Counter(paths).items() if count > 1)
            raise InputError(
                f"the model has two arrays whose path is {twice!r}, which no state can tell apart; rename one of them"
            )
        return everything

    def keeps(self, part: str, path: str) -> bool:
        """Whether this worker has a use for an array of a `state_dict`."""
        return part != "optimizer" or self._bound.shard is None or self._bound.shard.has(path)

    def _own(self, state: dict[str, mx.array]) -> dict[str, mx.array]:
        """Of the optimizer's state in a `state_dict` what this worker has."""
        return state if self._bound.shard is None else self._bound.shard.own(state)

    def description(self) -> dict[str, Any]:
        """What the updates depend on beside the state: options by name, as JSON can hold them."""
        own: dict[str, Any] = {"accumulate": self._accumulate, "weighted": self._weighted}
        own |= {"reduce_dtype": self._reduce_dtype} if self._reduce_dtype != "float32" else {}
        return own | any_optimizer.description(self._optimizer)

    # The window and the update, compiled functions.

    def _add(self, gradients: list[mx.array], weight: mx.array, loss: mx.array) -> window.Window:
        before = self.traces["accumulate"]
        empty = window.empty(self._bound.parameters.read()) if self._window is None else self._window
        sums = self._bound.add(empty, gradients, weight, loss)
        if self.traces["accumulate"] > before:
            _try_kernels([("sum", array) for array in sums[0]])
        return sums

    def _trace_add(self, *arguments: Any) -> window.Window:
        self.traces["accumulate"] += 1
        return window.add(*arguments)

    def _apply(
        self, gradients: list[mx.array], weight: mx.array, loss: mx.array, assigned: dict[int, mx.array]
    ) -> _Update:
        scalars = [weight] if self._group is None else [weight, loss, mx.array(self.vote)]
        trees, before = self._bound.trees, self.traces["update"]
        parameters, state = trees.read(assigned)
        constants = any_optimizer.constants(self._optimizer)
        update = _Update(*self._bound.update(parameters, gradients, scalars, state, constants))
        if self.traces["update"] > before:
            _try_kernels(trees.named(update.parameters, update.state))
        return update

    def _trace_update(
        self,
        parameters: list[mx.array],
        gradients: list[mx.array],
        scalars: list[mx.array],
        state: Any,
        settings: list[Any],
    ) -> tuple[list[mx.array], Any, mx.array, list[mx.array]]:
        # `settings` are not read, the optimizer reads its own: they make a trace hold for these values only.
        self.traces["update"] += 1
        sums: list[mx.array] = []
        last = None  # communication
        weight = None  # of gradients that are not weighted yet
        dtypes = self._bound.dtypes
        if self._group is not None:
            own = None
            if self._accumulate == 1:
                own, loss, vote = scalars
                scalars = [mx.maximum(own, 0.0), window.weighted(loss, own), vote]
            own = own if self._weighted else None  # all are 1
            sent = [reduce.DTYPES[self._reduce_dtype] or dtype for dtype in dtypes]
            gradients, *sums, last = reduce.mean_over_workers(gradients, scalars, self._group, sent, own)
            gradients = [g.astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        elif self._accumulate > 1:
            gradients = window.mean(gradients, scalars[0], dtypes)
        elif self._weighted:
            weight = scalars[0]
        return *self._bound.trees.update(gradients, parameters, state, last, weight), sums

    # What the graphs are bound to.

    def _bind(self) -> None:
        """Finds every array of the model and of the optimizer's state; makes new compiled functions for them."""
        trainable = self._model.trainable_parameters()
        structure = Structure(self._model)
        found, template = trainable_places(self._model)
        seen = {(id(container), key) for _, container, key in found}
        others = [leaf for leaf in structure.leaves if (id(leaf[1]), leaf[2]) not in seen]
        parameters, arrays = Places(found), Places([*found, *others])
        weights = parameters.read()
        dtypes = [weight.dtype for weight in weights]
        part = None
        if self._group is not None and mx.complex64 in dtypes:
            path = parameters.paths[dtypes.index(mx.complex64)]
            raise InputError(f"{path!r} is complex64, which several workers cannot train together; freeze it")
        if self._sharded and self._group is not None:
            sizes = [weight.size for weight in weights]
            part = shard.Shard(template, list(parameters.paths), sizes, dtypes, self._group)
        # State exists before the first trace, or that trace would hold for the first step only. Nothing stays lazy, for
        # the first step may be another thread's, which could not evaluate it.
        tree = tree_map(lambda i: weights[i], template)
        if reshaped := any_optimizer.begin_anew(self._optimizer, tree):
            warnings.warn(f"the moments of {', '.join(reshaped)} had another shape; they begin anew", stacklevel=4)
        self._init(tree, part)
        mx.eval(arrays.read(), any_optimizer.states(self._optimizer))
        for path, (container, key) in zip(arrays.paths, arrays.places, strict=True):
            # Those of a model that was trained before belong to a checkpoint from before the first step, too.
            if isinstance(container, nn.BatchNorm) and key in ("running_mean", "running_var"):
                self._assigned.setdefault(path, container[key])
        trees: Trees | PackedTrees
        # Not with other workers: sharded or not, they sum the same norm and use the same kernels, to the last bit.
        if isinstance(self._optimizer, Adam) and not ForSteps(self._optimizer).has_own_update and self._group is None:
            trees = PackedTrees(self._optimizer, parameters, template)
        else:
            trees = Trees(self._model, self._optimizer, parameters, template, part)
        gradients = GradientGraphs(
            self._model,
            self._loss_fn,
            self._weighted,
            self._max_traces,
            structure,
            arrays,
            len(found),
            self.traces,
            self._assigned,
        )
        add = Compiled(self._trace_add, self._max_traces)
        update = Compiled(self._trace_update, self._max_traces, draws=True)
        paths = {path for path, _, _ in along(trainable, trainable)}
        graphs = gradients, add, update
        self._bound = _Bound(structure, parameters, arrays, paths, template, dtypes, part, trees, *graphs)
        self._remember()

    def _remember(self) -> None:
        """Keeps the arrays that are there now, for `_take_out_placeholders`; the old ones are not kept any more.

        They take no memory of their own, except those that somebody replaces, until the next step.
        """
        self._known = self._bound.arrays.read(), self._bound.trees.places(), random_state.get()

    def _init(self, parameters: Any, part: shard.Shard | None) -> None:
        """Creates what the optimizer's state lacks."""
        if part is None:
            self._optimizer.init(parameters)
        else:
            part.init(self._optimizer, parameters)

    def _rebind_if_changed(self) -> None:
        """Follows a model or an optimizer state whose containers were replaced; refuses other parameters."""
        structure = self._bound.structure
        if structure.intact() and self._bound.trees.intact():
            return
        trainable = self._model.trainable_parameters()
        before = self._bound.paths
        now = {path for path, *_ in along(trainable, trainable)}
        if before != now:
            changes = [
                f"{what}: {', '.join(sorted(paths))}"
                for what, paths in (("no longer trainable", before - now), ("newly trainable", now - before))
                if paths
            ]
            raise InputError(
                f"the model's parameters changed since make_step ({'; '.join(changes)});"
                " call make_step again, with the same optimizer to keep its moments"
            )
        if self._filled and not structure.intact():
            raise InputError(
                f"layers of the model were replaced after {self._filled} of {self._accumulate} micro-batches, whose"
                " gradients belong to the old ones; call flush() before you replace layers"
            )
        self._bind()


class _Traced(InputError):
    """A step cannot be a part of another transformation."""


def _evaluate(*trees: Any) -> None:
    """``mx.async_eval``; in another transformation, which would keep what the step assigns, an error that says so."""
    try:
        mx.async_eval(*trees)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        raise _Traced(
            "a train step was called inside mx.compile, or another transformation of MLX; call it outside, because it"
            " is compiled itself. The model is as it was after the last step"
        ) from error


def _try_kernels(arrays: list[tuple[str, mx.array]]) -> None:
    """Evaluates the smallest of each kind of array, so that a kernel that cannot be compiled raises.

    Later nothing could be undone: then the old arrays are not there any more, whose memory the new ones take.
    """
    smallest: dict[Hashable, mx.array] = {}
    for name, array in arrays:
        kind = name.rpartition(".")[2], array.dtype, array.ndim, array.size >= LARGE
        if kind not in smallest or array.size < smallest[kind].size:
            smallest[kind] = array
    _evaluate(list(smallest.values()))


make_step = TrainStep
