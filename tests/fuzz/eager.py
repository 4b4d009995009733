"""The reference for MLX's optimizers, alone or in `Compensated`: the same, called eagerly on what the step had before.

`Compensated` must do to half-precision weights and their residuals what the optimizer alone does to their float32 sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from compiled_adam import AdamW
from compiled_adam.update import residual
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from tests.fuzz.shadow import EPS32, ULP, Arrays, Options, Shadow

# Their eps is large enough for a gradient's rounding not to decide the direction of an update.
MAKE: dict[str, Callable[[], optim.Optimizer]] = {
    "SGD": lambda: optim.SGD(1e-2, momentum=0.9, weight_decay=0.01),
    "Adam": lambda: optim.Adam(1e-2, eps=1e-3, bias_correction=True),
    "AdamW": lambda: optim.AdamW(optim.linear_schedule(1e-2, 1e-3, 10), eps=1e-3),
    "Lion": lambda: optim.Lion(1e-3, weight_decay=0.1),
    "Muon": lambda: optim.Muon(1e-2),
    "Muon and AdamW": lambda: optim.MultiOptimizer([optim.Muon(1e-2), optim.AdamW(1e-2, eps=1e-2)], [_is_matrix]),
    # Not compensated: its value would be in two arrays.
    "AdamW of ours and SGD": lambda: optim.MultiOptimizer(
        [AdamW(1e-2, eps=1e-3, compensated=False, max_grad_norm=0.7), optim.SGD(1e-2)], [_is_matrix]
    ),
}
ALONE = ("SGD", "Adam", "AdamW", "Lion", "Muon", "AdamW of ours and SGD")
COMPENSATED = ("SGD", "Lion", "Muon", "Muon and AdamW")
_OURS = ("residual", "_grad_norm", "_skipped")  # what the state of the optimizer alone has not


def _is_matrix(path: str, parameter: mx.array) -> bool:
    return parameter.ndim >= 2


class Eager(Shadow):
    """``read`` returns the model's trainable parameters and the optimizer's state, as trees."""

    def __init__(
        self, weights: Arrays, dtype: str, options: Options, accumulate: int, name: str, read: Callable[[], Any]
    ) -> None:
        super().__init__(weights, dtype, options, accumulate)
        self.name, self.read = name, read
        self.moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the state: values and bounds

    def leaves(self, gradients: Arrays, errors: Arrays) -> None:
        self.look()
        self.step += 1
        weights, state = self.read()
        values = _values(weights, state)
        # The residual of a weight that somebody has replaced may be there or not. It is in gradients by weight decay.
        loose = {path: 2 * self.rounding(p) if self.replaced else 0 * p for path, p in _float64(weights).items()}
        results, moments = [], []
        # How much the gradient's rounding may do. That of half precision is so large that more happens in between.
        for part in (0, 1, -1, *(() if self.dtype == "float32" else (0.5, -0.5))):
            optimizer = MAKE[self.name]()
            optimizer.init(values)
            optimizer.state = tree_map(lambda array: mx.array(array), _alone(state))
            tree = tree_map_with_path(
                lambda path, p: mx.array(gradients[path] + part * (errors[path] + 0.1 * loose[path])).astype(p.dtype),  # noqa: B023
                values,
            )
            results.append(_float64(optimizer.apply_gradients(tree, values)))
            moments.append(_moments(optimizer.state))
        self.moments = {path: (a, _spread(path, moments) + 1e-6 * np.abs(a) + 1e-9) for path, a in moments[0].items()}
        for path, start in _float64(values).items():
            p, spread = results[0][path], _spread(path, results)
            moved = np.abs(p - start)
            if "Muon" in self.name and p.ndim >= 2:
                # It mixes the elements. It makes small parts of a gradient, which are all rounding, as large as others.
                spread = np.full_like(p, 2 * spread.max() + (2.0**-6 if self.dtype == "float32" else 2) * moved.max())
            rounding = 4 * EPS32 if self.has_residual else 4 * ULP[self.dtype]
            self.p[path] = p
            self.dp[path] = loose[path] + spread + rounding * (np.abs(p) + moved) + 1e-7

    def look(self) -> None:
        """Compares moments, and the values of weights and residuals; the latter become the reference."""
        weights, state = self.read()
        values = _float64(_values(weights, state)) if self.has_residual else {}
        self.compare_arrays(values, {path: (self.p[path], self.dp[path]) for path in values})
        self.compare_arrays(_moments(state), self.moments)
        if not self.replaced:
            self.p |= values
            self.dp |= {path: np.zeros_like(value) for path, value in values.items()}


def _values(weights: Any, state: Any) -> Any:
    """Each weight joined with its residual."""
    flat: dict[str, mx.array] = dict(tree_flatten(state))
    rests = {_path(key)[: -len(".residual")]: rest for key, rest in flat.items() if key.endswith(".residual")}
    return tree_map_with_path(lambda path, w: residual.join(w, rests[path]) if path in rests else w, weights)


def _path(key: str) -> str:
    """Without the number of the optimizer inside a MultiOptimizer."""
    return key.split(".", 2)[2] if key.startswith("states.") else key


def _alone(state: Any) -> Any:
    """The state without what `Compensated` adds."""
    if isinstance(state, dict):
        return {key: _alone(value) for key, value in state.items() if key not in _OURS}
    return [_alone(value) for value in state] if isinstance(state, list) else state


def _moments(state: Any) -> Arrays:
    return {path: a for path, a in _float64(state).items() if path.endswith((".m", ".v"))}


def _float64(tree: Any) -> Arrays:
    return {path: np.array(a.astype(mx.float32), np.float64) for path, a in tree_flatten(tree)}


def _spread(path: str, results: list[Arrays]) -> np.ndarray:
    return 2 * np.max([np.abs(other[path] - results[0][path]) for other in results[1:]], axis=0)
