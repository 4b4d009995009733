"""The optimizer of a job of ``compiled-adam lora``."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..base import InputError
from ..finetune.lora_values import ADAMW_FACTOR, DEFAULT_FACTOR, OPTIMIZERS
from ..finetune.options import called
from ..optimizers import Compensated
from ..update import decay_matrices
from . import like_mlx_lm

BETAS_OF_ADAMW = (0.9, 0.95)  # beside Muon, of Muon's author
_ANY = ("max_grad_norm", "skip_nonfinite")  # the options that every optimizer has without --like-mlx-lm


def make_optimizer(args: types.SimpleNamespace) -> optim.Optimizer:
    """The optimizer of a job: ours for adam and adamw, MLX's in `Compensated` for the others.

    With ``like_mlx_lm`` the others are MLX's alone. Raises ValueError for an option that the optimizer does not have.
    """
    name = args.optimizer
    rate = args.learning_rate if args.lr_schedule is None else like_mlx_lm.schedule(args)
    _refuse_others_options(args)
    if name in ("adam", "adamw"):
        options = like_mlx_lm.options_of_adam(args)
        if args.decay_matrices_only:
            options["decay_filter"] = decay_matrices
        return OPTIMIZERS[name](learning_rate=rate, **options)
    own = dict(args.optimizer_config.get(name, {}))
    factor = own.pop(ADAMW_FACTOR, None)
    made = OPTIMIZERS[name](learning_rate=rate, **own)
    if args.like_mlx_lm:
        if factor is not None:
            raise InputError(
                f"optimizer_config of muon has {ADAMW_FACTOR}, but {called('like_mlx_lm')} has no AdamW beside muon;"
                " leave out one of the two"
            )
        return made
    made = _with_adamw(made, rate, factor or DEFAULT_FACTOR, args) if name == "muon" else made
    return Compensated(made, **like_mlx_lm.options_of_others(args))


def _refuse_others_options(args: types.SimpleNamespace) -> None:
    name = args.optimizer
    if name != "adamw":
        for key in ("weight_decay", "decay_matrices_only"):
            if getattr(args, key) is not None:
                raise InputError(f"{called(key)} is an option of adamw, but the optimizer is {name}")
    if name in ("adam", "adamw"):
        return
    for key in like_mlx_lm.OF_ADAM:
        if getattr(args, key) is not None and key not in _ANY:
            raise InputError(f"{called(key)} is an option of adam and adamw, but the optimizer is {name}")
        if getattr(args, key) and args.like_mlx_lm:
            raise InputError(f"{called(key)} changes what mlx-lm's {name} computes; leave out it or --like-mlx-lm")


def hidden_matrix(path: str, parameter: mx.array) -> bool:
    """Whether Muon trains a parameter: a matrix inside one of the layers, so no embedding, head, norm or bias.

    >>> w = mx.zeros((4, 4))
    >>> hidden_matrix("model.layers.0.mlp.up_proj.weight", w), hidden_matrix("lm_head.weight", w)
    (True, False)
    """
    return parameter.ndim == 2 and decay_matrices(path, parameter) and re.search(r"\.\d+\.", path) is not None


def _with_adamw(
    muon: optim.Optimizer, rate: float | Callable[[Any], Any], factor: float, args: types.SimpleNamespace
) -> optim.Optimizer:
    """Muon for the matrices of layers, AdamW for all other parameters, with ``factor`` of Muon's learning rate."""
    config = {"betas": BETAS_OF_ADAMW, "bias_correction": True, **args.optimizer_config.get("adamw", {})}
    known = inspect.signature(optim.AdamW).parameters
    if unknown := [key for key in config if key not in known]:
        raise InputError(f"optimizer_config of adamw has the key {unknown[0]!r}, which AdamW beside muon does not have")
    its_rate = (lambda step: factor * rate(step)) if callable(rate) else factor * rate
    return optim.MultiOptimizer([muon, optim.AdamW(its_rate, **config)], [hidden_matrix])
