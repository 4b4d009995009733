"""What a loss function returned: checked, and taken apart."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..base import InputError


def checked(output: Any, weighted: bool) -> tuple[mx.array, list[Any], mx.array]:
    """What loss_fn returned as (loss, aux, weight); raises an error that says what to return instead."""
    loss, *aux = output if isinstance(output, (tuple, list)) and output else (output,)
    if not isinstance(loss, mx.array):
        raise TypeError(
            f"loss_fn returned {type(loss).__name__} as the loss; return an mx.array of shape (),"
            " or a tuple that begins with one"
        )
    if loss.shape != ():
        raise InputError(f"loss_fn returned a loss of shape {loss.shape}; reduce it to a scalar, as with .mean()")
    if not mx.issubdtype(loss.dtype, mx.floating):
        raise TypeError(f"loss_fn returned a loss of dtype {loss.dtype}; return a float")
    if not weighted:
        return loss, aux, mx.array(1.0)
    if not aux:
        raise InputError("weighted=True needs loss_fn to return (loss, weight, ...); it returned the loss alone")
    weight = aux[0]
    if isinstance(weight, bool) or not isinstance(weight, (mx.array, int, float)):
        raise TypeError(f"loss_fn returned {type(weight).__name__} as the weight; return a 0-d array or a number")
    weight = mx.array(weight, mx.float32)
    if weight.shape != ():
        raise InputError(f"loss_fn returned a weight of shape {weight.shape}; reduce it to a scalar, as with .sum()")
    return loss, aux, weight
