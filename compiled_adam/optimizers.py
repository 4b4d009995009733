"""Adam and AdamW: what a user constructs in place of ``mlx.optimizers.Adam`` and ``AdamW``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from . import rule
from .layout import Aligned

LearningRate = float | mx.array | Callable[[mx.array], mx.array]


class Adam(optim.Adam):
    """Adam whose update of the whole parameter tree is one compiled graph, computed in float32.

    A drop-in for ``mlx.optimizers.Adam``, and an instance of it. Formulas, without and with bias correction::

        m <- b1 m + (1 - b1) g                  v <- b2 v + (1 - b2) g^2
        p <- p - lr m / (sqrt(v) + eps)
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)      (``bias_correction=True``, t from 1)

    Moments and arithmetic are float32 for parameters of every float dtype; parameters keep their dtype and shape.
    Called eagerly, the update is traced once for each set of paths, shapes and dtypes; a new learning rate, step
    or gradient value traces nothing. Inside a caller's ``mx.compile`` it becomes a part of the caller's graph.

    Args:
        learning_rate: a number, or a function of the step (0-d array, 0 at the first update) that returns one.
        betas: decay rates of the two moments, each in [0, 1). Default (0.9, 0.999).
        eps: added to the denominator, >= 0. Default 1e-8.
        bias_correction: divide the moments by ``1 - beta^t``. Default False, as in MLX.
        moments: how the moments are stored; "float32" is the one way so far.

    Raises:
        ValueError: a beta outside [0, 1), a negative eps, an unknown ``moments``.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015.

    >>> optimizer = Adam(learning_rate=0.1)
    >>> parameters = {"weight": mx.array([1.0, -2.0])}
    >>> optimizer.apply_gradients({"weight": mx.array([0.5, -0.5])}, parameters)
    {'weight': array([0.683772, -1.68377], dtype=float32)}
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
        *,
        moments: str = "float32",
    ) -> None:
        super().__init__(learning_rate, betas, eps, bias_correction)  # type: ignore[arg-type]
        if moments != "float32":
            raise ValueError(f'moments is {moments!r}; the one allowed value is "float32"')
        self.learning_rate = self.state["learning_rate"]  # float32, whatever a schedule returns
        self.weight_decay = 0.0
        self.traces = 0  # how often the update's Python ran: once a layout, or each time where nothing compiles
        self._compiled: dict[tuple[str, ...], Callable[..., Any]] = {}

    @property
    def learning_rate(self) -> mx.array:
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        # Always float32: an int or a float64 would change the dtype of an input, and so trace anew.
        self.state["learning_rate"] = mx.array(learning_rate, mx.float32)

    def init(self, parameters: dict) -> None:
        """Creates the moments (zeros) where there are none; those that exist, stock MLX's too, become float32."""
        super().init(parameters)
        _moments_to_float32(self.state)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Sets ``state["m"]`` and ``state["v"]`` to float32 zeros of the parameter's shape."""
        state["m"] = mx.zeros(parameter.shape, mx.float32)
        state["v"] = mx.zeros(parameter.shape, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Updates one parameter with the present ``step`` and ``learning_rate``; ``state`` gets the new moments."""
        constants = self._constants()
        c = rule.coefficients(self.step, self.learning_rate, *constants)
        parameter, state["m"], state["v"] = rule.adam(parameter, gradient, state["m"], state["v"], c, constants[0])
        return parameter

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The updated parameters, as a tree like ``gradients``, which may be a subset of ``parameters``.

        Raises ValueError or TypeError, naming the path, for a gradient that has no parameter or no state, is not
        an array, or differs from its parameter in shape; moments and step are as before then.
        """
        if not self._initialized:
            Aligned(gradients, parameters, self.state)  # raises before any state is made for a wrong tree
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))
        leaves = Aligned(gradients, parameters, self.state)
        if leaves.without_state:
            raise ValueError(
                f"the optimizer has no state for {', '.join(leaves.without_state)}: it was initialised without;"
                " call optimizer.init(parameters) with all parameters (moments that exist are kept)"
            )
        # Outside the compiled update, because a schedule may be any Python function of the step's value.
        scheduled = {name: mx.array(f(self.step), mx.float32) for name, f in self._schedulers.items()}
        learning_rate = scheduled.get("learning_rate", self.learning_rate)

        update = self._compiled.get(leaves.paths)
        if update is None:
            update = self._compiled[leaves.paths] = mx.compile(partial(self._update, leaves.paths))
        step, new_parameters, ms, vs = update(
            leaves.gradients,
            leaves.parameters,
            [state["m"] for state in leaves.states],
            [state["v"] for state in leaves.states],
            self.step,
            learning_rate,
            *self._constants(),
        )
        self.state.update(scheduled, step=step)
        for state, m, v in zip(leaves.states, ms, vs, strict=True):
            state["m"], state["v"] = m, v
        result = iter(new_parameters)
        return tree_map(lambda _: next(result), gradients)

    def _constants(self) -> tuple[tuple[float, float], float, float, bool]:
        # Arguments of the compiled update rather than attributes it reads, so that changing one takes effect.
        b1, b2 = self.betas
        return (b1, b2), self.eps, self.weight_decay, self.bias_correction

    def _update(
        self,
        paths: tuple[str, ...],
        gradients: list[mx.array],
        parameters: list[mx.array],
        ms: list[mx.array],
        vs: list[mx.array],
        step: mx.array,
        learning_rate: mx.array,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
    ) -> tuple[mx.array, list[mx.array], list[mx.array], list[mx.array]]:
        """The whole update as a function of arrays; runs once per trace, so it is also the place to check."""
        self.traces += 1
        step = step + 1
        c = rule.coefficients(step, learning_rate, betas, eps, weight_decay, bias_correction)
        updated = []
        for path, g, p, m, v in zip(paths, gradients, parameters, ms, vs, strict=True):
            _check_leaf(path, g, p, m)
            updated.append(rule.adam(p, g, m, v, c, betas))
        return step, *([leaf[i] for leaf in updated] for i in range(3))  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions can be neither copied nor pickled; a copy traces its own.
        return {**self.__dict__, "_compiled": {}}


