"""The whole update as one function of arrays: norm, clipping, guard, coefficients, and every leaf."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from ..base import InputError
from . import kernels, moments, residual, rule
from .groups import Group
from .moments import Stored
from .residual import Keep
from .window import counted

FLOATS = (mx.float32, mx.bfloat16, mx.float16)


class Form(NamedTuple):
    """How one parameter's state is stored."""

    moments: str  # "float32", "bfloat16", "float16" or "8bit"
    stochastic: bool  # whether the moments are rounded at random
    compensated: bool  # whether the weight has a residual

    @classmethod
    def of(cls, parameter: mx.array, policy: str, compensated: bool) -> Form:
        kind = moments.storage(policy, parameter.shape, parameter.dtype)
        return cls(kind, policy in moments.STOCHASTIC, compensated and residual.applies_to(parameter.dtype))

    @property
    def names(self) -> tuple[str, ...]:
        """What a parameter's state has."""
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
        """A parameter's state, which may be stock MLX's or another policy's, in this form.

        Raises KeyError for moments that are incomplete, ValueError with the ``path`` for those of another shape. A
        residual of another dtype's weight is dropped.
        """
        for name in ("m", "v"):
            if state[name].shape != parameter.shape:
                raise InputError(
                    f"{path!r} has shape {parameter.shape}, but its moments in the optimizer's state have"
                    f" {state[name].shape}: give the parameter its old shape, or make a new optimizer"
                )
        if self.fits(parameter, state):
            return state  # the same dictionary: a new one would make every train step with this optimizer trace anew
        if moments.is_stored(state, self.moments, parameter.shape):
            new = {name: array for name, array in state.items() if name != "residual"}
        else:
            new = moments.encode(self.moments, *moments.decode(state))
        if self.compensated:
            new["residual"] = state["residual"] if self._residual_fits(parameter, state) else residual.zeros(parameter)
        return new


class Constants(NamedTuple):
    """The numbers and switches that a trace contains."""

    betas: tuple[float, float]
    eps: float
    bias_correction: bool
    weight_decay: float
    max_grad_norm: float | None
    skip_nonfinite: bool
    lowering: str

    def coefficients(
        self,
        step: mx.array,
        learning_rate: mx.array,
        group: Group,
        clip: mx.array | None = None,
        counts: mx.array | None = None,
    ) -> rule.Coefficients:
        return rule.coefficients(
            step,
            learning_rate * group.learning_rate_multiplier,
            self.betas,
            self.eps,
            self.bias_correction,
            self.weight_decay if group.decays else 0.0,
            clip,
            counts,
        )


class Part(NamedTuple):
    """What an update of some parameters must know of all of them, whose other updates are made elsewhere."""

    norm: mx.array  # the global norm
    places: tuple[int, ...]  # where these stand among all
    total: int  # how many there are


