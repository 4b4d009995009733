"""What a call of a train step returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ..base import shown


class StepResult(tuple[Any, ...]):
    """The values that loss_fn returned, as a tuple, so that ``loss, *rest = step(...)`` works. Attributes say the rest.

    Arrays are lazy: reading or printing one waits for the step.

    Attributes:
        loss: the first value: 0-d, loss of this batch before the update. From `flush`: the mean over the window.
        aux: the other values, as a tuple.
        grad_norm: 0-d float32, global norm of the (mean) gradient. None if this call made no update.
        learning_rate: 0-d, rate of the last update. None for an optimizer without a learning rate.
        updated: whether this call applied an update.
        skipped: 0-d, how many updates were skipped so far.
        extra: 0-d, sum of `TrainStep.extra` over the workers. None without other workers or an update.
    """

    grad_norm: mx.array | None
    learning_rate: mx.array | None
    updated: bool
    skipped: mx.array
    extra: mx.array | None

    def __new__(cls, values: Iterable[Any], **attributes: Any) -> StepResult:
        result = super().__new__(cls, values)
        vars(result).update(attributes)
        return result

    @property
    def loss(self) -> mx.array:
        loss: mx.array = self[0]
        return loss

    @property
    def aux(self) -> tuple[Any, ...]:
        return self[1:]

    def __repr__(self) -> str:
        values = {"loss": self.loss, "aux": self.aux, **vars(self)}
        if values.get("extra") is None:
            values.pop("extra", None)
        return f"StepResult({', '.join(f'{name}={shown(value)}' for name, value in values.items())})"
