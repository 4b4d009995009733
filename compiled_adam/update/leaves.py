"""The whole update as one function of arrays: norm, clipping, guard, coefficients, and every leaf.

A leaf is one parameter array. The guard is the check of ``skip_nonfinite``, which decides whether an update is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from ..base import InputError
from . import moments, residual, rule
from .groups import Group
from .kernels import Runner, in_place, of_leaves, square_root, unfused
from .moments import Stored
from .norm import clip_factor, global_norm, norm_of, sum_of_squares
from .residual import Keep
from .window import counted

FLOATS = (mx.float32, mx.bfloat16, mx.float16)


class Form(NamedTuple):
    """How the state of one parameter is stored."""

    moments: str  # "float32", "bfloat16", "float16" or "8bit"
    stochastic: bool  # whether the moments are rounded at random
    compensated: bool  # whether the weight has a residual, which stores the rounding error

    @classmethod
    def of(cls, parameter: mx.array, policy: str, compensated: bool) -> Form:
        kind = moments.storage(policy, parameter.shape, parameter.dtype)
        return cls(kind, policy in moments.STOCHASTIC, compensated and residual.applies_to(parameter.dtype))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays in the state of a parameter."""
        scales = ("m_scale", "v_scale") if self.moments == "8bit" else ()
        return ("m", "v", *scales, *(("residual",) if self.compensated else ()))

    def zeros(self, parameter: mx.array) -> Stored:
        state = moments.zeros(self.moments, parameter.shape)
        return {**state, "residual": residual.zeros(parameter)} if self.compensated else state

    def fits(self, parameter: mx.array, state: Stored) -> bool:
        return moments.is_stored(state, self.moments, parameter.shape) and self._residual_fits(parameter, state)

    def _residual_fits(self, parameter: mx.array, state: Stored) -> bool:
        if not self.compensated:
            return "residual" not in state
        found = state.get("residual")
        return found is not None and found.shape == parameter.shape and residual.belongs_to(parameter.dtype, found)

    def converted(self, path: str, parameter: mx.array, state: Stored) -> Stored:
        """The state of a parameter, converted to this form from stock MLX's Adam or from other options.

        Raises KeyError if a moment is missing, ValueError with the ``path`` if a moment has another shape. A residual
        that belongs to a weight of another dtype is dropped.
        """
        for name in ("m", "v"):
            if state[name].shape != parameter.shape:
                raise InputError(
                    f"{path!r} has shape {parameter.shape}, but its moments in the optimizer's state have"
                    f" {state[name].shape}: give the parameter its old shape, or make a new optimizer"
                )
        if self.fits(parameter, state):
            return state  # the same dictionary: a new one would make every train step of this optimizer trace again
        if moments.is_stored(state, self.moments, parameter.shape):
            new = {name: array for name, array in state.items() if name != "residual"}
        else:
            new = moments.encode(self.moments, *moments.decode(state))
        if self.compensated:
            new["residual"] = state["residual"] if self._residual_fits(parameter, state) else residual.zeros(parameter)
        return new


class Constants(NamedTuple):
    """The numbers and switches that a trace (a recorded graph) contains as constants."""

    betas: tuple[float, float]
    eps: float
    bias_correction: bool
    weight_decay: float
    max_grad_norm: float | None
    skip_nonfinite: bool
    lowering: str

    def of(self, group: Group) -> Constants:
        """The constants of a group: the numbers of its own in place of the optimizer's."""
        own = {name: getattr(group, name) for name in ("betas", "eps", "weight_decay")}
        return self._replace(**{name: number for name, number in own.items() if number is not None})

    def coefficients(
        self,
        step: mx.array,
        learning_rate: mx.array,
        group: Group,
        clip: mx.array | None = None,
        counts: mx.array | None = None,
    ) -> rule.Coefficients:
        its, rate = self.of(group), learning_rate * group.learning_rate
        return _separate(
            rule.coefficients(step, rate, its.betas, its.eps, its.bias_correction, its.weight_decay, clip, counts)
        )


class Part(NamedTuple):
    """Facts about all parameters, for the update of one part. Other workers update the other parts."""

    norm: mx.array  # the global norm of all gradients
    places: tuple[int, ...]  # the indices of this part among all parameters
    total: int  # the number of all parameters


