"""The state that a train step keeps between two calls, and its export and import as dictionaries of arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim

from ..base import Assignments, InputError, Row, Structure, call_all, differences, random_state, table
from ..distributed import reduce, workers
from ..optimizers import any_optimizer
from ..update import window
from .bound import Bound, init
from .settings import Settings

StateDict = dict[str, dict[str, mx.array]]  # parts: "model", "optimizer", "window" and "random"


class StepState:
    """The window (the sums of accumulated gradients), the number of micro-batches in it, and the initial ``buffers``.

    A buffer is an array that is no parameter, but that the forward pass assigns. ``buffers`` has the values from before
    the first step. ``current`` returns the present places of the arrays of model and optimizer.
    """

    def __init__(self, optimizer: optim.Optimizer, settings: Settings, current: Callable[[], Bound]) -> None:
        self._optimizer, self._settings, self._current = optimizer, settings, current
        self.window: window.Window | None = None  # None while the window is empty
        self.filled = 0
        self.buffers: dict[str, mx.array] = {}

    def note_buffer(self, path: str, array: mx.array, assignments: Assignments) -> None:
        """Adds to ``assignments`` that the value of a buffer before the first step is kept."""
        if path not in self.buffers:
            assignments.add(self.buffers, path, array)

    def assign_window(self, sums: window.Window | None, filled: int, assignments: Assignments) -> None:
        """Adds a new window to ``assignments``."""
        assignments.attribute(self, "window", sums)
        assignments.attribute(self, "filled", filled)

    def whole(self, everywhere: bool) -> StateDict:
        """The result of `TrainStep.state_dict`."""
        state, bound, group = self._own(), self._current(), self._settings.group
        if bound.shard is not None and group is not None:
            every, has = everywhere or group.rank() == 0, bound.shard.has
            own = {"optimizer": state["optimizer"]}
            state |= workers.share(group, own, lambda part, path: every or has(path))
        if group is not None and state["window"]:
            summed = reduce.sum_arrays([a.astype(mx.float32) for a in state["window"].values()], group)
            state["window"] = dict(zip(state["window"], summed, strict=True)) | {"batches": mx.array(self.filled)}
        return state

    def _own(self) -> StateDict:
        """The state of this worker alone: the window and the shard are not yet combined with the other workers'."""
        bound = self._current()
        bound.trees.settle()
        everything = _everything(bound)
        paths = (*bound.parameters.paths, *sorted(self.buffers.keys() & everything.keys()))
        sums = window.to_dict(self.window, bound.parameters.paths, self.filled) if self.window is not None else {}
        state = {
            "model": {path: everything[path] for path in paths},
            "optimizer": any_optimizer.flat_state(self._optimizer),
            "window": sums,
            "random": {"key": random_state.get()},
        }
        # New array objects, because callers may edit the arrays in the trees in place.
        return {part: {path: array[...] for path, array in arrays.items()} for part, arrays in state.items()}

    def load(self, state: StateDict, convert: bool) -> None:
        """Implements `TrainStep.load_state_dict`."""
        if rows := self.mismatches(state, convert):
            raise InputError("the state does not fit:\n" + table(("what", "here", "state"), rows))
        filled = cast(int, state["window"]["batches"].item()) if state["window"] else 0
        if filled >= self._settings.accumulate:
            raise InputError(
                f"the state has a window of {filled} micro-batches, but accumulate is {self._settings.accumulate};"
                f" make it {filled + 1} or more (accumulate=..., --grad-accumulation-steps)"
            )
        mx.eval(state)  # an array that cannot be read from the file raises here
        assignments = Assignments()
        self._load_optimizer(state["optimizer"], convert, assignments)
        bound = self._current()
        self._load_model(bound, state["model"], assignments)
        sums, group = None, self._settings.group
        if filled and group is not None and group.rank() > 0:
            sums = window.empty(bound.parameters.read())  # the first worker gets the sum of all workers
            mx.eval(sums)
        elif filled:
            sums = window.from_dict(state["window"], bound.parameters.paths)
        self.assign_window(sums, filled, assignments)
        call_all([assignments.ready(), random_state.assignment(state["random"]["key"])])

    def _load_optimizer(self, state: dict[str, mx.array], convert: bool, assignments: Assignments) -> None:
        bound = self._current()
        if convert and any_optimizer.is_mlxs(self._optimizer):
            parameters = bound.tree(bound.parameters.read())
            create = partial(init, self._optimizer, parameters, bound.shard)
            any_optimizer.convert_state(self._optimizer, _its_own(bound, state), create)
        else:
            for path, container, key in Structure(any_optimizer.tree(self._optimizer)).leaves:
                assignments.add(container, key, state[path][...])

    def _load_model(self, bound: Bound, state: dict[str, mx.array], assignments: Assignments) -> None:
        everything = _everything(bound)
        for path in state.keys() - set(bound.parameters.paths) - self.buffers.keys():
            assignments.add(self.buffers, path, everything[path])
        # A state from before the first step lacks the buffers. They then get their values from before the first step.
        model = {**self.buffers, **state}
        for path, place in zip(everything, bound.arrays.places, strict=True):
            if path in model:
                assignments.add(*place, model[path][...])

    def mismatches(self, state: StateDict, convert: bool) -> list[Row]:
        """The mismatches of a state, as rows (path, here, in the state)."""
        bound = self._current()
        everything = _everything(bound)
        # The forward pass may change the dtype of a buffer, and a state from before the first step lacks buffers.
        buffers = (everything.keys() & state["model"].keys()) - set(bound.parameters.paths)
        fitting = {path for path in buffers if state["model"][path].shape == everything[path].shape}
        wanted = {*bound.parameters.paths, *buffers} - fitting
        its_model = {path: array for path, array in state["model"].items() if path not in fitting}
        rows = differences({path: everything[path] for path in wanted}, its_model)
        if state["window"]:
            own = window.to_dict(window.empty(bound.parameters.read()), bound.parameters.paths, 1)
            rows += differences(own, state["window"])
        own, its = any_optimizer.flat_state(self._optimizer), _its_own(bound, state["optimizer"])
        convert = convert and any_optimizer.is_mlxs(self._optimizer)
        return rows + (any_optimizer.inconvertible(own, its) if convert else differences(own, its))


def _everything(bound: Bound) -> dict[str, mx.array]:
    """Every array of the model by its path."""
    paths = bound.arrays.paths
    everything = dict(zip(paths, bound.arrays.read(), strict=True))
    if len(everything) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise InputError(
            f"the model has two arrays whose path is {twice!r}, which no state can tell apart; rename one of them"
        )
    return everything


def _its_own(bound: Bound, state: dict[str, mx.array]) -> dict[str, mx.array]:
    """The part of the optimizer's ``state`` that this worker keeps."""
    return state if bound.shard is None else bound.shard.own(state)
