"""Adam: what a user constructs in place of ``mlx.optimizers.Adam``; and what `adamw.AdamW` shares with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..base import Aligned, Assignments, InputError, along
from ..update import ALL_ALIKE, Part, Shared, Stored, update_leaf
from .leaf_update import LeafUpdate, Options
from .options import assigned_rate, check_numbers, check_options
from .options import learning_rate as checked_rate
from .state import State, evaluate

LearningRate = float | mx.array | Callable[[mx.array], mx.array]


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
        check_options(moments, compensated, max_grad_norm, skip_nonfinite, learning_rate_multipliers, lowering)
        multipliers = dict(learning_rate_multipliers or {})
        options = Options(moments, compensated, max_grad_norm, skip_nonfinite, multipliers, lowering)
        self._leaves = LeafUpdate(self, options)
        self._kept = State(self, self._leaves)
        super().__init__(learning_rate, betas, eps, bias_correction)  # type: ignore[arg-type]  # MLX says list
        self._state["learning_rate"] = mx.array(self._state["learning_rate"], mx.float32)  # whatever a schedule returns
        self.weight_decay = 0.0
        self._state.update(options.scalars())
        evaluate(self._state)

    @property
    def state(self) -> dict[str, Any]:
        """The step, the learning rate, counters, and a dictionary of arrays for each parameter, as a tree.

        A train step keeps the moments of small parameters elsewhere; asking for the state is what puts them here.
        """
        self._kept.complete()
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        keeper = self._kept.keeper
        if keeper is not None:
            keeper.show()  # what is assigned may be the same, or have dictionaries of it
        # In an order that does no harm if it is interrupted: a complete state is only looked through once more.
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
        """How often the Python of the update ran: once for each layout, or each time where nothing is compiled."""
        return self._leaves.traces

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options beside MLX's own, by name; ``decays`` has a digest of which parameters do."""
        own = self._leaves.options
        return {
            "moments": own.moments,
            "compensated": own.compensated,
            "max_grad_norm": own.max_grad_norm,
            "skip_nonfinite": own.skip_nonfinite,
            "learning_rate_multipliers": own.multipliers,
            "decays": self._leaves.decays(),
        }

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last update's gradients, before clipping: 0-d float32. None if nothing needs it."""
        return self._kept.scalar("grad_norm") if self._leaves.options.needs_norm else None

    @property
    def skipped(self) -> mx.array | None:
        """How many updates were skipped since the start: 0-d int32. None if nothing needs the norm."""
        return self._kept.scalar("skipped") if self._leaves.options.needs_norm else None

    def init(self, parameters: dict) -> None:
        """Creates the state that is missing. Moments that exist are kept, and stored as ``moments`` says.

        Raises TypeError or ValueError for parameters that Adam cannot update, for an incomplete state, and for
        patterns that match no parameter or the same one.
        """
        self._kept.init(parameters)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Fills ``state`` with moments that are zero, of the parameter's shape, and a residual if there is one."""
        state.update(self._leaves.options.form(parameter).zeros(parameter))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Updates one parameter with the present ``step`` and ``learning_rate``; ``state`` gets the new moments.

        Raises ValueError with options that need the other gradients or the parameter's path.
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

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The updated parameters, as a tree like ``gradients``, which may be a subset of ``parameters``.

        Raises ValueError or TypeError, naming the path, for a gradient that has no parameter or no state, is not
        an array, or differs from its parameter in shape; moments and step are as before then.
        """
        assignments = Assignments()
        updated = self._apply(gradients, parameters, None, assignments)
        assignments.make()
        return updated

    def _apply(self, gradients: dict, parameters: dict, part: Part | None, assignments: Assignments) -> dict:
        """`apply_gradients`, whose new state becomes a part of ``assignments``.

        If there are more gradients, whose updates are made elsewhere, ``part`` has what they have in common.
        """
        if not self._initialized:
            Aligned(gradients, parameters, self.state)  # raises before any state is made for a wrong tree
            self._kept.init(tree_map(lambda _, parameter: parameter, gradients, parameters), parameters)
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
        # Outside of what is compiled, because a schedule may be any Python function of the step's value.
        scalars = self._kept.scalars()
        scalars |= self._leaves.scheduled(scalars["step"])
        new_parameters, states, scalars = self._leaves.compiled(leaves.paths)(
            leaves.gradients, leaves.parameters, leaves.states, scalars, self._leaves.constants(), part
        )
        result = iter(new_parameters)
        tree = tree_map(lambda _: next(result), gradients)
        self._kept.assign_scalars(scalars, assignments)
        for state, new in zip(leaves.states, states, strict=True):
            for name, array in new.items():
                assignments.add(state, name, array)
        return tree

    def __getstate__(self) -> dict[str, Any]:
        self._kept.complete()  # a copy has no keeper
        return self.__dict__.copy()


class ForSteps:
    """What train steps and shards use of an `Adam`, beside what a user may call."""

    def __init__(self, optimizer: Adam) -> None:
        self._optimizer = optimizer
        self.leaves, self.kept = optimizer._leaves, optimizer._kept

    @property
    def has_own_update(self) -> bool:
        """Whether the update is a subclass's own, of one parameter at a time or of the tree."""
        names = ("apply_single", "apply_gradients", "update")
        return any(getattr(type(self._optimizer), name) is not getattr(Adam, name) for name in names)

    def lay_out(self, parameters: dict) -> None:
        """``init`` that computes nothing: the state has its shapes and dtypes, and takes no memory."""
        self.kept.create(parameters, parameters, parameters)

    def apply_part(self, gradients: dict, parameters: dict, part: Part) -> dict:
        """``apply_gradients`` of a part of all gradients; the others' updates are made elsewhere."""
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
        """The new parameters, states and ``scalars``, which is the rest of the state; for a graph that is traced.

        If the ``weight`` is 0, the gradients count as 0.
        """
        leaves = self.leaves
        scalars = scalars | leaves.scheduled(scalars["step"])
        return leaves.traced(paths, gradients, parameters, states, scalars, leaves.constants(), None, weight)
