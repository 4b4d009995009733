"""The class `Adam`, which replaces ``mlx.optimizers.Adam`` and is the base of `adamw.AdamW`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import Aligned, Assignments, InputError, filled
from ..update import ALL_ALIKE, Part, Shared, Stored, update_leaf
from .group_options import Groups, as_given, patterns
from .leaf_update import LeafUpdate, Options
from .options import assigned_rate, check_numbers, check_options
from .options import learning_rate as checked_rate
from .shown import of_adam
from .state import State, evaluate

LearningRate = float | mx.array | Callable[[mx.array], mx.array]


class Adam(optim.Adam):
    """Adam that updates the whole parameter tree in one compiled graph, in float32.

    It replaces ``mlx.optimizers.Adam`` and is a subclass of it. Formulas, without and with bias correction::

        m <- b1 m + (1 - b1) g                  v <- b2 v + (1 - b2) g^2
        p <- p - lr m / (sqrt(v) + eps)
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)      (``bias_correction=True``, t from 1)

    Arithmetic is float32 for every parameter dtype. Parameters keep their dtype and shape. MLX traces the update (runs
    the Python code once to record a graph) once for each set of paths, shapes and dtypes. A new learning rate, step or
    gradient value needs no new trace. Inside a caller's ``mx.compile`` the update joins the caller's graph.

    Args:
        learning_rate: a number of at least 0, or a schedule: a function that takes the step (0-d array, 0 at the first
            update) and returns such a number. A compiled step traces the schedule, so write ``mx.where``,
            ``mx.minimum`` and ``mx.cos`` in it instead of ``if``, ``min`` and ``math.cos``.
        betas: decay rates of the two moments, each in [0, 1). Default (0.9, 0.999).
        eps: added to the denominator, >= 0. Default 1e-8.
        bias_correction: divide the moments by ``1 - beta^t``. Default False, as in MLX.
        moments: storage of the moments: "float32" (default, 8 bytes per parameter), "bfloat16" (4 bytes), "8bit"
            (2.06 bytes) or "param" (the dtype of the parameter, as in MLX). "8bit" keeps arrays below 4096 elements in
            float32. "bfloat16" and "8bit" round stochastically, with a random key in ``state["rounding_key"]``.
        compensated: for bfloat16 and float16 parameters, store the rounding error of each weight in 2 more bytes. This
            residual is in the state beside the moments, as ``residual``. Weight and residual together follow the
            trajectory of a float32 master copy. Default True. No effect on float32 parameters.
        max_grad_norm: the largest allowed global norm of the gradients, computed in float32. Larger gradients are
            scaled down to this norm. Default None: no clipping.
        skip_nonfinite: skip an update if the global norm of the gradients is NaN or infinite (gradients beyond 1e19
            have an infinite norm), or if a schedule returns a NaN, infinite or negative learning rate. Parameters,
            moments, residuals, rounding key and ``step`` then keep their values bit for bit, and ``skipped`` goes up by
            one. Without this option such updates are made: weights become NaN, or move uphill. Default False.
        learning_rate_multipliers: ``{pattern: factor}``. The learning rate of a parameter is multiplied by the factor
            if the regular expression ``pattern`` matches the path of the parameter (``re.search``). Default None.
        groups: ``{pattern: {"learning_rate": factor, "betas": (b1, b2), "eps": eps}}``: numbers for the parameters
            whose path matches the pattern, in place of those above. ``learning_rate`` is a factor of the learning rate,
            so a schedule applies to all. Each key may be left out. `AdamW` has ``weight_decay``, too. Default None.
        lowering: the kernels of the update. "fused": one kernel for each parameter, which moves the fewest bytes.
            "inplace": one kernel for each array, which needs no extra memory (float32 moments only; others stay fused).
            "auto" (default): the one that measured faster on the device. Results differ by rounding: 3e-7 of a step.

    ``grad_norm`` is the global norm of the last update's gradients before clipping. ``skipped`` is the number of
    updates skipped since the start. Both are 0-d arrays. They cost a pass over the gradients, so they are None without
    ``max_grad_norm`` and ``skip_nonfinite``.

    Raises:
        ValueError: an argument is out of range (the message names the argument). When the state is created: a pattern
            matches no parameter, two patterns of an option match the same parameter, or ``groups`` and
            ``learning_rate_multipliers`` both set a parameter's learning rate.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015.

    >>> optimizer = Adam(learning_rate=0.1)
    >>> parameters = {"weight": mx.array([1.0, -2.0])}
    >>> optimizer.apply_gradients({"weight": mx.array([0.5, -0.5])}, parameters)
    {'weight': array([0.683772, -1.68377], dtype=float32)}
    """

    _group_keys: tuple[str, ...] = ("learning_rate", "betas", "eps")

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
        groups: Groups | None = None,
        lowering: str = "auto",
    ) -> None:
        learning_rate = checked_rate(learning_rate)
        check_numbers(betas, eps, bias_correction)
        check_options(moments, compensated, max_grad_norm, skip_nonfinite, lowering)
        by_pattern = patterns(groups, learning_rate_multipliers, self._group_keys)
        options = Options(moments, compensated, max_grad_norm, skip_nonfinite, by_pattern, lowering)
        self._leaves = LeafUpdate(self, options)
        self._kept = State(self, self._leaves)
        super().__init__(learning_rate, betas, eps, bias_correction)  # type: ignore[arg-type]  # MLX says list
        self._state["learning_rate"] = mx.array(self._state["learning_rate"], mx.float32)  # whatever a schedule returns
        self.weight_decay = 0.0
        self._state.update(options.scalars())
        evaluate(self._state)

    @property
    def state(self) -> dict[str, Any]:
        """The state as a tree: the step, the learning rate, counters, and a dictionary of arrays for each parameter.

        A train step keeps the moments of small parameters elsewhere. Reading this property puts them into the tree.
        """
        self._kept.complete()
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        keeper = self._kept.keeper
        if keeper is not None:
            keeper.show()  # the assigned state may be the present state, or share dictionaries with it
        # An interrupt between these lines does no harm: a complete state is only checked once more.
        self._initialized = False
        self._state = state
        self._kept.keeper = None

    @property
    def step(self) -> mx.array:
        return self._kept.scalars()["step"]

    @property
    def learning_rate(self) -> mx.array:
        return self._kept.scalars()["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self._state["learning_rate"] = assigned_rate(learning_rate)
        evaluate(self._state["learning_rate"])

    @property
    def traces(self) -> int:
        """How often the Python code of the update ran: once per layout, or once per call if compiling is disabled."""
        return self._leaves.traces

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options that MLX's Adam lacks, by name. ``decays`` is a digest of the paths that decay."""
        own = self._leaves.options
        return {
            "moments": own.moments,
            "compensated": own.compensated,
            "max_grad_norm": own.max_grad_norm,
            "skip_nonfinite": own.skip_nonfinite,
            **as_given(own.patterns),
            "decays": self._leaves.decays(),
        }

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last update's gradients, before clipping: 0-d float32. None if no option needs it."""
        return self._kept.scalar("grad_norm") if self._leaves.options.needs_norm else None

    @property
    def skipped(self) -> mx.array | None:
        """How many updates were skipped since the start: 0-d int32. None if no option needs the norm."""
        return self._kept.scalar("skipped") if self._leaves.options.needs_norm else None

    def init(self, parameters: dict) -> None:
        """Creates missing state. Existing moments are kept, and converted to the storage that ``moments`` names.

        Raises TypeError or ValueError if Adam cannot update a parameter, if the state is incomplete, if a pattern
        matches no parameter, or if two patterns match the same parameter.
        """
        self._kept.init(parameters)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Fills ``state`` with zero moments of the parameter's shape, and a zero residual for compensated weights."""
        state.update(self._leaves.options.form(parameter).zeros(parameter))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Returns one updated parameter, for the present ``step`` and ``learning_rate``. ``state`` gets new moments.

        Raises ValueError if an option needs the other gradients or the path of the parameter.
        """
        self._refuse_leaf_by_leaf()
        constants = self._leaves.constants()
        shared = Shared({ALL_ALIKE: constants.coefficients(self.step, self.learning_rate, ALL_ALIKE)})
        form, betas = self._leaves.options.form(parameter), constants.betas
        parameter, new = update_leaf(shared, gradient, parameter, state, form=form, group=ALL_ALIKE, betas=betas)
        state.update(new)
        return parameter

    def _refuse_leaf_by_leaf(self) -> None:
        if self._leaves.options.needs_all:
            raise InputError(
                "apply_single gets one parameter without a path; max_grad_norm, skip_nonfinite, stochastic rounding,"
                " groups, multipliers and a decay_filter need apply_gradients, and no apply_single of a subclass"
            )

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Updates the parameters of ``model`` in place.

        An interrupt leaves model and state either both old or both new. Raises the errors of `apply_gradients`.
        """
        if type(self).apply_gradients is not Adam.apply_gradients or type(self).apply_single is not Adam.apply_single:
            super().update(model, gradients)
            return
        assignments = Assignments()
        new, places = self._updated(gradients, model, None, assignments)
        assignments.add_all(*places, new)
        assignments.make()

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Returns the updated parameters as a tree like ``gradients``. ``gradients`` may cover a part of the tree only.

        Raises ValueError or TypeError if a gradient has no parameter or no state, is not an array, or differs from the
        parameter in shape. The message names the path. Moments and step then stay unchanged.
        """
        assignments = Assignments()
        updated = self._apply(gradients, parameters, None, assignments)
        assignments.make()
        return updated

    def _apply(self, gradients: dict, parameters: dict, part: Part | None, assignments: Assignments) -> dict:
        """`apply_gradients` that adds the new state to ``assignments`` instead of assigning it.

        ``part`` describes the whole tree when ``gradients`` is one shard of it and other workers update the rest.
        """
        if type(self).apply_single is not Adam.apply_single:
            # MLX's way to extend an optimizer: a subclass overrides apply_single, and MLX calls it per parameter.
            self._init_for(gradients, parameters)
            self._refuse_leaf_by_leaf()
            return super().apply_gradients(gradients, parameters)
        result = iter(self._updated(gradients, parameters, part, assignments)[0])
        return filled(gradients, result)

    def _init_for(self, gradients: dict, parameters: dict) -> None:
        if not self._initialized:
            Aligned(gradients, parameters, self.state)  # raises before any state is made for a wrong tree
            self._kept.init(tree_map(lambda _, parameter: parameter, gradients, parameters), parameters)

    def _updated(
        self, gradients: dict, parameters: dict, part: Part | None, assignments: Assignments
    ) -> tuple[list[mx.array], tuple[list[Any], list[Any]]]:
        """The updated parameters in the order of ``gradients``, and the containers and keys of the old ones."""
        self._init_for(gradients, parameters)
        leaves = Aligned(gradients, parameters, self.state)
        if leaves.without_state:
            raise InputError(
                f"the optimizer has no state for {', '.join(leaves.without_state)}: it was initialised without them;"
                " call optimizer.init(parameters) with all parameters (existing moments are kept)"
            )
        # Outside the compiled function, because a schedule may be any Python function of the step's value.
        scalars = self._kept.scalars()
        scalars |= self._leaves.scheduled(scalars["step"])
        new_parameters, states, scalars = self._leaves.compiled(leaves.paths)(
            leaves.gradients, leaves.parameters, leaves.states, scalars, self._leaves.constants(), part
        )
        self._kept.assign_scalars(scalars, assignments)
        assignments.add_contents(leaves.states, states)
        return new_parameters, (leaves.containers, leaves.keys)

    def __repr__(self) -> str:
        return of_adam(self)

    def __getstate__(self) -> dict[str, Any]:
        self._kept.complete()  # a copy has no keeper
        return self.__dict__.copy()


class ForSteps:
    """The internals of an `Adam` that train steps and shards use, and that are no public API."""

    def __init__(self, optimizer: Adam) -> None:
        self._optimizer = optimizer
        self.leaves, self.kept = optimizer._leaves, optimizer._kept

    @property
    def has_own_update(self) -> bool:
        """Whether a subclass overrides the update, of one parameter or of the tree."""
        names = ("apply_single", "apply_gradients", "update")
        return any(getattr(type(self._optimizer), name) is not getattr(Adam, name) for name in names)

    def lay_out(self, parameters: dict) -> None:
        """``init`` without computing: the arrays of the state have shapes and dtypes, but take no memory yet."""
        self.kept.create(parameters, parameters, parameters)

    def apply_part(self, gradients: dict, parameters: dict, part: Part) -> dict:
        """``apply_gradients`` for one part of the gradients. Other workers update the other parts."""
        assignments = Assignments()
        updated = self._optimizer._apply(gradients, parameters, part, assignments)
        assignments.make()
        return updated

    def update_leaves(
        self,
        paths: tuple[str, ...],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[Stored],
        scalars: Stored,
        weight: mx.array | None,
    ) -> tuple[list[mx.array], list[Stored], Stored]:
        """Returns the new parameters, states and ``scalars`` (the rest of the state). Call it while tracing.

        The new scalars always have ``grad_norm``. If the ``weight`` is 0, the gradients count as 0.
        """
        leaves = self.leaves
        scalars = scalars | leaves.scheduled(scalars["step"])
        return leaves.traced(paths, gradients, parameters, states, scalars, leaves.constants(), None, weight, True)
