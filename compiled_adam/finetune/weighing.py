"""Every token counts alike, whatever batch it is in.

A loss is a mean over the tokens of its batch. In batches of similar length a token of short examples would move the
weights more than one of long examples, because fewer tokens share its update. So the gradient of a batch is multiplied
by its share: its tokens, divided by the tokens of an average batch. The loss keeps its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .batches import Batches


def are_weighed(batches: Any, accumulate: int) -> bool:
    """Whether the batches of a run are weighed. Windows weigh their micro-batches by tokens already."""
    return isinstance(batches, Batches) and batches.grouped and accumulate == 1


def weighed(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The ``loss`` with one more argument at the end, the share of the batch: a 0-d array that multiplies gradients.

    >>> loss = weighed(lambda x: (x * x, 1))
    >>> value, gradient = mx.value_and_grad(lambda x: loss(x, mx.array(0.5))[0])(mx.array(3.0))
    >>> value.item(), gradient.item()
    (9.0, 3.0)
    """

    def with_share(*arguments: Any) -> Any:
        *others, share = arguments
        mean, *rest = loss(*others)
        return mean + (share - 1) * (mean - mx.stop_gradient(mean)), *rest

    return with_share
