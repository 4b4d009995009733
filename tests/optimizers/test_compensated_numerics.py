"""Half-precision weights in `Compensated` move and decay as the formulas say in float64, for each optimizer of MLX.

The formulas are written here in NumPy, from the papers and MLX's documentation.
"""

from __future__ import annotations

from collections.abc import Callable

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.update import residual

RATES = (1e-3, 1e-4, 1e-5, 1e-6)
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
SHAPE = (64, 32)
# A decay of less than 1e-5 of a weight at each step is lost in the rounding of float32, too: so a large one.
DECAY = 100.0

Array = np.ndarray
Moments = dict[str, Array]


def sgd(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    s["v"] = 0.9 * s.get("v", 0.0) + g + decay * w
    return w - rate * s["v"]


def lion(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    m = s.get("m", np.zeros_like(w))
    s["m"] = 0.99 * m + 0.01 * g
    return w - rate * (np.sign(0.9 * m + 0.1 * g) + decay * w)


def muon(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    g = g + decay * w
    s["v"] = 0.95 * s.get("v", 0.0) + 0.05 * g
    x = (0.05 * g + 0.95 * s["v"]).T  # no more rows than columns
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return w - rate * np.sqrt(SHAPE[0] / SHAPE[1]) * x.T


def adafactor(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    rate = rate * max(1e-3, np.sqrt(np.square(w).mean()))
    kept = 1 - t**-0.8
    for name, axis in (("rows", 1), ("columns", 0)):
        s[name] = kept * s.get(name, 0.0) + (1 - kept) * (g**2 + 1e-30).mean(axis=axis)
    u = g / np.sqrt(np.outer(s["rows"] / s["rows"].mean(), s["columns"]))
    u = u / max(1.0, np.sqrt(np.square(u).mean()))
    return w - 50 * rate * decay * w - rate * u


def rmsprop(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    s["v"] = 0.99 * s.get("v", 0.0) + 0.01 * g**2
    return w - rate * g / (np.sqrt(s["v"]) + 1e-8)


def adagrad(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    s["v"] = s.get("v", 0.0) + g**2
    return w - rate * g / (np.sqrt(s["v"]) + 1e-8)


def adadelta(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    s["v"] = 0.9 * s.get("v", 0.0) + 0.1 * g**2
    u = s.get("u", 0.0)
    d = np.sqrt(u + 1e-6) / np.sqrt(s["v"] + 1e-6) * g
    s["u"] = 0.9 * u + 0.1 * d**2
    return w - 1e3 * rate * d


def adamw(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * g**2
    m, v = s["m"] / (1 - 0.9**t), s["v"] / (1 - 0.999**t)
    return w - rate * decay * w - rate * m / (np.sqrt(v) + 1e-8)


def adamax(w: Array, g: Array, s: Moments, t: int, rate: float, decay: float) -> Array:
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    s["v"] = np.maximum(0.999 * s.get("v", 0.0), np.abs(g))
    return w - rate * s["m"] / (s["v"] + 1e-8)


OPTIMIZERS: dict[str, tuple[Callable[..., Array], Callable[[float, float], optim.Optimizer]]] = {
    "SGD": (sgd, lambda rate, decay: optim.SGD(rate, momentum=0.9, weight_decay=decay)),
    "Lion": (lion, lambda rate, decay: optim.Lion(rate, weight_decay=decay)),
    "Muon": (muon, lambda rate, decay: optim.Muon(rate, weight_decay=decay)),
    # Its rate is relative to weights of 0.02.
    "Adafactor": (adafactor, lambda rate, decay: optim.Adafactor(rate, relative_step=False, weight_decay=50 * decay)),
    "AdamW": (adamw, lambda rate, decay: optim.AdamW(rate, weight_decay=decay, bias_correction=True)),
    "RMSprop": (rmsprop, lambda rate, decay: optim.RMSprop(rate)),
    "Adagrad": (adagrad, lambda rate, decay: optim.Adagrad(rate)),
    # Its rate is usually 1; the first steps are 1e-3 of it.
    "AdaDelta": (adadelta, lambda rate, decay: optim.AdaDelta(1e3 * rate)),
    "Adamax": (adamax, lambda rate, decay: optim.Adamax(rate)),
}


def float64(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32), np.float64)


CASES = [(name, 0.0) for name in OPTIMIZERS]
CASES += [(name, DECAY) for name in ("SGD", "Lion", "Muon", "Adafactor", "AdamW")]  # the others have no weight decay


@pytest.mark.parametrize(("name", "decay"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_move_and_decay_as_in_float64(name: str, decay: float, dtype: str) -> None:
    rule, make = OPTIMIZERS[name]
    optimizer, steps = ca.Compensated(make(1.0, decay)), 30 if decay else 100
    start = (0.02 * mx.random.normal(SHAPE, key=mx.random.key(99))).astype(DTYPES[dtype])  # the usual first weights
    gradients = [
        (0.1 * mx.random.normal(SHAPE, key=mx.random.key(i)) + 0.02).astype(DTYPES[dtype]) * (decay == 0)
        for i in range(steps)
    ]
    for rate in RATES:
        p, exact, moments = {"w": start}, float64(start), {}
        optimizer.state = make(rate, decay).state  # so that one trace does for all rates
        for i, g in enumerate(gradients):
            p = optimizer.apply_gradients({"w": g}, p)
            exact = rule(exact, float64(g), moments, i + 1, rate, decay)
        found = float64(residual.join(p["w"], optimizer.state["w"]["residual"])) - float64(start)
        expected = exact - float64(start)
        # Weight and residual are as fine as float32. Each step rounds a weight below 1/8 by at most 2^-28.
        rounding = steps * 2.0**-28
        assert np.abs(found).mean() == pytest.approx(np.abs(expected).mean(), rel=1e-3), rate
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max() + rounding)
    assert optimizer.traces == 1


def test_the_optimizer_alone_does_not_move_them() -> None:
    """What the test above would notice."""
    start = {"w": mx.ones(SHAPE, mx.bfloat16)}
    weights, alone = start, OPTIMIZERS["SGD"][1](1e-6, 0.0)
    for _ in range(20):
        weights = alone.apply_gradients({"w": mx.ones(SHAPE, mx.bfloat16)}, weights)
    assert mx.array_equal(weights["w"], start["w"])