class Shared(NamedTuple):
    """The values that the update of every leaf reads."""

    coefficients: Mapping[Group, rule.Coefficients]
    finite: mx.array | None = None  # with the guard: whether the update is made

    @property
    def keep(self) -> Keep:
        # A selection and not a product with zero, because 0 * inf is not a number.
        return residual.new_value if self.finite is None else partial(mx.where, self.finite)

    def copy(self) -> Shared:
        copies = {group: _separate(c) for group, c in self.coefficients.items()}
        return Shared(copies, None if self.finite is None else unfused(self.finite))


LeafRule = Callable[[Shared, mx.array, mx.array, Stored], tuple[mx.array, Stored]]


def update(
    gradients: Sequence[mx.array],
    parameters: Sequence[mx.array],
    states: Sequence[Stored],
    scalars: Stored,
    groups: Sequence[Group],
    forms: Sequence[Form],
    constants: Constants,
    part: Part | None = None,
    weight: mx.array | None = None,
    measured: bool = False,
) -> tuple[list[mx.array], list[Stored], Stored]:
    """Returns new parameters, states and scalars, all in the order and form of the old.

    ``scalars`` has ``step``, ``learning_rate`` (already the value for this step), ``rounding_key`` with stochastic
    rounding, and ``grad_norm`` and ``skipped`` with clipping or the guard. With ``part`` the results are the same as
    from an update of all parameters at once. If the ``weight`` is 0, the gradients count as 0. ``measured``: the new
    scalars have the norm of the gradients as ``grad_norm``, whether or not the old have it.
    """
    lowerings = of_leaves(constants.lowering, [p.size for p in parameters])
    new = {**scalars, "step": scalars["step"] + 1}
    clip = finite = None
    if "grad_norm" in scalars:
        norm = global_norm(gradients, [how.stream for how in lowerings]) if part is None else part.norm
        new["grad_norm"] = norm = norm if weight is None else counted(norm, weight)
        clip = None if constants.max_grad_norm is None else clip_factor(norm, constants.max_grad_norm)
        finite = guard(norm, [new["learning_rate"]]) if constants.skip_nonfinite else None
    keys, new = _rounding_keys(len(parameters), new, part)
    counts = None if weight is None else weight > 0
    step, rate = new["step"], new["learning_rate"]
    coefficients = {group: constants.coefficients(step, rate, group, clip, counts) for group in dict.fromkeys(groups)}

    shared = Shared(coefficients, finite)
    runner = Runner(shared, Shared.copy, parameters)
    squares: list[mx.array] = []
    updated = []
    leaves = zip(gradients, parameters, states, forms, groups, keys, lowerings, strict=True)
    for gradient, parameter, state, form, group, key, how in leaves:
        betas = constants.of(group).betas
        leaf: LeafRule = partial(
            update_leaf, form=form, group=group, betas=betas, key=key, inplace=how.inplace, heron=how.heron
        )
        if measured and "grad_norm" not in new:
            leaf = _after_its_square(leaf, squares)
        updated.append(runner.run(how, leaf, gradient, parameter, state))
    if squares:
        new["grad_norm"] = norm_of(squares) if weight is None else counted(norm_of(squares), weight)
    if finite is not None:
        new["skipped"] = scalars["skipped"] + mx.logical_not(finite)
    for name in ("step", "rounding_key"):
        if name in new:
            new[name] = shared.keep(new[name], scalars[name])
    return [p for p, _ in updated], [state for _, state in updated], new


def _after_its_square(leaf: LeafRule, squares: list[mx.array]) -> LeafRule:
    """``leaf`` that first adds the sum of the squares of its gradient to ``squares``."""

    def run(shared: Shared, gradient: mx.array, parameter: mx.array, state: Stored) -> tuple[mx.array, Stored]:
        squares.append(sum_of_squares(gradient))
        # Read right before the update, or all gradients would stay in memory until the last was updated.
        (gradient,) = mx.depends([gradient], [squares[-1]])
        return leaf(shared, gradient, parameter, state)

    return run


