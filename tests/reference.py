"""Adam and AdamW in float64 NumPy, written from the papers' formulas and sharing no code with the package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Reference:
    """Updates a flat dictionary of float64 arrays; ``learning_rate`` may be a function of the step (from 0)."""

    def __init__(
        self,
        parameters: dict[str, np.ndarray],
        learning_rate: float | Callable[[int], float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
    ) -> None:
        self.parameters = {path: np.array(p, np.float64) for path, p in parameters.items()}
        self.m = {path: np.zeros_like(p) for path, p in self.parameters.items()}
        self.v = {path: np.zeros_like(p) for path, p in self.parameters.items()}
        self.step = 0
        self._learning_rate, self._betas, self._eps = learning_rate, betas, eps
        self._weight_decay, self._bias_correction = weight_decay, bias_correction

    def update(self, gradients: dict[str, np.ndarray]) -> None:
        rate = self._learning_rate(self.step) if callable(self._learning_rate) else self._learning_rate
        self.step += 1
        b1, b2 = self._betas
        for path, g in gradients.items():
            p, g = self.parameters[path], np.array(g, np.float64)
            self.m[path] = b1 * self.m[path] + (1 - b1) * g
            self.v[path] = b2 * self.v[path] + (1 - b2) * g**2
            m, v = self.m[path], self.v[path]
            if self._bias_correction:
                m, v = m / (1 - b1**self.step), v / (1 - b2**self.step)
            self.parameters[path] = p - rate * self._weight_decay * p - rate * m / (np.sqrt(v) + self._eps)
