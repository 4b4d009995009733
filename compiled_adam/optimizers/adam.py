"""Adam: what a user constructs in place of ``mlx.optimizers.Adam``; and what `adamw.AdamW` shares with it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import Aligned, Assignments, Compiled, InputError, along
from ..update import (
    ALL_ALIKE,
    FLOATS,
    STOCHASTIC,
    Constants,
    DecayFilter,
    Form,
    Group,
    Part,
    Stored,
    check_leaf,
    check_patterns,
    group,
    of_leaves,
    update,
    update_leaf,
)
from .options import as_scalar, assigned_rate, check_numbers, check_options, scheduled
from .options import learning_rate as checked_rate

MOST_SUBSETS = 16  # of the parameters, whose compiled updates are kept
MOST_TRACES = 64  # of each of them
_SCALARS = ("rounding_key", "grad_norm", "skipped")  # what the state may have beside step and learning_rate
LearningRate = float | mx.array | Callable[[mx.array], mx.array]


class Keeper(Protocol):
    """Keeps a part of an optimizer's state elsewhere."""

    def show(self) -> None:
        """Puts it into the state's tree."""


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
        learning_rate: a number of at least 0, or a function of the step (0-d array, 0 at the first update) that
            returns one. A compiled step traces the function: write ``mx.where``, ``mx.minimum`` and ``mx.cos`` in it
            instead of ``if``, ``min`` and ``math.cos``.
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
        skip_nonfinite: skip an update if the global norm of the gradients is NaN or infinite (gradients beyond 1e19
            have an infinite norm), or the learning rate of a schedule is NaN, infinite or negative. Parameters,
            moments, residuals, rounding key and ``step`` then keep their values bit for bit, and ``skipped`` goes up by
            one. Without this option such updates are made: weights become NaN, or move uphill. Default False.
        learning_rate_multipliers: ``{pattern: factor}``: the learning rate of parameters whose path the regular
            expression matches (``re.search``) is multiplied by the factor. Default None.
        lowering: how the update becomes kernels: "fused", one for each parameter, fewest bytes; "inplace", one for
            each array, which needs no memory of its own (float32 moments; others stay fused); "auto" (default) takes
            what was measured to be faster on the device. Results differ by rounding, in a step by 3e-7 of it.

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
        lowering: str = "auto",
    ) -> None:
        learning_rate = checked_rate(learning_rate)
        check_numbers(betas, eps, bias_correction)
        self._keeper: Keeper | None = None
        self._places = {"step": "step", "learning_rate": "learning_rate"}  # of scalars in the state
        super().__init__(learning_rate, betas, eps, bias_correction)  # type: ignore[arg-type]  # MLX says list
        self._state["learning_rate"] = mx.array(self._state["learning_rate"], mx.float32)  # whatever a schedule returns
        check_options(moments, compensated, max_grad_norm, skip_nonfinite, learning_rate_multipliers, lowering)
        self.weight_decay = 0.0
        self._traces = 0
        self._moments = moments
        self._compensated = compensated
        self._max_grad_norm = max_grad_norm
        self._skip_nonfinite = skip_nonfinite
        self._lowering = lowering
        self._multipliers = dict(learning_rate_multipliers or {})
        self._decay_filter: DecayFilter | None = None
        self._groups: dict[str, Group] = {}
        self._compiled: OrderedDict[tuple[str, ...], Compiled] = OrderedDict()
        self._places |= {name: name for name in self._scalars()}
        self.state.update(self._scalars())
        _evaluate(self._state)

    @property
    def state(self) -> dict[str, Any]:
        """The step, the learning rate, counters, and a dictionary of arrays for each parameter, as a tree.

        A train step keeps the moments of small parameters elsewhere; asking for the state is what puts them here.
        """
        if self._keeper is not None:
            self._keeper.show()
            self._keeper = None  # after that, which may be interrupted
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if self._keeper is not None:
            self._keeper.show()  # what is assigned may be the same, or have dictionaries of it
        # In an order that does no harm if it is interrupted: a complete state is only looked through once more.
        self._initialized = False
        self._state = state
        self._keeper = None

    @property
    def step(self) -> mx.array:
        return self.scalars()["step"]

    @property
    def learning_rate(self) -> mx.array:
        return self.scalars()["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self._state["learning_rate"] = assigned_rate(learning_rate)
        _evaluate(self._state["learning_rate"])

    @property
    def traces(self) -> int:
        """How often the Python of the update ran: once for each layout, or each time where nothing is compiled."""
        return self._traces

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options beside MLX's own, by name; ``decays`` has a digest of which parameters do."""
        decaying = sorted(path for path, group in self._groups.items() if group.decays)
        return {
            "moments": self._moments,
            "compensated": self._compensated,
            "max_grad_norm": self._max_grad_norm,
            "skip_nonfinite": self._skip_nonfinite,
            "learning_rate_multipliers": self._multipliers,
            "decays": f"{len(decaying)} parameters, {hashlib.sha256(repr(decaying).encode()).hexdigest()[:8]}",
        }

    @property
    def grad_norm(self) -> mx.array | None:
        return self._state[self._places["grad_norm"]] if self._needs_norm() else None

    @property
    def skipped(self) -> mx.array | None:
        return self._state[self._places["skipped"]] if self._needs_norm() else None

    def scalars(self) -> Stored:
        """The part of the state that belongs to no parameter: 0-d arrays, and the rounding key.

        A Python number that was assigned to the step or to the learning rate becomes an array, here and in the state.
        """
        state = self._state
        if not isinstance(state["step"], mx.array):
            state["step"] = as_scalar("step", state["step"], mx.uint64)
        if not isinstance(rate := state.get("learning_rate"), (mx.array, type(None))):
            state["learning_rate"] = assigned_rate(rate)
        return {name: state[place] for name, place in self._places.items() if place in state}

    def assign_scalars(self, scalars: Stored, assignments: Assignments) -> None:
        """New `scalars`, as a part of ``assignments``."""
        for name, array in scalars.items():
            assignments.add(self._state, self._places[name], array)

    # State: one dictionary for each parameter, beside a few scalars.

    def init(self, parameters: dict) -> None:
        """Creates the state that is missing. Moments that exist are kept, and stored as ``moments`` says.

        Raises TypeError or ValueError for parameters that Adam cannot update, for an incomplete state, and for
        patterns that match no parameter or the same one.
        """
        self._init(parameters, parameters)

    def init_part(self, part: dict, parameters: dict) -> None:
        """`init` of the state of a ``part`` of the parameters alone, whose others are updated elsewhere."""
        for path, container, key in along(parameters, parameters):
            self._group(path, container[key])  # `options` are those of all
        self._init(part, parameters, parameters)

    def lay_out(self, parameters: dict) -> None:
        """`init` that computes nothing: the state has its shapes and dtypes, and takes no memory."""
        self._create(parameters, parameters)

    def _init(self, parameters: dict, all_parameters: dict, trainable: dict | None = None) -> None:
        self._create(parameters, all_parameters, trainable)
        _evaluate(self._state)

    def _create(self, parameters: dict, all_parameters: dict, trainable: dict | None = None) -> None:
        """Creates the state of ``parameters``, a part of those that are ``trainable``. Default: all of them."""
        trainable = parameters if trainable is None else trainable
        check_patterns([path for path, _, _ in along(all_parameters, all_parameters)], self._multipliers)
        leaves = [(path, container[key]) for path, container, key in along(parameters, parameters)]
        for path, parameter in leaves:
            if parameter.dtype not in FLOATS:
                raise TypeError(
                    f"the parameter {path!r} is {parameter.dtype}; Adam updates float32, bfloat16 and float16:"
                    " convert it, freeze it, or pass model.trainable_parameters()"
                )
            self._group(path, parameter)
        for name in ("step", *(() if self._schedulers else ("learning_rate",))):
            if name in trainable:
                raise InputError(
                    f"the model has parameters named {name!r}, a name that the optimizer's state needs; rename the"
                    " parameters"
                )
            if name not in self.state:
                raise InputError(f"the optimizer's state has no {name!r}; assign a complete one")
        self.state.setdefault("learning_rate", mx.array(0.0))  # of a schedule, which overwrites it
        self._make_room_for_scalars(trainable)
        super().init(parameters)
        assignments = Assignments()
        for (path, parameter), (_, states, key) in zip(leaves, along(parameters, self.state), strict=True):
            try:
                converted = self._form(parameter).converted(path, parameter, states[key])
            except KeyError as missing:
                raise InputError(f"the state of {path!r} has no {missing}; assign a complete one") from None
            if converted is not states[key]:
                assignments.add(states, key, converted)
        assignments.make()

    def _make_room_for_scalars(self, parameters: Any) -> None:
        """Puts the scalars that the options ask for into the state, and takes those of other options out.

        Where a parameter has the name of one, there is an underscore before it, which no parameter's name begins with.
        """
        own = self._scalars()
        for name in _SCALARS:
            place = f"_{name}" if name in parameters else name
            if name in own:
                old = self._state.get(self._places[name])
                self._state.setdefault(place, old if isinstance(old, mx.array) else own[name])
                self._places[name] = place
            if isinstance(self._state.get(name), mx.array) and not (name in own and place == name):
                del self._state[name]

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Fills ``state`` with moments that are zero, of the parameter's shape, and a residual if there is one."""
        state.update(self._form(parameter).zeros(parameter))

    def _form(self, parameter: mx.array) -> Form:
        return Form.of(parameter, self._moments, self._compensated)

    def _scalars(self) -> dict[str, mx.array]:
        """What the state has beside ``step`` and ``learning_rate``, at its start."""
        scalars = {}
        if self._moments in STOCHASTIC:
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
        self._refuse_leaf_by_leaf()
        constants = self._constants()
        c = constants.coefficients(self.step, self.learning_rate, ALL_ALIKE)
        parameter, new = update_leaf(gradient, parameter, state, self._form(parameter), c, constants.betas)
        state.update(new)
        return parameter

    def _refuse_leaf_by_leaf(self) -> None:
        if self._needs_norm() or self._multipliers or self._decay_filter or self._moments in STOCHASTIC:
            raise InputError(
                "apply_single sees one parameter without its path; clipping, skip_nonfinite, stochastic rounding,"
                " multipliers and a decay_filter need apply_gradients, and no apply_single of a subclass"
            )

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Updates the parameters of ``model`` in place; an interrupt leaves them and the state as before, or as after.

        Raises what `apply_gradients` raises.
        """
        if type(self).apply_gradients is not Adam.apply_gradients or type(self).apply_single is not Adam.apply_single:
            super().update(model, gradients)
            return
        assignments = Assignments()
        updated = self._apply(gradients, model, None, assignments)
        new = [container[key] for _, container, key in along(gradients, updated)]
        for (_, container, key), array in zip(along(gradients, model), new, strict=True):
            assignments.add(container, key, array)
        assignments.make()

    def apply_gradients(self, gradients: dict, parameters: dict, part: Part | None = None) -> dict:
        """The updated parameters, as a tree like ``gradients``, which may be a subset of ``parameters``.

        If there are more gradients, whose updates are made elsewhere, ``part`` has what they have in common.

        Raises ValueError or TypeError, naming the path, for a gradient that has no parameter or no state, is not
        an array, or differs from its parameter in shape; moments and step are as before then.
        """
        assignments = Assignments()
        updated = self._apply(gradients, parameters, part, assignments)
        assignments.make()
        return updated

    def _apply(self, gradients: dict, parameters: dict, part: Part | None, assignments: Assignments) -> dict:
        """`apply_gradients`, whose new state becomes a part of ``assignments``."""
        if not self._initialized:
            Aligned(gradients, parameters, self.state)  # raises before any state is made for a wrong tree
            self._init(tree_map(lambda _, parameter: parameter, gradients, parameters), parameters)
        if type(self).apply_single is not Adam.apply_single:
            # MLX's way to extend an optimizer: a subclass that has its own update of one parameter gets it called.
            self._refuse_leaf_by_leaf()
            return super().apply_gradients(gradients, parameters)
        leaves = Aligned(gradients, parameters, self.state)
        if leaves.without_state:
            raise InputError(
                f"the optimizer has no state for {', '.join(leaves.without_state)}: it was initialised without;"
                " call optimizer.init(parameters) with all parameters (moments that exist are kept)"
            )
        compiled = self._compiled.get(leaves.paths)
        if compiled is None:
            while len(self._compiled) >= MOST_SUBSETS:
                self._compiled.popitem(last=False)
            compiled = self._compiled[leaves.paths] = Compiled(partial(self._trace, leaves.paths), MOST_TRACES)
        self._compiled.move_to_end(leaves.paths)
        # Outside of what is compiled, because a schedule may be any Python function of the step's value.
        scalars = self.scalars()
        scalars |= self._scheduled(scalars["step"])
        new_parameters, states, scalars = compiled(
            leaves.gradients, leaves.parameters, leaves.states, scalars, self._constants(), part
        )
        result = iter(new_parameters)
        tree = tree_map(lambda _: next(result), gradients)
        self.assign_scalars(scalars, assignments)
        for state, new in zip(leaves.states, states, strict=True):
            for name, array in new.items():
                assignments.add(state, name, array)
        return tree

    def _trace(
        self,
        paths: tuple[str, ...],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[Stored],
        scalars: Stored,
        constants: tuple[Any, ...],
        part: tuple[Any, ...] | None,
        weight: mx.array | None = None,
    ) -> tuple[list[mx.array], list[Stored], Stored]:
        """What is compiled: `update` of leaves whose groups and forms of storage are found out here, once a trace."""
        self._traces += 1
        forms = [self._form(p) for p in parameters]
        for leaf in zip(paths, gradients, parameters, states, forms, strict=True):
            check_leaf(*leaf)
        groups = [self._group(path, p) for path, p in zip(paths, parameters, strict=True)]
        return update(
            gradients,
            parameters,
            states,
            scalars,
            groups,
            forms,
            Constants(*constants),
            Part(*part) if part else None,
            weight,
        )

    def update_leaves(
        self,
        paths: tuple[str, ...],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[Stored],
        scalars: Stored,
        weight: mx.array | None,
    ) -> tuple[list[mx.array], list[Stored], Stored]:
        """The new parameters, states and ``scalars``, which is the rest of the state; for a graph that is traced.

        A leaf may stand for several that are updated alike: its path is that of any of them. If the ``weight`` is 0,
        the gradients count as 0.
        """
        scalars = scalars | self._scheduled(scalars["step"])
        return self._trace(paths, gradients, parameters, states, scalars, self._constants(), None, weight)

    def streams(self, parameters: list[mx.array]) -> list[mx.Stream]:
        """Where `update_leaves` will update each."""
        return [how.stream for how in of_leaves(self._lowering, [p.size for p in parameters])]

    @property
    def keeper(self) -> Keeper | None:
        """Who has a part of the state at present, so that `state` must ask for it."""
        return self._keeper

    @keeper.setter
    def keeper(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def group_and_form(self, path: str, parameter: mx.array) -> tuple[Group, Form]:
        """What decides how a parameter is updated, beside its dtype."""
        return self._group(path, parameter), self._form(parameter)

    @property
    def has_own_update(self) -> bool:
        """Whether the update is a subclass's own, of one parameter at a time or of the tree."""
        names = ("apply_single", "apply_gradients", "update")
        return any(getattr(type(self), name) is not getattr(Adam, name) for name in names)

    def _scheduled(self, step: mx.array) -> Stored:
        return {name: scheduled(name, f, step) for name, f in self._schedulers.items()}

    def _constants(self) -> Constants:
        # Arguments of the compiled update rather than attributes it reads, so that changing one takes effect.
        b1, b2 = map(float, self.betas)
        return Constants(
            (b1, b2),
            float(self.eps),
            bool(self.bias_correction),
            float(self.weight_decay),
            self._max_grad_norm,
            self._skip_nonfinite,
            self._lowering,
        )

    def _group(self, path: str, parameter: mx.array) -> Group:
        if path not in self._groups:
            self._groups[path] = group(path, parameter, self._decay_filter, self._multipliers)
        return self._groups[path]

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions can be neither copied nor pickled; a copy traces its own.
        return {**self.__dict__, "_compiled": OrderedDict(), "_state": self.state, "_keeper": None}


def _evaluate(state: Any) -> None:
    """Leaves nothing lazy behind: another thread, which may use the state first, could not evaluate it."""
    try:
        mx.eval(state)
    except ValueError:  # MLX's word for: a caller's transformation is being traced
        return
