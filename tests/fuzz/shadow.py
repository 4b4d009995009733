"""What a train step with our optimizer must make of gradients: float64, with a bound for every number.

The reference is an interval: each value has an error bound, which grows by what float32 arithmetic and the way that
moments are stored may do in one update. What can be read without disturbing the step (the weights) replaces the
reference after it was compared; the moments do when they are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

EPS32 = 2.0**-24
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
LEAST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}
BLOCK = 128

Arrays = dict[str, np.ndarray]


class Numbers(NamedTuple):
    """What the update of one parameter depends on."""

    factor: float  # of the learning rate
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Options(NamedTuple):
    """Of the optimizer, as `compiled_adam.AdamW` names them. ``numbers`` are those of the parameter at a path."""

    learning_rate: float | Callable[[int], float]
    bias_correction: bool
    moments: str
    compensated: bool
    max_grad_norm: float | None
    skip_nonfinite: bool
    numbers: Callable[[str, np.ndarray], Numbers]


class Shadow:
    """The parameters (values of a float32 master copy), moments and counters that a step must have."""

    def __init__(self, weights: Arrays, dtype: str, options: Options, accumulate: int) -> None:
        self.options, self.dtype, self.accumulate = options, dtype, accumulate
        self.has_residual = options.compensated and dtype != "float32"
        self.p = {path: w.copy() for path, w in weights.items()}
        self.m, self.v, self.dp, self.dm, self.dv = (
            {path: np.zeros_like(w) for path, w in weights.items()} for _ in "12345"
        )
        self.before: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}  # the last update: values, bounds, the rate
        self.replaced = False  # whether weights were set since the last update
        self.step = self.skipped = 0
        self.rate: float | None = None  # set by hand
        self.norm: tuple[float, float] = (0.0, 0.0)  # of the last update's gradient, and its bound
        self.empty_window()

    def empty_window(self) -> None:
        zeros = {path: np.zeros_like(p) for path, p in self.p.items()}
        self.filled, self.weight, self.loss = 0, 0.0, 0.0
        self.sums, self.dsums = zeros, {path: a.copy() for path, a in zeros.items()}

    def batch(self, gradients: Arrays, errors: Arrays, weight: float, loss: float) -> bool:
        """One micro-batch; whether that made an update."""
        if self.accumulate == 1:
            if weight == 0:
                gradients = {path: np.zeros_like(g) for path, g in gradients.items()}
                errors = gradients
            self.update(gradients, errors)
            return True
        self.filled += 1
        if weight > 0:
            self.weight, self.loss = self.weight + weight, self.loss + weight * loss
            for path, g in gradients.items():
                self.sums[path] = self.sums[path] + weight * g
                self.dsums[path] = self.dsums[path] + weight * (errors[path] + 4 * EPS32 * np.abs(g))
        if self.filled < self.accumulate:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """The update of what is in the window."""
        weight = self.weight or 1.0
        mean = {path: total / weight for path, total in self.sums.items()}
        # Rounded to the dtype of the parameter.
        errors = {path: self.dsums[path] / weight + np.abs(g) * ULP[self.dtype] for path, g in mean.items()}
        self.empty_window()
        self.update(mean, errors)

    def learning_rate(self) -> float:
        if self.rate is not None:
            return self.rate
        rate = self.options.learning_rate
        return rate(self.step) if callable(rate) else rate

    def update(self, gradients: Arrays, errors: Arrays) -> None:
        o = self.options
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(np.sqrt(sum(np.square(g).sum() for g in gradients.values())))
            dnorm = float(np.sqrt(sum(np.square(e).sum() for e in errors.values()))) + 1e-5 * norm
        self.norm = norm, dnorm
        if o.skip_nonfinite and not np.isfinite(norm):
            self.skipped += 1
            return
        factor, dfactor = 1.0, 0.0
        if o.max_grad_norm is not None and norm + dnorm > o.max_grad_norm:
            factor = min(1.0, o.max_grad_norm / norm)
            dfactor = factor * dnorm / max(norm - dnorm, 1e-30)
        found = {
            path: factor * errors[path] + dfactor * np.abs(g) + 4 * EPS32 * np.abs(g) for path, g in gradients.items()
        }
        self.leaves({path: factor * g for path, g in gradients.items()}, found)
        self.replaced = False

    def leaves(self, gradients: Arrays, errors: Arrays) -> None:
        """The update, by gradients that have been clipped."""
        rate = self.learning_rate()
        self.step += 1
        for path, g in gradients.items():
            numbers = self.options.numbers(path, self.p[path])
            self._leaf(path, g, errors[path], rate * numbers.factor, numbers)

    def _leaf(self, path: str, g: np.ndarray, dg: np.ndarray, rate: float, numbers: Numbers) -> None:
        b1, b2 = numbers.betas
        self.before[path] = self.p[path], self.dp[path], rate
        m = b1 * self.m[path] + (1 - b1) * g
        v = b2 * self.v[path] + (1 - b2) * g**2
        dm = b1 * self.dm[path] + (1 - b1) * dg + 4 * EPS32 * np.abs(m)
        dv = b2 * self.dv[path] + (1 - b2) * (2 * np.abs(g) * dg + dg**2) + 4 * EPS32 * v
        c1, c2 = self._corrections(numbers)
        root = np.sqrt(v / c2)
        droot = np.minimum(np.sqrt(dv / c2), dv / c2 / np.maximum(root, 1e-100)) + 8 * EPS32 * root + 2e-20
        bottom = root + numbers.eps
        low = np.maximum(bottom - droot, numbers.eps)
        change = self._change(path, self.p[path], m, v, rate)
        dchange = abs(rate) * (dm / c1 / low + np.abs(m / c1) * droot / (bottom * low)) + 16 * EPS32 * np.abs(change)
        p = self.p[path] - change
        self.dp[path] = self.dp[path] + dchange + self._sums(p, change)
        self.p[path], self.m[path], self.v[path] = p, m, v
        stored_m, stored_v = self._coarseness(m, v)
        self.dm[path], self.dv[path] = dm + stored_m, dv + stored_v

    def _corrections(self, numbers: Numbers) -> tuple[float, float]:
        b1, b2 = numbers.betas
        return (1 - b1**self.step, 1 - b2**self.step) if self.options.bias_correction else (1.0, 1.0)

    def _change(self, path: str, p: np.ndarray, m: np.ndarray, v: np.ndarray, rate: float) -> np.ndarray:
        """What the update with new moments takes off the parameter."""
        numbers = self.options.numbers(path, p)
        c1, c2 = self._corrections(numbers)
        return rate * (m / c1) / (np.sqrt(v / c2) + numbers.eps) + rate * numbers.weight_decay * p

    def _sums(self, p: np.ndarray, change: np.ndarray) -> np.ndarray:
        """The rounding of float32 sums; residuals are as fine, in float16 below 2^-14 finer than 2^-40."""
        return 4 * EPS32 * (np.abs(p) + np.abs(change)) + 2.0**-40

    def _is_exact(self, m: np.ndarray) -> bool:
        """Whether moments are stored as they were computed."""
        policy = self.dtype if self.options.moments == "param" else self.options.moments
        return policy == "float32" or (policy == "8bit" and m.size < 4096)

    def _coarseness(self, m: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much the moments may change when they are stored."""
        policy = self.options.moments
        if policy == "param":
            policy = self.dtype
        if policy == "8bit" and m.size >= 4096:
            sm, sroot = (_block_max(x) / codes for x, codes in ((np.abs(m), 127), (np.sqrt(v), 255)))
            return 1.01 * sm, 1.01 * (2 * np.sqrt(v) * sroot + sroot**2)
        unit = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(policy, 0.0)
        least = 2.0**-24 if policy == "float16" else 0.0
        return unit * np.abs(m) + least, unit * v + least

    def rounding(self, w: np.ndarray) -> np.ndarray:
        """How far a stored weight may be from the value it stands for."""
        return 0.0 * w if self.dtype == "float32" else 0.501 * ULP[self.dtype] * np.abs(w) + LEAST[self.dtype]

    def compare_weights(self, weights: Arrays) -> None:
        """Raises AssertionError; weights that are all there is of a parameter become the reference."""
        for path, w in weights.items():
            _within(path, w, self.p[path], self.dp[path] + self.rounding(w))
            if not self.has_residual:
                self.p[path], self.dp[path] = w.copy(), np.zeros_like(w)

    @staticmethod
    def compare_arrays(found: Arrays, expected: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Raises AssertionError unless each array is within a bound of its value."""
        for path, (value, bound) in expected.items():
            _within(path, found[path], value, bound)

    def compare_state(self, m: Arrays, v: Arrays, values: Arrays) -> None:
        """Moments, decoded, and values of weights and residuals; they become the reference."""
        for path in self.p:
            _within(f"{path}.m", m[path], self.m[path], self.dm[path] + 1e-38)
            _within(f"{path}.v", v[path], self.v[path], self.dv[path] + 1e-38)
            _within(f"{path} with its residual", values[path], self.p[path], self.dp[path])
            if path in self.before and self._is_exact(m[path]):
                # Of the moments that there are, whatever the rounding of the gradient did to them.
                p, dp, rate = self.before[path]
                change = self._change(path, p, m[path], v[path], rate)
                bound = dp + self._sums(p, change) + 32 * EPS32 * np.abs(change)
                bound = bound + (0.0 if self.has_residual else self.rounding(values[path]))
                _within(f"{path} after the last update", values[path], p - change, bound)
            self.m[path], self.v[path] = m[path], v[path]
            self.dm[path], self.dv[path] = (np.zeros_like(m[path]) for _ in "12")
            if not self.replaced:  # else the residual that was there may be taken away by the next update
                self.p[path], self.dp[path] = values[path], np.zeros_like(m[path])

    def set_weights(self, weights: Arrays) -> None:
        """Somebody has: the residual that was there may count or not, which is a unit in the last place."""
        self.before, self.replaced = {}, self.has_residual
        for path, w in weights.items():
            self.p[path] = w.copy()
            self.dp[path] = 2 * self.rounding(w) if self.has_residual else np.zeros_like(w)


def _block_max(x: np.ndarray) -> np.ndarray:
    flat = np.concatenate([x.ravel(), np.zeros(-x.size % BLOCK)]).reshape(-1, BLOCK)
    return np.repeat(flat.max(axis=1), BLOCK)[: x.size].reshape(x.shape)


def _within(what: str, found: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    wrong = ~(np.abs(found - expected) <= bound)
    if wrong.any():
        i = np.argmax(np.where(wrong, np.abs(found - expected) / np.maximum(bound, 1e-300), 0))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} differ, such as {found.flat[i]!r} instead of"
            f" {expected.flat[i]!r}, with a bound of {np.broadcast_to(bound, found.shape).flat[i]:.3g}"
        )