def guard(norm: mx.array, learning_rates: Sequence[mx.array]) -> mx.array:
    """Whether the update may be made. Learning rates are checked, because a schedule may return any number."""
    good = mx.isfinite(norm)
    for rate in learning_rates:
        good = good & mx.isfinite(rate) & (rate >= 0)
    return unfused(good)


def _rounding_keys(count: int, scalars: Stored, part: Part | None) -> tuple[Sequence[mx.array | None], Stored]:
    """``count`` random keys (None without stochastic rounding), and ``scalars`` with the next rounding key."""
    if "rounding_key" not in scalars:
        return [None] * count, scalars
    places, total = (range(count), count) if part is None else (part.places, part.total)
    following, *keys = mx.random.split(scalars["rounding_key"], total + 1)
    return [keys[i] for i in places], {**scalars, "rounding_key": following}


def update_leaf(
    shared: Shared,
    gradient: mx.array,
    parameter: mx.array,
    state: Stored,
    *,
    form: Form,
    group: Group,
    betas: tuple[float, float],
    key: mx.array | None = None,
    inplace: bool = False,
    heron: bool = False,
) -> tuple[mx.array, Stored]:
    """Decodes the state, updates, and encodes: a new parameter and state, or the old ones if the guard skips.

    MLX fuses a value into a kernel only if every use of the value is in that kernel or is an output. So the guard
    selects between old and new moments first, and all later operations use the selected values.
    """
    c, keep = shared.coefficients[group], shared.keep
    if c.counts is not None and c.clip is not None and form.compensated and not inplace:
        # With all three, the graph has one level more than MLX fuses. Without this extra kernel MLX would make four.
        gradient = unfused(counted(gradient, c.counts))
        c = c._replace(counts=None)
    old_m, old_v = moments.decode(state)
    if form.moments == "float32":

        def next_moments(gradient: mx.array) -> tuple[mx.array, mx.array]:
            m, v = rule.next_moments(gradient, old_m, old_v, c, betas)
            return keep(m, old_m), keep(v, old_v)

        m, v = in_place(next_moments, gradient) if inplace else next_moments(gradient)
        new = {"m": m, "v": v}
    else:
        m, v = rule.next_moments(gradient, old_m, old_v, c, betas)
        bits = None if key is None or not form.stochastic else moments.random_bits(key, parameter.shape)
        new = {name: keep(array, state[name]) for name, array in moments.encode(form.moments, m, v, bits).items()}
    root = square_root(v, heron)
    if not form.compensated:
        coarse = parameter.dtype != mx.float32
        value = rule.next_weight(parameter.astype(mx.float32), m, root, c, coarse)
        return keep(value.astype(parameter.dtype), parameter), new
    # Two separate kernels: one would be too deep, and MLX would cut it wherever the limit of eleven levels is reached.
    join = residual.join if inplace else residual.fusable_join
    value = unfused(rule.next_weight(join(parameter, state["residual"]), m, root, c))
    weight, new["residual"] = residual.split(value, parameter, state["residual"], keep, inplace)
    return weight, new


def _separate(c: rule.Coefficients) -> rule.Coefficients:
    """The same coefficients, computed in separate kernels. If fused, MLX would compute them once per element."""
    return rule.Coefficients._make(None if x is None else unfused(x) for x in c)


def check_leaf(path: str, gradient: mx.array, parameter: mx.array, state: Stored, form: Form) -> None:
    """Raises an error that names ``path`` if the gradient or the state does not fit the parameter."""
    for what, array in (("gradient", gradient), ("first moment", state["m"])):
        if array.shape != parameter.shape:
            raise InputError(
                f"the {what} of {path!r} has shape {array.shape}, but the parameter has {parameter.shape};"
                " they must be the same: give the parameter its old shape, or make a new optimizer"
            )
    if gradient.dtype not in FLOATS:
        raise TypeError(f"the gradient of {path!r} is {gradient.dtype}; it must be float32, bfloat16 or float16")
    if not form.fits(parameter, state):
        raise InputError(
            f"the state of {path!r} was made for another dtype or other options;"
            " call optimizer.init(parameters), which converts it"
        )
