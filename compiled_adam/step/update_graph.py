"""Two compiled functions: one adds a micro-batch to the window of accumulated gradients, one makes the update."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from ..base import Compiled
from ..distributed import reduce
from ..optimizers import any_optimizer
from ..update import window
from .apply import Trees
from .apply_packed import PackedTrees
from .guards import try_kernels
from .settings import Settings


class Update(NamedTuple):
    """The results of an update. All arrays are lazy."""

    parameters: list[mx.array]
    state: Any
    grad_norm: mx.array
    sums: list[mx.array]  # sums over the workers of weights, weighted losses and `extra`; empty without other workers


class UpdateGraph:
    """The update of the arrays of ``trees`` by an optimizer. The gradients have the given ``dtypes``.

    ``added`` and ``updated`` count how often the Python code of each graph ran.
    """

    def __init__(
        self, optimizer: optim.Optimizer, trees: Trees | PackedTrees, dtypes: list[mx.Dtype], settings: Settings
    ) -> None:
        self._optimizer, self._trees, self._dtypes, self._settings = optimizer, trees, dtypes, settings
        self.added = self.updated = 0
        self._add = Compiled(self._trace_add, settings.max_traces)
        self._update = Compiled(self._trace_update, settings.max_traces, draws=True)

    def add(self, sums: window.Window, gradients: list[mx.array], weight: mx.array, loss: mx.array) -> window.Window:
        """The window with one more micro-batch."""
        before = self.added
        sums = self._add(sums, gradients, weight, loss)
        if self.added > before:
            try_kernels(("sum", array) for array in sums[0])
        return sums

    def update(
        self,
        gradients: list[mx.array],
        weight: mx.array,
        loss: mx.array,
        extra: float,
        assigned: dict[int, mx.array],
    ) -> Update:
        """An update by the sums of a window, or by the packed gradients of one batch.

        ``assigned`` has the parameters that the forward pass has replaced. ``extra`` is summed over the workers.
        """
        scalars = [weight] if self._settings.group is None else [weight, loss, mx.array(extra)]
        before = self.updated
        parameters, state = self._trees.read(assigned)
        constants = any_optimizer.constants(self._optimizer)
        update = Update(*self._update(parameters, gradients, scalars, state, constants))
        if self.updated > before:
            try_kernels(self._trees.named(update.parameters, update.state))
        return update

    def traced(
        self, gradients: list[mx.array], sums: window.Window | tuple[()], parameters: list[mx.array], state: Any
    ) -> Any:
        """All that a step computes from the last gradients of an update. Call it while tracing."""
        weight = loss = mx.array(1.0)
        if sums:
            gradients, weight, loss = self._trace_add(sums, gradients, weight, loss)
            # Two graphs: no kernel has a part of both.
            gradients = [mx.depends([g], [weight])[0] for g in gradients]
        else:
            gradients = self._trees.pack(gradients)
        constants = any_optimizer.constants(self._optimizer)
        return self._trace_update(parameters, gradients, [weight], state, constants)

    def _trace_add(
        self, sums: window.Window, gradients: list[mx.array], weight: mx.array, loss: mx.array
    ) -> window.Window:
        self.added += 1
        return window.add(sums, gradients, weight, loss)

    def _trace_update(
        self,
        parameters: list[mx.array],
        gradients: list[mx.array],
        scalars: list[mx.array],
        state: Any,
        constants: list[Any],
    ) -> tuple[list[mx.array], Any, mx.array, list[mx.array]]:
        # `constants` is not read, because the optimizer reads its attributes. It makes other values cause a new trace.
        self.updated += 1
        gradients, weight, sums, last = self._mean(gradients, scalars)
        if self._settings.accumulate > 1:
            gradients = self._trees.pack(gradients)  # else the graph of the gradients has packed them
        return *self._trees.update(gradients, parameters, state, last, weight), sums

    def _mean(
        self, gradients: list[mx.array], scalars: list[mx.array]
    ) -> tuple[list[mx.array], mx.array | None, list[mx.array], mx.array | None]:
        """Mean gradients, a weight not yet applied to them, sums over workers, and the last communication's result."""
        accumulate, weighted, _, group, reduce_dtype, _ = self._settings
        if group is not None:
            own = None
            if accumulate == 1:
                own, loss, extra = scalars
                scalars = [mx.maximum(own, 0.0), window.weighted(loss, own), extra]
            own = own if weighted else None  # without `weighted` all weights are 1
            sent = [reduce.DTYPES[reduce_dtype] or dtype for dtype in self._dtypes]
            gradients, *sums, last = reduce.mean_over_workers(gradients, scalars, group, sent, own)
            return [g.astype(dtype) for g, dtype in zip(gradients, self._dtypes, strict=True)], None, sums, last
        if accumulate > 1:
            return window.mean(gradients, scalars[0], self._dtypes), None, [], None
        return gradients, scalars[0] if weighted else None, [], None