class _Scalars(NamedTuple):
    """What all leaves of a stream read."""

    coefficients: dict[Group, rule.Coefficients]
    finite: mx.array | None  # with the guard: whether the new values count

    @property
    def keep(self) -> Keep:
        # Selected, not multiplied by zero: 0 * inf is not a number.
        return residual.new_value if self.finite is None else partial(mx.where, self.finite)

    def copied(self) -> _Scalars:
        """The same on the current stream: what reads an array of another stream waits for it, each time again."""
        copies = {
            group: rule.Coefficients._make(None if x is None else rule.unfused(x) for x in c)
            for group, c in self.coefficients.items()
        }
        return _Scalars(copies, None if self.finite is None else rule.unfused(self.finite))


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
) -> tuple[list[mx.array], list[Stored], Stored]:
    """The new parameters, states and scalars, all in the order and form of the old.

    ``scalars`` has ``step``, ``learning_rate`` (already that of this step), ``rounding_key`` for stochastic rounding,
    and ``grad_norm`` and ``skipped`` with clipping or the guard. With ``part`` the new parameters, states and scalars
    are those that an update of all would have made. If the ``weight`` is 0, the gradients count as 0.
    """
    lowerings = kernels.of_leaves(constants.lowering, [p.size for p in parameters])
    new = {**scalars, "step": scalars["step"] + 1}
    clip = finite = None
    counts = None if weight is None else weight > 0
    if "grad_norm" in scalars:
        streams = [how.stream for how in lowerings]
        norm = rule.global_norm(gradients, streams) if part is None else part.norm
        new["grad_norm"] = norm = norm if weight is None else counted(norm, weight)
        clip = None if constants.max_grad_norm is None else rule.clip_factor(norm, constants.max_grad_norm)
        if constants.skip_nonfinite:
            rate = new["learning_rate"]  # of a schedule, which may return anything
            finite = rule.unfused(mx.isfinite(norm) & mx.isfinite(rate) & (rate >= 0))
    keys: list[mx.array | None] = [None] * len(parameters)
    if "rounding_key" in scalars:
        places, total = (range(len(parameters)), len(parameters)) if part is None else (part.places, part.total)
        new["rounding_key"], *every = mx.random.split(scalars["rounding_key"], total + 1)
        keys = [every[i] for i in places]
    coefficients = {
        group: constants.coefficients(new["step"], new["learning_rate"], group, clip, counts)
        for group in dict.fromkeys(groups)
    }

    updated = []
    # MLX merges a constant that is broadcast to the same shape twice, on different streams too. A kernel cannot take in
    # what belongs to another stream: it would read the constant as a strided array, wait for it, and be twice as slow.
    # So on the second stream shapes have axes of one in front, more than there are on the default stream.
    ones = 1 + max((moments.leading_ones(p.shape) for p in parameters), default=0)
    here = {False: _Scalars(coefficients, finite)}  # by whether they are on the second stream
    leaves = zip(gradients, parameters, states, forms, groups, keys, strict=True)
    for (g, p, state, form, group, key), how in zip(leaves, lowerings, strict=True):
        with mx.stream(how.stream):
            if how.second not in here:
                here[how.second] = here[False].copied()
            its = here[how.second]
            front = (1,) * ones if how.second else ()
            parameter, stored = update_leaf(
                g.reshape((*front, *g.shape)),
                p.reshape((*front, *p.shape)),
                {name: array.reshape((*front, *array.shape)) for name, array in state.items()},
                form,
                its.coefficients[group],
                constants.betas,
                None if key is None else moments.random_bits(key, (*front, *p.shape)),
                its.keep,
                how.inplace,
                how.heron,
            )
            stored = {name: array.reshape(state[name].shape) for name, array in stored.items()}
            updated.append((parameter.reshape(p.shape), stored))
    if finite is not None:
        new["skipped"] = scalars["skipped"] + mx.logical_not(finite)
    for name in ("step", "rounding_key"):
        if name in new:
            new[name] = here[False].keep(new[name], scalars[name])
    return [p for p, _ in updated], [state for _, state in updated], new


def update_leaf(
    gradient: mx.array,
    parameter: mx.array,
    state: Stored,
    form: Form,
    c: rule.Coefficients,
    betas: tuple[float, float],
    bits: mx.array | None = None,
    keep: Keep = residual.new_value,
    inplace: bool = False,
    heron: bool = False,
) -> tuple[mx.array, Stored]:
    """Decode, update, encode: a new parameter and its new state, or the old ones where ``keep`` says so.

    ``inplace``: each array in a kernel of its own, where the moments are float32; and with ``heron`` one more for the
    guess of the square root.

    MLX fuses a value into a kernel only if all that uses it is in that kernel or is an output. So what is selected is
    selected first, and everything after it uses the selected value.
    """
    if c.counts is not None and c.clip is not None and form.compensated and not inplace:
        # With these there is one level more than MLX fuses: a kernel of its own, or it would make four.
        gradient = rule.unfused(counted(gradient, c.counts))
        c = c._replace(counts=None)
    old_m, old_v = moments.decode(state)
    m, v = rule.next_moments(gradient, old_m, old_v, c, betas)
    guess = None
    if form.moments == "float32":
        m, v = keep(m, old_m), keep(v, old_v)
        if inplace:
            # From another node of the graph: of the same one MLX would cast and clip the gradient once, in a kernel of
            # its own, and write it out for both to read.
            _, v = rule.next_moments(rule.unfused(gradient), old_m, old_v, c, betas)
            m, v = rule.unfused(m), rule.unfused(keep(v, old_v))
            guess = rule.root_guess(v) if heron else None
        new = {"m": m, "v": v}
    else:
        stored = moments.encode(form.moments, m, v, bits if form.stochastic else None)
        new = {name: keep(array, state[name]) for name, array in stored.items()}
    if not form.compensated:
        coarse = parameter.dtype != mx.float32
        value = rule.next_weight(parameter.astype(mx.float32), m, v, c, coarse, guess)
        return keep(value.astype(parameter.dtype), parameter), new
    # Kernels of their own: in one, MLX would cut where its eleven levels happen to end.
    join = residual.join if inplace else residual.fusable_join
    value = rule.unfused(rule.next_weight(join(parameter, state["residual"]), m, v, c, guess=guess))
    weight, new["residual"] = residual.split(value, parameter, state["residual"], keep, inplace)
    return weight, new


def check_leaf(path: str, gradient: mx.array, parameter: mx.array, state: Stored, form: Form) -> None:
    """Raises an error that names ``path`` for a gradient or a state that does not belong to the parameter."""
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