class AdamW(Adam):
    """Adam with decoupled weight decay: the update of `Adam`, and ``- lr weight_decay p`` beside it.

    A drop-in for ``mlx.optimizers.AdamW``. Arguments as `Adam`, and:

    Args:
        weight_decay: the decay per unit of learning rate. Default 0.01.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.

    >>> optimizer = AdamW(learning_rate=0.1, weight_decay=0.5)
    >>> optimizer.apply_gradients({"weight": mx.array([0.0])}, {"weight": mx.array([1.0])})
    {'weight': array([0.95], dtype=float32)}
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
        *,
        moments: str = "float32",
    ) -> None:
        super().__init__(learning_rate, betas, eps, bias_correction, moments=moments)
        self.weight_decay = weight_decay


def _check_leaf(path: str, gradient: mx.array, parameter: mx.array, m: mx.array) -> None:
    for what, array in (("gradient", gradient), ("first moment", m)):
        if array.shape != parameter.shape:
            raise ValueError(
                f"the {what} of {path!r} has shape {array.shape}, but the parameter has {parameter.shape};"
                " they must be the same"
            )
    for what, array in (("gradient", gradient), ("parameter", parameter)):
        if array.dtype not in (mx.float32, mx.bfloat16, mx.float16):
            raise TypeError(
                f"the {what} {path!r} is {array.dtype}; Adam updates float32, bfloat16 and float16:"
                " convert it, or freeze the parameter"
            )


def _moments_to_float32(state: Any) -> None:
    children = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in children:
        if isinstance(value, (dict, list, tuple)):
            _moments_to_float32(value)
        elif key in ("m", "v") and isinstance(value, mx.array):
            state[key] = value.astype(mx.float32)
