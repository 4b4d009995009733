"""Adam and AdamW: what a user constructs in place of ``mlx.optimizers.Adam`` and ``AdamW``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from . import moments, residual, rule
from .groups import DecayFilter, Group, check_patterns, group
from .layout import Aligned, along

LearningRate = float | mx.array | Callable[[mx.array], mx.array]
_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


class Adam(optim.Adam):
    """Adam whose update of the whole parameter tree is one compiled graph, computed in float32.

    A drop-in for ``mlx.optimizers.Adam``, and an instance of it. Formulas, without and with bias correction::

        m <- b1 m + (1 - b1) g                  v <- b2 v + (1 - b2) g^2
        p <- p - lr m / (sqrt(v) + eps)
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)      (``bias_correction=True``, t from 1)

    Arithmetic is float32 for parameters of every dtype; parameters keep their dtype and shape. Called eagerly, the
    update is traced once for each set of paths, shapes and dtypes; a new learning rate, step or gradient value
    traces nothing. Inside a caller's ``mx.compile`` it becomes a part of the caller's graph.

    Args:
        learning_rate: a number, or a function of the step (0-d array, 0 at the first update) that returns one.
        betas: decay rates of the two moments, each in [0, 1). Default (0.9, 0.999).
        eps: added to the denominator, >= 0. Default 1e-8.
        bias_correction: divide the moments by ``1 - beta^t``. Default False, as in MLX.
        moments: how the moments are stored: "float32" (default, 8 bytes per parameter), "bfloat16" (4), "8bit"
            (2.06; leaves below 4096 elements stay float32) or "param", the parameter's dtype as in MLX.
            "bfloat16" and "8bit" round stochastically, with a key in ``state["rounding_key"]``.
        compensated: for bfloat16 and float16 parameters, keep what each weight loses to rounding in 2 more bytes
            (``residual`` beside the moments), so that weight and residual together follow the trajectory of a
            float32 master copy. Default True. No effect on float32 parameters.
        max_grad_norm: the gradients are scaled so that their global norm, computed in float32, is at most this.
            Default None: no clipping.
        skip_nonfinite: when the global norm is infinite or not a number, parameters, moments, residuals, rounding
            key and ``step`` keep their values bit for bit, and ``skipped`` goes up by one. Default False.
        learning_rate_multipliers: ``{pattern: factor}``: the learning rate of parameters whose path the regular
            expression matches (``re.search``) is multiplied by the factor. Default None.

    ``grad_norm`` and ``skipped`` are 0-d arrays: the global norm of the last update's gradients before clipping, and
    the number of updates skipped since the start. They cost a pass over the gradients, so they are kept with
    ``max_grad_norm`` or ``skip_nonfinite`` only, and are None otherwise.

    Raises:
        ValueError: an argument out of its range, naming it; a pattern that matches no parameter, or two that match
            the same (when the state is created).

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
        compensated: bool = True,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        learning_rate_multipliers: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(learning_rate, betas, eps, bias_correction)  # type: ignore[arg-type]
        self.learning_rate = self.state["learning_rate"]  # float32, whatever a schedule returns
        _check_options(moments, compensated, max_grad_norm, skip_nonfinite, learning_rate_multipliers)
        self.weight_decay = 0.0
        self._traces = 0
        self._moments = moments
        self._compensated = compensated
        self._max_grad_norm = max_grad_norm
        self._skip_nonfinite = skip_nonfinite
        self._multipliers = dict(learning_rate_multipliers or {})
        self._decay_filter: DecayFilter | None = None
        self._compiled: dict[tuple[str, ...], Callable[..., Any]] = {}
        self.state.update(self._scalars())

    @property
    def learning_rate(self) -> mx.array:
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        # Always float32: an int or a float64 would change the dtype of an input, and so trace anew.
        self.state["learning_rate"] = mx.array(learning_rate, mx.float32)

    @property
    def traces(self) -> int:
        """How often the Python of the update ran: once for each layout, or each time where nothing is compiled."""
        return self._traces

    @property
    def grad_norm(self) -> mx.array | None:
        return self.state.get("grad_norm")

    @property
    def skipped(self) -> mx.array | None:
        return self.state.get("skipped")

    # State: one dictionary for each parameter, beside a few scalars.

    def init(self, parameters: dict) -> None:
        """Creates the state that is missing. Moments that exist are kept, and stored as ``moments`` says."""
        leaves = list(along(parameters, parameters))
        check_patterns([path for path, _, _ in leaves], self._multipliers)
        super().init(parameters)
        for name, value in self._scalars().items():
            self.state.setdefault(name, value)
        for (path, container, key), (_, states, its_key) in zip(leaves, along(parameters, self.state), strict=True):
            self._group(path, container[key])  # raises for patterns that contradict each other
            self._complete(container[key], states[its_key])

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Fills ``state`` with moments that are zero, of the parameter's shape, and a residual if there is one."""
        state.update(moments.zeros(self._storage(parameter), parameter.shape))
        self._complete(parameter, state)

    def _complete(self, parameter: mx.array, state: dict) -> None:
        """Brings a parameter's state, which may be stock MLX's, to the form that this optimizer keeps."""
        kind = self._storage(parameter)
        if not moments.is_stored(state, kind):
            values = moments.decode(state)
            for name in ("m_scale", "v_scale"):
                state.pop(name, None)
            state.update(moments.encode(kind, *values))
        if self._compensated and residual.applies_to(parameter.dtype):
            state.setdefault("residual", residual.zeros(parameter.shape))
        else:
            state.pop("residual", None)

    def _storage(self, parameter: mx.array) -> str:
        if parameter.dtype not in _FLOATS:
            raise TypeError(
                f"a parameter is {parameter.dtype}; Adam updates float32, bfloat16 and float16:"
                " convert it, or freeze it"
            )
        return moments.storage(self._moments, parameter.shape, parameter.dtype)

    def _scalars(self) -> dict[str, mx.array]:
        """What the state has beside ``step`` and ``learning_rate``, at its start."""
        scalars = {}
        if self._moments in ("bfloat16", "8bit"):
            scalars["rounding_key"] = mx.random.key(0)
        if self._needs_norm():
            scalars |= {"grad_norm": mx.array(0.0), "skipped": mx.array(0, mx.int32)}
        return scalars

    def _needs_norm(self) -> bool:
        return self._skip_nonfinite or self._max_grad_norm is not None

    # The update.

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Updates one parameter with the present ``step`` and ``learning_rate``; ``state`` gets the new moments.

        Raises ValueError with options that need the other gradients or the parameter's path.
        """
        if self._needs_norm() or self._multipliers or self._decay_filter or "rounding_key" in self.state:
            raise ValueError(
                "apply_single sees one parameter without its path; with clipping, skip_nonfinite, stochastic rounding,"
                " multipliers or a decay_filter use apply_gradients"
            )
        betas, eps, bias_correction, weight_decay, _ = self._constants()
        c = rule.coefficients(self.step, self.learning_rate, betas, eps, bias_correction, weight_decay)
        parameter, new = self._update_leaf(gradient, parameter, state, None, c, betas, _new_value)
        state.update(new)
        return parameter

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The updated parameters, as a tree like ``gradients``, which may be a subset of ``parameters``.

        Raises ValueError or TypeError, naming the path, for a gradient that has no parameter or no state, is not
        an array, or differs from its parameter in shape; moments and step are as before then.
        """
        if not self._initialized:
            Aligned(gradients, parameters, self.state)  # raises before any state is made for a wrong tree
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))
        if type(self).apply_single is not Adam.apply_single:
            # MLX's way to extend an optimizer: a subclass that has its own update of one parameter gets it called.
            return super().apply_gradients(gradients, parameters)
        leaves = Aligned(gradients, parameters, self.state)
        if leaves.without_state:
            raise ValueError(
                f"the optimizer has no state for {', '.join(leaves.without_state)}: it was initialised without;"
                " call optimizer.init(parameters) with all parameters (moments that exist are kept)"
            )
        # Outside the compiled update, because a schedule may be any Python function of the step's value.
        scheduled = {name: mx.array(f(self.step), mx.float32) for name, f in self._schedulers.items()}
        update = self._compiled.get(leaves.paths)
        if update is None:
            groups = [self._group(*leaf) for leaf in zip(leaves.paths, leaves.parameters, strict=True)]
            update = mx.compile(partial(self._update, leaves.paths, groups))
            self._compiled[leaves.paths] = update
        names = ("step", "learning_rate", *self._scalars())
        scalars = {name: self.state[name] for name in names if name not in scheduled} | scheduled
        new_parameters, states, scalars = update(
            leaves.gradients, leaves.parameters, leaves.states, scalars, self._constants()
        )
        self.state.update(scalars)
        for state, new in zip(leaves.states, states, strict=True):
            state.update(new)
        result = iter(new_parameters)
        return tree_map(lambda _: next(result), gradients)

    def _constants(self) -> tuple[tuple[float, float], float, bool, float, float | None]:
        # Arguments of the compiled update rather than attributes it reads, so that changing one takes effect.
        b1, b2 = map(float, self.betas)
        return (b1, b2), float(self.eps), bool(self.bias_correction), float(self.weight_decay), self._max_grad_norm

    def _group(self, path: str, parameter: mx.array) -> Group:
        return group(path, parameter, self._decay_filter, self._multipliers)

    def _update(
        self,
        paths: tuple[str, ...],
        groups: list[Group],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[dict[str, mx.array]],
        scalars: dict[str, mx.array],
        constants: tuple[tuple[float, float], float, bool, float, float | None],
    ) -> tuple[list[mx.array], list[dict[str, mx.array]], dict[str, mx.array]]:
        """The whole update as a function of arrays; runs once per trace, so it is also the place to check."""
        self._traces += 1
        betas, eps, bias_correction, weight_decay, max_grad_norm = constants
        new: dict[str, mx.array] = {**scalars, "step": scalars["step"] + 1}
        clip = finite = None
        if self._needs_norm():
            new["grad_norm"] = norm = rule.global_norm(gradients)
            clip = None if max_grad_norm is None else rule.clip_factor(norm, max_grad_norm)
            finite = rule.unfused(mx.isfinite(norm)) if self._skip_nonfinite else None
        bits: list[mx.array | None] = [None] * len(parameters)
        if "rounding_key" in scalars:
            new["rounding_key"], *keys = mx.random.split(scalars["rounding_key"], len(parameters) + 1)
            bits = [moments.random_bits(key, p.shape) for key, p in zip(keys, parameters, strict=True)]
        coefficients = {
            each: rule.coefficients(
                new["step"],
                new["learning_rate"] * each.learning_rate_multiplier,
                betas,
                eps,
                bias_correction,
                weight_decay if each.decays else 0.0,
                clip,
            )
            for each in dict.fromkeys(groups)
        }

        # Selected, not multiplied by zero: 0 * inf is not a number.
        keep: residual.Keep = _new_value if finite is None else partial(mx.where, finite)
        new_parameters, new_states = [], []
        for path, its_group, g, p, state, its_bits in zip(
            paths, groups, gradients, parameters, states, bits, strict=True
        ):
            self._check_leaf(path, g, p, state)
            new_p, new_state = self._update_leaf(g, p, state, its_bits, coefficients[its_group], betas, keep)
            new_parameters.append(new_p)
            new_states.append(new_state)
        if finite is not None:
            new["skipped"] = scalars["skipped"] + mx.logical_not(finite)
        for name in ("step", "rounding_key"):
            if name in new:
                new[name] = keep(new[name], scalars[name])
        return new_parameters, new_states, new

    def _update_leaf(
        self,
        gradient: mx.array,
        parameter: mx.array,
        state: dict[str, mx.array],
        bits: mx.array | None,
        c: rule.Coefficients,
        betas: tuple[float, float],
        keep: residual.Keep,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Decode, update, encode: the new parameter and its new state, or the old ones where ``keep`` says so.

        MLX fuses a value into a kernel only if all that uses it is in that kernel or is an output. So what is
        selected is selected first, and everything after it uses the selected value.
        """
        kind = self._storage(parameter)
        old_m, old_v = moments.decode(state)
        m, v = rule.next_moments(gradient, old_m, old_v, c, betas)
        if kind == "float32":
            m, v = keep(m, old_m), keep(v, old_v)
            new = {"m": m, "v": v}
        else:
            new = {name: keep(array, state[name]) for name, array in moments.encode(kind, m, v, bits).items()}
        if "residual" not in state:
            coarse = parameter.dtype != mx.float32
            value = rule.next_weight(parameter.astype(mx.float32), m, v, c, coarse)
            return keep(value.astype(parameter.dtype), parameter), new
        # Two kernels: in one, MLX would cut where its eleven levels happen to end.
        value = rule.unfused(rule.next_weight(residual.join(parameter, state["residual"]), m, v, c))
        weight, new["residual"] = residual.split(value, parameter, state["residual"], keep)
        return weight, new

    def _check_leaf(self, path: str, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> None:
        for what, array in (("gradient", gradient), ("first moment", state["m"])):
            if array.shape != parameter.shape:
                raise ValueError(
                    f"the {what} of {path!r} has shape {array.shape}, but the parameter has {parameter.shape};"
                    " they must be the same"
                )
        if gradient.dtype not in _FLOATS:
            raise TypeError(f"the gradient of {path!r} is {gradient.dtype}; it must be float32, bfloat16 or float16")
        needs_residual = self._compensated and residual.applies_to(parameter.dtype)
        if needs_residual != ("residual" in state) or not moments.is_stored(state, self._storage(parameter)):
            raise ValueError(
                f"the state of {path!r} was made for another dtype or other options;"
                " call optimizer.init(parameters), which converts it"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions can be neither copied nor pickled; a copy traces its own.
        return {**self.__dict__, "_compiled": {}}


class AdamW(Adam):
    """Adam with decoupled weight decay: the update of `Adam`, and ``- lr weight_decay p`` beside it.

    A drop-in for ``mlx.optimizers.AdamW``. Arguments as `Adam`, and:

    Args:
        weight_decay: the decay per unit of learning rate, >= 0. Default 0.01.
        decay_filter: ``decay_filter(path, parameter)`` says whether a parameter decays; it is asked once for each.
            Default None: all do. `compiled_adam.decay_matrices` leaves out biases, norms and embeddings.

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
        decay_filter: DecayFilter | None = None,
        moments: str = "float32",
        compensated: bool = True,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        learning_rate_multipliers: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            learning_rate,
            betas,
            eps,
            bias_correction,
            moments=moments,
            compensated=compensated,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            learning_rate_multipliers=learning_rate_multipliers,
        )
        if decay_filter is not None and not callable(decay_filter):
            raise ValueError(f"decay_filter is {decay_filter!r}; it must be a function of (path, parameter), or None")
        self.weight_decay = weight_decay
        self._decay_filter = decay_filter


def _new_value(new: mx.array, old: mx.array) -> mx.array:
    return new


def _check_options(
    policy: str,
    compensated: bool,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    multipliers: Mapping[str, float] | None,
) -> None:
    if policy not in moments.POLICIES:
        raise ValueError(f"moments is {policy!r}; it must be one of {', '.join(map(repr, moments.POLICIES))}")
    for name, flag in (("compensated", compensated), ("skip_nonfinite", skip_nonfinite)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is {flag!r}; it must be True or False")
    if max_grad_norm is not None and not _is_number(max_grad_norm, 0.0, exclusive=True):
        raise ValueError(f"max_grad_norm is {max_grad_norm!r}; it must be a number greater than 0, or None")
    if multipliers is not None and not isinstance(multipliers, Mapping):
        raise ValueError(f"learning_rate_multipliers is {multipliers!r}; it must be a mapping of patterns to factors")
    for pattern, factor in (multipliers or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"learning_rate_multipliers has the pattern {pattern!r}: {error}") from None
        if not _is_number(factor, 0.0):
            raise ValueError(f"learning_rate_multipliers[{pattern!r}] is {factor!r}; it must be a number of at least 0")


def _is_number(value: object, least: float, exclusive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value < math.inf and not (exclusive and value == least)
