"""``make_step``: a compiled train step, made of a gradient graph per batch signature and one update graph.

The gradient graph depends on the batch's shapes, the update never does. They are separate compiled functions,
joined lazily and evaluated together: a new sequence length traces the forward and backward pass only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from . import any_optimizer, random_state, reduce, shard, window, workers
from . import batch as batches
from .compare import Row, differences, table
from .errors import InputError
from .gradient import GradientGraphs
from .layout import Places, Structure, along, trainable_places
from .optimizers import Adam
from .packing import PackedTrees
from .trees import Trees


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


class TrainStep:
    """A compiled train step: ``step(*batch)`` computes the loss and its gradient and updates the model in place.

    With ``accumulate=N`` every N-th call updates, with the mean gradient ``sum_i w_i g_i / sum_i w_i`` of the N
    micro-batches (summed in float32), where ``w_i`` is 1, or with ``weighted=True`` what loss_fn returns second.

    loss_fn is traced: its Python runs when a batch has a new signature, not at every call. So a trace holds what
    Python it met: other arrays than the model's and the batch's (a second model in a closure), attributes such as a
    dropout rate, activation functions; a schedule must be a pure function of the step. Pass what changes in the batch;
    the modules' ``training`` flags are followed.

    Args:
        model: the module to train: its trainable parameters are updated, and arrays that the forward pass assigns
            (such as running statistics) are kept. The random state (dropout) advances as it does without a step.
        loss_fn: ``loss_fn(model, *args, **kwargs)`` returns the loss, a 0-d float array, or a tuple that begins
            with it.
        optimizer: any ``mlx.optimizers`` optimizer. Default ``Adam(1e-3)``.
        accumulate: micro-batches per update, at least 1. Default 1.
        weighted: whether the second item of loss_fn's tuple is the weight of the batch, a 0-d array of at least 0,
            usually its number of tokens. The loss is then a mean over that many. In a window, a batch of weight 0
            counts for nothing, whatever its loss; a window of such batches has the gradient 0. Default False.
        max_traces: how many gradient traces are kept. A trace belongs to a batch signature (structure, shapes,
            dtypes, Python constants) and the modules' ``training`` flags; the least recently used goes first.
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
        TypeError, ValueError: here for an unusable argument, a model without trainable parameters, or workers with
            other parameters, options or package versions (raised by all, naming the rank); at a call for a loss that
            is no scalar, or if parameters were frozen, unfrozen or added since. If anything in a call raises, model,
            optimizer, window and random state are as before it; as after it, if Ctrl-C comes when they are assigned.

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
        self._shard: shard.Shard | None = None
        self._sharded = shard_state and self._group is not None
        self.vote = 0.0
        self.traces = {"grad": 0, "accumulate": 0, "update": 0, "evicted": 0}
        self._window, self._filled = cast("window.Window | None", None), 0  # None while it is empty
        # Arrays that are no parameters, but that the forward pass assigns: by path, what each was before that.
        self._assigned: dict[str, mx.array] = {}
        if self._sharded:
            shard.check(self._optimizer)
        if self._group is not None:
            workers.check_alike(self._group, {"shard_state": shard_state})  # first: it decides what is communicated
            shard.complete(self._optimizer, self._group, model.parameters())
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
        with random_state.kept_on_error():
            self._rebind_if_changed()
            batch, signature = batches.flatten(args, kwargs)
            # First everything is built, lazily; then everything is assigned; nothing raises in between.
            loss, aux, assigned, gradients, weight = self._gradients(signature, batch)
            sums, filled, update, total_loss = None, 0, None, loss
            before = self._arrays.exchange(assigned)
            try:
                if self._accumulate > 1:
                    sums = self._add(self._window or window.empty(self._parameters.read()), gradients, weight, loss)
                    filled = self._filled + 1
                    gradients, weight, total_loss = sums
                if filled in (0, self._accumulate):
                    update = self._apply(gradients, weight, total_loss)
                    sums, filled = None, 0
            except BaseException:
                self._arrays.exchange(before)
                raise
            del gradients, before, assigned  # the graph alone must hold them, or their memory cannot be reused
        # Past this an update is made, and what is interrupted must not put an old random state beside it.
        self._window, self._filled = sums, filled
        return self._finish(loss, aux, update)

    def flush(self) -> StepResult | None:
        """Applies a window that is only partly filled, as the mean over what it has; None if it is empty."""
        if not self._filled or self._window is None:
            return None
        with random_state.kept_on_error():
            self._rebind_if_changed()
            gradients, weight, loss = self._window
            update = self._apply(gradients, weight, loss)
            del gradients
        self._window, self._filled = None, 0
        weight, loss, *_ = update.sums or (weight, loss)
        return self._finish(loss / weight, (), update)

    def _finish(self, loss: mx.array, aux: Any, update: _Update | None) -> StepResult:
        """Assigns what an update has made, and starts the evaluation of everything that changed, all at once."""
        if update is not None:
            try:
                self._trees.write(update.parameters, update.state)
            except BaseException:  # Ctrl-C: half of an update would be none, and not what was before
                self._trees.write(update.parameters, update.state)
                raise
        grad_norm = None if update is None else update.grad_norm
        skipped = sum((state["skipped"] for state in self._state_roots if "skipped" in state), mx.array(0))
        state = self._arrays.read(), self._trees.state(), self._window, random_state.get()
        votes = update.sums[2] if update is not None and update.sums else None
        mx.async_eval(loss, aux, grad_norm, skipped, votes, state)
        rate = any_optimizer.learning_rate(self._optimizer)
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
        if self._shard is not None and self._group is not None:
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
        everything = self._everything()
        paths = (*self._parameters.paths, *sorted(self._assigned.keys() & everything.keys()))
        optimizer = any_optimizer.flat_state(self._optimizer)
        mx.async_eval(optimizer)  # what `init` has just made: another thread, which may save it, could not
        sums = window.to_dict(self._window, self._parameters.paths, self._filled) if self._window is not None else {}
        return {
            "model": {path: everything[path] for path in paths},
            "optimizer": optimizer,
            "window": sums,
            "random": {"key": random_state.get()},
        }

    def load_state_dict(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> None:
        """Continues from a `state_dict`: the model, the optimizer, the window and MLX's random state become its.

        With ``convert`` the optimizer's state may be one of stock MLX's Adam or AdamW, or have moments that are stored
        in another way; what it lacks (residuals, counters) starts at zero. Running statistics and whatever else the
        forward pass assigns get the dtype that they have there; what is not there, because no batch had been seen,
        becomes what it was before the first batch.

        Raises:
            ValueError: with a table of everything that does not fit; nothing is changed then.
        """
        if rows := self.mismatches(state, convert=convert):
            raise InputError("the state does not fit:\n" + table(("what", "here", "state"), rows))
        filled = cast(int, state["window"]["batches"].item()) if state["window"] else 0
        if filled >= self._accumulate:
            raise InputError(
                f"the state has a window of {filled} micro-batches, but accumulate is {self._accumulate};"
                f" make the step with accumulate={filled + 1} or more"
            )
        if convert:
            parameters = self._parameters.read()
            tree = tree_map(lambda index: parameters[index], self._template)
            any_optimizer.convert_state(self._optimizer, self._own(state["optimizer"]), lambda: self._init(tree))
            self._rebind_if_changed()
        else:
            Places(leaves := Structure(self._optimizer.state).leaves).write([state["optimizer"][p] for p, *_ in leaves])
        everything = self._everything()
        for path in state["model"].keys() - set(self._parameters.paths):
            self._assigned.setdefault(path, everything[path])
        # What the forward pass assigns is not in a state from before it did: then it becomes what it was.
        known = {**self._assigned, **state["model"]}
        self._arrays.write([known.get(path, array) for path, array in everything.items()])
        self._window, self._filled = None, filled
        if filled and self._group is not None and self._group.rank() > 0:
            self._window = window.empty(self._parameters.read())  # the first worker has the sum
        elif filled:
            self._window = window.from_dict(state["window"], self._parameters.paths)
        random_state.assign(state["random"]["key"])

    def mismatches(self, state: dict[str, dict[str, mx.array]], *, convert: bool = False) -> list[Row]:
        """What of a `state_dict` does not fit here, as rows (path, here, in the state); empty if it can be loaded."""
        self._rebind_if_changed()
        everything = self._everything()
        # The forward pass may give what it assigns another dtype, and assigns what a state from before lacks.
        buffers = (everything.keys() & state["model"].keys()) - set(self._parameters.paths)
        fitting = {path for path in buffers if state["model"][path].shape == everything[path].shape}
        wanted = {*self._parameters.paths, *buffers} - fitting
        its_model = {path: array for path, array in state["model"].items() if path not in fitting}
        rows = differences({path: everything[path] for path in wanted}, its_model)
        if state["window"]:
            own = window.to_dict(window.empty(self._parameters.read()), self._parameters.paths, 1)
            rows += differences(own, state["window"])
        own, its = any_optimizer.flat_state(self._optimizer), self._own(state["optimizer"])
        if convert:
            return rows + any_optimizer.inconvertible(own, its)
        return rows + differences(own, its)

    def _everything(self) -> dict[str, mx.array]:
        """Every array of the model by its path."""
        paths = self._arrays.paths
        everything = dict(zip(paths, self._arrays.read(), strict=True))
        if len(everything) < len(paths):
            twice = next(path for path, count in Counter(paths).items() if count > 1)
            raise InputError(
                f"the model has two arrays whose path is {twice!r}, which no state can tell apart; rename one"
            )
        return everything

    def keeps(self, part: str, path: str) -> bool:
        """Whether this worker has a use for an array of a `state_dict`."""
        return part != "optimizer" or self._shard is None or self._shard.has(path)

    def _own(self, state: dict[str, mx.array]) -> dict[str, mx.array]:
        """Of the optimizer's state in a `state_dict` what this worker has."""
        return state if self._shard is None else self._shard.own(state)

    def description(self) -> dict[str, Any]:
        """What the updates depend on beside the state: options by name, as JSON can hold them."""
        own: dict[str, Any] = {"accumulate": self._accumulate, "weighted": self._weighted}
        own |= {"reduce_dtype": self._reduce_dtype} if self._reduce_dtype != "float32" else {}
        return own | any_optimizer.description(self._optimizer)

    def _trace_add(self, *arguments: Any) -> window.Window:
        self.traces["accumulate"] += 1
        return window.add(*arguments)

    # The update, one compiled function.

    def _apply(self, gradients: list[mx.array], weight: mx.array, loss: mx.array) -> _Update:
        scalars = [weight] if self._group is None else [weight, loss, mx.array(self.vote)]
        parameters, state = self._trees.read()
        constants = any_optimizer.constants(self._optimizer)
        return _Update(*self._update(parameters, gradients, scalars, state, constants))

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
        if self._group is not None:
            own = None
            if self._accumulate == 1:
                own, loss, vote = scalars
                scalars = [mx.maximum(own, 0.0), window.weighted(loss, own), vote]
            own = own if self._weighted else None  # all are 1
            dtypes = [reduce.DTYPES[self._reduce_dtype] or dtype for dtype in self._dtypes]
            gradients, *sums, last = reduce.mean_over_workers(gradients, scalars, self._group, dtypes, own)
            gradients = [g.astype(dtype) for g, dtype in zip(gradients, self._dtypes, strict=True)]
        elif self._accumulate > 1:
            gradients = window.mean(gradients, scalars[0], self._dtypes)
        return *self._trees.update(gradients, parameters, state, last), sums

    # What the graphs are bound to.

    def _bind(self) -> None:
        """Finds every array of the model and of the optimizer's state; makes new compiled functions for them."""
        trainable = self._model.trainable_parameters()
        structure = Structure(self._model)
        places, template = trainable_places(self._model)
        seen = {(id(container), key) for _, container, key in places}
        others = [leaf for leaf in structure.leaves if (id(leaf[1]), leaf[2]) not in seen]
        parameters = [container[key] for _, container, key in places]
        if self._sharded and self._group is not None:
            paths, sizes = [path for path, *_ in places], [p.size for p in parameters]
            self._shard = shard.Shard(template, paths, sizes, [p.dtype for p in parameters], self._group)
        # State exists before the first trace, or that trace would hold for the first step only.
        self._init(tree_map(lambda i: parameters[i], template))

        self._structure = structure
        self._parameters = Places(places)
        self._arrays = Places([*places, *others])  # the parameters come first
        self._paths = {path for path, _, _ in along(trainable, trainable)}
        self._template = template
        self._dtypes = [array.dtype for array in self._parameters.read()]
        self._state_roots = any_optimizer.states(self._optimizer)
        self._trees: Trees | PackedTrees
        # Not with other workers: sharded or not, they sum the same norm and use the same kernels, to the last bit.
        if isinstance(self._optimizer, Adam) and not self._optimizer.has_own_update and self._group is None:
            self._trees = PackedTrees(self._optimizer, self._parameters)
        else:
            self._trees = Trees(self._optimizer, self._parameters, template, self._shard)
        self._gradients = GradientGraphs(
            self._model,
            self._loss_fn,
            self._weighted,
            self._max_traces,
            self._structure,
            self._arrays,
            len(places),
            self.traces,
            self._assigned,
        )
        self._add = mx.compile(self._trace_add)
        self._update = random_state.compiled(self._trace_update)

    def _init(self, parameters: Any) -> None:
        """Creates what the optimizer's state lacks."""
        if self._shard is None:
            self._optimizer.init(parameters)
        else:
            self._shard.init(self._optimizer, parameters)

    def _rebind_if_changed(self) -> None:
        """Follows a model or an optimizer state whose containers were replaced; refuses other parameters."""
        if self._structure.intact() and self._trees.intact():
            return
        trainable = self._model.trainable_parameters()
        before = self._paths
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
        if self._filled and not self._structure.intact():
            raise InputError(
                f"layers of the model were replaced after {self._filled} of {self._accumulate} micro-batches, whose"
                " gradients belong to the old ones; call flush() before you replace layers"
            )
        self._bind()


make_step = TrainStep
