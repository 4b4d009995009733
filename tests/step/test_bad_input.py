"""Input that a step cannot use is named, with what to do instead."""

from __future__ import annotations

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from nets import batch, net, squared_error


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (None, TypeError, "returned NoneType as the loss"),
        ((), TypeError, "returned tuple as the loss"),
        (1.0, TypeError, "returned float as the loss"),
        (mx.zeros((3,)), ValueError, r"shape \(3,\)"),
        (mx.array(1), TypeError, "dtype mlx.core.int32"),
    ],
)
def test_a_bad_loss_is_explained(output, error: type[Exception], message: str) -> None:
    model = net()
    step = ca.make_step(model, lambda model, x, y: output)
    with pytest.raises(error, match=message):
        step(*batch())
    mx.eval(model.parameters())


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ((), ValueError, r"needs loss_fn to return \(loss, weight"),
        (("3",), TypeError, "str as the weight"),
        ((True,), TypeError, "bool as the weight"),
        ((mx.ones((2,)),), ValueError, r"weight of shape \(2,\)"),
    ],
)
def test_a_bad_weight_is_explained(weight: tuple, error: type[Exception], message: str) -> None:
    step = ca.make_step(net(), lambda model, x, y: (squared_error(model, x, y), *weight), weighted=True)
    with pytest.raises(error, match=message):
        step(*batch())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": {}}, TypeError, "model is dict"),
        ({"model": nn.ReLU()}, ValueError, "no trainable parameters"),
        ({"loss_fn": None}, TypeError, "loss_fn is NoneType"),
        ({"optimizer": 1e-3}, TypeError, "optimizer is float"),
        ({"accumulate": 0}, ValueError, "accumulate is 0"),
        ({"accumulate": 2.0}, ValueError, "accumulate is 2.0"),
        ({"max_traces": 0}, ValueError, "max_traces is 0"),
        ({"max_trace": 3}, TypeError, "max_trace"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ca.make_step(**{"model": nn.Linear(1, 1), "loss_fn": squared_error, **arguments})


def test_an_integer_parameter_is_named() -> None:
    model = nn.Linear(2, 2)
    model.positions = mx.arange(3)
    with pytest.raises(TypeError, match=r"'positions' is mlx\.core\.int32.*freeze"):
        ca.make_step(model, squared_error)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.array(["a", "b"]), r"batch\[0\] is a NumPy array of dtype <U1, .* leave it out"),
        ({"x": np.array([object()])}, r"batch\[0\]\['x'\] is a NumPy array of dtype object"),
        (nn.Linear(4, 1), r"batch\[0\] is a module, Linear; let loss_fn use it"),
        ({"x": [object()]}, r"batch\[0\]\['x'\]\[0\] is builtins.object"),
    ],
)
def test_a_bad_batch_is_named(argument, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ca.make_step(net(), squared_error)(argument, mx.ones((2, 1)))
