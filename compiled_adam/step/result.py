"""The result of a call of a train step."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from ..base import shown


class StepResult(NamedTuple):
    """The result of one call of a `TrainStep`. Arrays are lazy: reading or printing one waits for the step."""

    loss: mx.array  # 0-d, loss of this batch before the update; from `flush`: the mean over the window
    aux: tuple[Any, ...]  # the values that loss_fn returned after the loss
    grad_norm: mx.array | None  # 0-d float32, global norm of the (mean) gradient; None if this call made no update
    learning_rate: mx.array | None  # 0-d, rate of the last update; None for an optimizer without a learning rate
    updated: bool  # whether this call applied an update
    skipped: mx.array  # 0-d, how many updates were skipped so far
    extra: mx.array | None = None  # 0-d, sum of `extra` over the workers; None without other workers or an update

    def __repr__(self) -> str:
        values = {name: value for name, value in self._asdict().items() if name != "extra" or value is not None}
        return f"StepResult({', '.join(f'{name}={shown(value)}' for name, value in values.items())})"
