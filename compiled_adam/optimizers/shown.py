"""Optimizers in one line: the settings that differ from the defaults, and what they have done."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import mlx.optimizers as optim

from ..base import shown
from . import any_optimizer
from .group_options import as_given

if TYPE_CHECKING:
    from .adam import Adam


def of_adam(optimizer: Adam) -> str:
    """The call that makes the optimizer, and the number of updates, for which it waits."""
    own = optimizer._leaves.options
    values: dict[str, Any] = {
        "betas": tuple(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "bias_correction": optimizer.bias_correction,
        "decay_filter": own.decay_filter,
        "moments": own.moments,
        "compensated": own.compensated,
        "max_grad_norm": own.max_grad_norm,
        "skip_nonfinite": own.skip_nonfinite,
        **{name: given or None for name, given in as_given(own.patterns).items()},
        "lowering": own.lowering,
    }
    defaults: dict[str, Any] = {}
    for kind in reversed(type(optimizer).__mro__[:-1]):
        defaults |= {name: each.default for name, each in inspect.signature(kind).parameters.items()}
    settings = [
        f"{name}={shown(value)}" for name, value in values.items() if name in defaults and value != defaults[name]
    ]
    done = [f"step={shown(optimizer.step)}", *([f"skipped={shown(optimizer.skipped)}"] if own.skip_nonfinite else [])]
    return f"{type(optimizer).__name__}({', '.join([_rate(optimizer), *settings])}; {', '.join(done)})"


def of_any(optimizer: optim.Optimizer) -> str:
    """Any optimizer of MLX in one line; MLX's own show an address otherwise."""
    name = type(optimizer).__name__
    if isinstance(optimizer, optim.MultiOptimizer):
        return f"{name}({', '.join(map(of_any, optimizer.optimizers))})"
    return repr(optimizer) if type(optimizer).__repr__ is not object.__repr__ else f"{name}({_rate(optimizer)})"


def _rate(optimizer: optim.Optimizer) -> str:
    # `Adam.state` would put all moments into the tree.
    state = optimizer._state if any_optimizer.is_mlxs(optimizer) else vars(optimizer)
    rate = any_optimizer.schedules(optimizer).get("learning_rate", state.get("learning_rate"))
    return "" if rate is None else f"learning_rate={shown(rate)}"
