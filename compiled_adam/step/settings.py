"""The options of a train step. They are fixed, because traces contain them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..base import InputError
from ..distributed import reduce

LossFunction = Callable[..., Any]  # loss_fn(model, *args, **kwargs): the loss, or a tuple that begins with it


class Settings(NamedTuple):
    accumulate: int
    weighted: bool
    max_traces: int
    group: mx.distributed.Group | None  # None without other workers
    reduce_dtype: str
    shard_state: bool  # False without a group


def check_arguments(model: Any, loss_fn: Any, optimizer: Any) -> None:
    """Raises TypeError for an argument of the wrong type. The message says what to pass instead."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; pass an mlx.nn.Module")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is {type(loss_fn).__name__}; pass a function loss_fn(model, *batch)")
    methods = (getattr(optimizer, name, None) for name in ("init", "apply_gradients"))
    if isinstance(optimizer, type) or (optimizer is not None and not all(map(callable, methods))):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}; pass an optimizer such as AdamW(learning_rate=1e-3), or an"
            " object with the methods init(parameters) and apply_gradients(gradients, parameters)"
        )


def checked(
    accumulate: int,
    weighted: bool,
    max_traces: int,
    group: mx.distributed.Group | None,
    reduce_dtype: str,
    shard_state: bool,
) -> Settings:
    """The options of `TrainStep`. Raises ValueError if an option is out of range. The message names the option."""
    for name, value in (("accumulate", accumulate), ("max_traces", max_traces)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; it must be an integer of at least 1")
    if not isinstance(shard_state, bool):
        raise InputError(f"shard_state is {shard_state!r}; it must be True or False")
    if reduce_dtype not in reduce.DTYPES:
        raise InputError(f"reduce_dtype is {reduce_dtype!r}; it must be one of {', '.join(reduce.DTYPES)}")
    group = group if group is not None and group.size() > 1 else None
    return Settings(accumulate, weighted, max_traces, group, reduce_dtype, shard_state and group is not None)
