"""Checks of the values of a fine-tuning job: the ranges of its numbers, and the keys inside its mappings."""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import mlx.optimizers as optim
from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK

from .. import schedulers
from ..base import InputError
from ..distributed import check_timeout
from ..optimizers import Adam, AdamW
from ..optimizers import options as optimizer_options
from . import padding
from .options import WHOLE, called, check_whole

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "lion": optim.Lion,
    "adafactor": optim.Adafactor,
}
# An argument of muon that MLX's Muon lacks: the learning rate of the AdamW beside Muon, as a factor of Muon's. Default
# of Muon's author, github.com/KellerJordan/Muon: 3e-4 beside 0.02 for hidden matrices.
ADAMW_FACTOR, DEFAULT_FACTOR = "adamw_rate_factor", 0.015
_LARGEST_RANK = 1 << 16
# The numbers of lora_parameters: what each must be, and whether a finite number is that.
_LORA: dict[str, tuple[str, Callable[[float], bool]]] = {
    "rank": (
        f"a whole number from 1 to {_LARGEST_RANK}",
        lambda value: 1 <= value <= _LARGEST_RANK and value == int(value),
    ),
    "scale": ("a finite number other than 0", lambda value: value != 0),
    "dropout": ("in [0, 1)", lambda value: 0 <= value < 1),
}
FEATURES = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")
_HF_DATASET = ("path", "config", "train_split", "valid_split", "test_split", *FEATURES)
# Arguments of MLX's optimizers that may be below 0.
_SIGNED = ("decay_rate",)
# Arguments of optimizers that are not for optimizer_config.
_ELSEWHERE = ("self", "learning_rate", "decay_filter")


def as_float(value: Any) -> Any:
    """A whole number that MLX's 64 bits cannot hold, as a float; anything else as it is.

    >>> as_float(10**20), as_float(20), as_float("20"), as_float(-(10**400))
    (1e+20, 20, '20', -inf)
    """
    return float(Decimal(value)) if isinstance(value, int) and abs(value) > sys.maxsize else value


