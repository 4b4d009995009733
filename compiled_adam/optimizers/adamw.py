"""The class `AdamW`, which replaces ``mlx.optimizers.AdamW``."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import InputError
from ..update import DecayFilter
from .adam import Adam, LearningRate
from .group_options import Groups
from .options import check_number


class AdamW(Adam):
    """Adam with decoupled weight decay: each update of `Adam` also adds ``- lr weight_decay p`` to the parameter ``p``.

    It replaces ``mlx.optimizers.AdamW``. It takes the arguments of `Adam` and two more:

    Args:
        weight_decay: the decay per unit of learning rate, >= 0. Default 0.01.
        decay_filter: ``decay_filter(path, parameter)`` returns whether the parameter decays. It is called once for each
            path. Default None: all decay. `compiled_adam.decay_matrices` leaves out biases, norms and embeddings.

    ``groups`` may have ``weight_decay``, too. All parameters of the group have it: the filter is not asked about them.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.

    >>> import mlx.core as mx
    >>> optimizer = AdamW(learning_rate=0.1, weight_decay=0.5)
    >>> optimizer.apply_gradients({"weight": mx.array([0.0])}, {"weight": mx.array([1.0])})
    {'weight': array([0.95], dtype=float32)}
    """

    _group_keys = (*Adam._group_keys, "weight_decay")

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
        groups: Groups | None = None,
        lowering: str = "auto",
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
            groups=groups,
            lowering=lowering,
        )
        if decay_filter is not None and not callable(decay_filter):
            raise InputError(f"decay_filter is {decay_filter!r}; it must be a function of (path, parameter), or None")
        check_number("weight_decay", weight_decay)
        self.weight_decay = weight_decay
        self._leaves.options = self._leaves.options._replace(decay_filter=decay_filter)