def check(args: types.SimpleNamespace) -> None:
    """Raises ValueError that names a value which no job can have; see `lora_options.settings`."""
    for name, value in vars(args).items():
        if name in WHOLE and value is not None:
            check_whole(name, value)
    for name in ("learning_rate", "max_grad_norm", "weight_decay", "epochs"):
        setattr(args, name, as_float(getattr(args, name)))
    optimizer_options.learning_rate(args.learning_rate, called("learning_rate"))
    for name in ("max_grad_norm", "epochs"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise InputError(f"{called(name)} is {value!r}; it must be a number above 0")
    if args.weight_decay is not None:
        optimizer_options.check_number(called("weight_decay"), args.weight_decay)
    check_timeout(args.worker_timeout)
    services = [name.strip().lower() for name in (args.report_to or "").split(",")]  # as mlx-lm reads it
    if not SUPPORT_CALLBACK.keys() >= set(filter(None, services)):
        raise InputError(
            f"{called('report_to')} is {args.report_to!r}; it must be one of {', '.join(SUPPORT_CALLBACK)}, or several"
            " with commas between them"
        )
    if args.bucket is not None:
        padding.geometric(args.bucket)
    if args.lr_schedule is not None:
        schedulers.from_config(args.lr_schedule)
        if args.epochs is None:
            check_rates(args)
    if args.lora_parameters is not None:
        args.lora_parameters = lora_parameters(args.lora_parameters, needed=args.fine_tune_type != "full")
    args.optimizer_config = optimizer_config(args.optimizer_config, args.optimizer)
    if hasattr(args, "hf_dataset"):
        _check_hf_dataset(args.hf_dataset, test=args.test)


def check_rates(args: types.SimpleNamespace) -> None:
    """Raises ValueError if the schedule has an unusable rate within the iterations of the job."""
    if args.lr_schedule is not None:
        schedule = schedulers.from_config(args.lr_schedule)
        schedulers.check_values(schedule, -(-args.iters // args.grad_accumulation_steps))


def lora_parameters(given: Mapping[str, Any], *, needed: bool = True) -> dict[str, Any]:
    """The checked ``lora_parameters`` of a job; ``needed``: whether rank, scale and dropout must all be there.

    Raises:
        ValueError: an unknown key, a key that is missing, or a value out of its range. The message names it.
    """
    known = (*_LORA, "keys")
    if unknown := [key for key in given if key not in known]:
        hint = "; mlx-lm has no alpha: give scale, which is alpha / rank" if "alpha" in map(str, unknown) else ""
        raise InputError(f"lora_parameters has the key {unknown[0]!r}; the keys are {', '.join(known)}{hint}")
    if missing := [key for key in _LORA if needed and given.get(key) is None]:
        raise InputError(
            f"lora_parameters has no {missing[0]}; it needs {', '.join(_LORA)}, such as"
            " {rank: 8, scale: 20.0, dropout: 0.0}"
        )
    found = dict(given)
    for key, (allowed, fits) in _LORA.items():
        if (value := given.get(key)) is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(as_float(value))
        if not (number and fits(value)):
            raise InputError(f"lora_parameters: {key} is {value!r}; it must be {allowed}")
        found[key] = int(value) if key == "rank" else as_float(value)
    keys = given.get("keys")
    if keys is not None and (not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys)):
        raise InputError(
            f"lora_parameters: keys is {keys!r}; it must be a list of layers such as [self_attn.q_proj], or left out"
            " for all"
        )
    return found


def optimizer_config(given: Mapping[str, Any], optimizer: str) -> dict[str, dict[str, Any]]:
    """The checked ``optimizer_config`` of a job: keyword arguments by the name of the optimizer.

    Raises:
        ValueError: an unknown name or keyword, or a value that the optimizer does not take.
    """
    if unknown := [key for key in given if key not in OPTIMIZERS]:
        key = unknown[0]
        hint = ""
        if str(key).lower() in OPTIMIZERS:
            hint = f": write {str(key).lower()}"
        elif key in _keywords(optimizer):
            hint = f"; {key} belongs under one of them: {{{optimizer}: {{{key}: {given[key]}}}}}"
        raise InputError(f"optimizer_config has the key {key!r}; the keys are {', '.join(OPTIMIZERS)}{hint}")
    checked: dict[str, dict[str, Any]] = {}
    for name, config in given.items():
        if config is not None and not isinstance(config, Mapping):
            raise InputError(f"optimizer_config: {name} is {config!r}; it must be a mapping of arguments to values")
        values = checked[name] = {key: as_float(value) for key, value in (config or {}).items()}
        keywords = _keywords(name)
        for key, value in values.items():
            if key not in keywords:
                hint = "; the learning rate is an option of its own" if key == "learning_rate" else ""
                raise InputError(
                    f"optimizer_config of {name} has the key {key!r}; the keys are {', '.join(keywords)}{hint}"
                )
            if name not in ("adam", "adamw"):  # ours check their own
                _check_like(f"optimizer_config of {name}: {key}", value, keywords[key])
        if (factor := values.get(ADAMW_FACTOR)) == 0:
            raise InputError(f"optimizer_config of {name}: {ADAMW_FACTOR} is {factor!r}; it must be above 0")
        try:
            OPTIMIZERS[name](learning_rate=0.0, **{key: values[key] for key in values if key != ADAMW_FACTOR})
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer_config of {name}: {error}") from None
    return checked


def _keywords(optimizer: str) -> dict[str, Any]:
    """The arguments of an optimizer that optimizer_config may have, and their defaults."""
    parameters = inspect.signature(OPTIMIZERS[optimizer]).parameters.values()
    own = {ADAMW_FACTOR: DEFAULT_FACTOR} if optimizer == "muon" else {}
    return {each.name: each.default for each in parameters if each.name not in _ELSEWHERE} | own


def _check_like(what: str, value: Any, default: Any) -> None:
    """Raises ValueError unless a value is of the kind of an argument's default."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{what} is {value!r}; it must be true or false")
    elif isinstance(default, (tuple, list)):
        if not isinstance(value, list) or len(value) != len(default):
            raise InputError(f"{what} is {value!r}; it must be a list of {len(default)} numbers")
        for each in value:
            optimizer_options.check_number(what, each)
    elif isinstance(default, int) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{what} is {value!r}; it must be a whole number of at least 1")
    elif not (value is None and default is None):
        signed = what.endswith(_SIGNED) and isinstance(value, (int, float)) and not isinstance(value, bool)
        optimizer_options.check_number(what, abs(value) if signed else value)


def _check_hf_dataset(given: Any, test: bool) -> None:
    sets = given if isinstance(given, list) else [given]
    if not sets:
        raise InputError("hf_dataset is an empty list; give a mapping with a path, or several")
    for i, each in enumerate(sets):
        what = f"hf_dataset[{i}]" if isinstance(given, list) else "hf_dataset"
        if not isinstance(each, Mapping):
            raise InputError(f"{what} is {each!r}; it must be a mapping with a path")
        if unknown := [key for key in each if key not in _HF_DATASET]:
            hints = {
                "name": "; the name of a configuration is {config: {name: ...}}, that of a data set is path",
                "mask_prompt": "; mask_prompt is an option of its own",
            }
            hint = hints.get(str(unknown[0]), "")
            raise InputError(f"{what} has the key {unknown[0]!r}; the keys are {', '.join(_HF_DATASET)}{hint}")
        for key, value in each.items():
            if not isinstance(value, Mapping if key == "config" else str):
                raise InputError(f"{what}: {key} is {value!r}; it must be {'a mapping' if key == 'config' else 'text'}")
        if not each.get("path"):
            raise InputError(f"{what} has no path")
        if test and not each.get("test_split"):
            raise InputError(f"{what} has no test_split, which --test needs")
