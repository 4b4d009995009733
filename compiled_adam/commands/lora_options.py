"""The options of ``compiled-adam lora``: mlx-lm's own parser and YAML keys, and what this command has beside them."""

from __future__ import annotations

import argparse
import difflib
import math
import types
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from mlx_lm import lora as mlx_lm_lora

from ..base import InputError
from ..distributed import DTYPES
from ..finetune import lora_values
from ..finetune.lora_values import FEATURES, called
from ..update import POLICIES

# What this command has beside mlx-lm's options; None is what was not asked for, see `make_optimizer` and `_train`.
OURS: dict[str, Any] = {
    "max_grad_norm": None,
    "skip_nonfinite": None,
    "moments": None,
    "weight_decay": None,
    "bias_correction": None,
    "decay_matrices_only": None,
    "max_traces": 64,
    "bucket": None,
    "keep_checkpoints": None,
    "save_best": None,
    "early_stop_patience": None,
    "nonfinite_limit": 20,
    "resume": None,
    "allow_change": None,
    "report": None,
    "reduce_dtype": "float32",
    "shard_state": None,
    "worker_timeout": 60.0,
}
KEPT = 2  # checkpoints, unless --keep-checkpoints says otherwise
# Keys that mlx-lm reads from YAML only.
YAML_ONLY = {"hf_dataset", *FEATURES}
# Options of mlx-lm that a test does not read.
_OF_TRAINING = (
    *("fine_tune_type", "optimizer", "num_layers", "iters", "val_batches", "learning_rate", "steps_per_report"),
    *("steps_per_eval", "grad_accumulation_steps", "save_every", "grad_checkpoint"),
)


def settings(argv: Sequence[str], made: argparse.ArgumentParser | None = None) -> types.SimpleNamespace:
    """Command line before YAML before defaults, as in mlx-lm; ValueError for an unknown YAML key, or a bad value.

    ``made`` is a `parser` with more options; default: without. ``given`` has the names of the options that the command
    line has, ``in_file`` those of the YAML file.
    """
    found = vars((made or parser()).parse_args(argv))
    given = sorted(name for name in found if found[name] is not None)
    defaults = {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS}
    config = _read(found["config"], {*defaults, *found, *YAML_ONLY} - {"config"}) if found["config"] else {}
    for values in (config, defaults):
        for key, value in values.items():
            if found.get(key) is None:
                found[key] = value
    args = types.SimpleNamespace(**found, given=given, in_file=sorted(config))
    lora_values.check(args)
    return args


class _OnlyOnce(mlx_lm_lora.yaml_loader):
    """mlx-lm's loader, which would take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise yaml.YAMLError(f"the key {twice[0]!r} is there twice; remove one of them")
        return super().construct_mapping(node, deep)


def _read(file: str, known: Set[str]) -> dict[str, Any]:
    """The options in a YAML file, checked."""
    try:
        with open(file) as stream:
            config = yaml.load(stream, _OnlyOnce) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a mapping of options to values")
    if unknown := sorted(str(key) for key in config.keys() - known):
        near = difflib.get_close_matches(unknown[0].replace("-", "_"), known, 1)
        hint = f"is {near[0]} meant? " if near else ""
        raise InputError(f"{file} has the unknown key {unknown[0]!r}; {hint}--help lists the options")
    return {key: value for key, value in _checked(config, file).items() if value is not None}


def _checked(config: dict[str, Any], file: str) -> dict[str, Any]:
    """The values of a YAML file as the parser would have made them; ValueError for one that it would refuse."""
    checked = dict(config)
    for action in parser()._actions:
        value = config.get(action.dest)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wrong = None
        if action.dest == "resume" and isinstance(value, bool):
            checked["resume"] = "auto" if value else None
        elif action.dest == "allow_change" and isinstance(value, str):
            checked["allow_change"] = [value]
        elif action.dest == "clear_cache_threshold":
            if not number and not isinstance(value, str):
                wrong = "a size such as 4GB"
            else:
                try:
                    checked[action.dest] = _size(str(value))
                except argparse.ArgumentTypeError:
                    wrong = "a size such as 500MB or 4GB"
        elif action.nargs == 0:
            wrong = None if isinstance(value, bool) else "true or false"
        elif action.type is int:
            if number and math.isfinite(value) and value == int(value):
                checked[action.dest] = int(value)
            else:
                wrong = "a whole number"
        elif action.type is float:
            wrong = None if number else "a number"
            if isinstance(value, str) and _is_float(value):
                wrong = "a number, without quotes"
        elif action.dest == "optimizer" and isinstance(value, str) and value.lower() in lora_values.OPTIMIZERS:
            checked["optimizer"] = value.lower()  # as mlx-lm does
        elif action.choices is not None:
            wrong = None if value in list(action.choices) else f"one of {', '.join(map(str, action.choices))}"
        elif action.dest == "allow_change":
            wrong = None if isinstance(value, list) else "a list of names"
        elif not isinstance(value, str):
            wrong = "text"
        if wrong:
            raise InputError(f"{file}: {action.dest} is {value!r}; it must be {wrong}")
    for key in FEATURES:
        if config.get(key) is not None and not isinstance(config[key], str):
            raise InputError(f"{file}: {key} is {config[key]!r}; it must be text")
    for key in ("optimizer_config", "lora_parameters", "lr_schedule", "hf_dataset"):
        value, kinds = config.get(key), (dict, list) if key == "hf_dataset" else dict
        if value is not None and not isinstance(value, kinds):
            raise InputError(f"{file}: {key} is {value!r}; it must be a mapping")
    return checked


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _size(text: str) -> int:
    """Bytes from a text such as 4GB, as mlx-lm reads it."""
    try:
        return int(mlx_lm_lora._parse_size(text))
    except (KeyError, ValueError, ArithmeticError):  # the last of text without a number
        raise argparse.ArgumentTypeError(f"it must be a size such as 500MB or 4GB, not {text!r}") from None


def parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser, and our options; what is not given is None, so that YAML can say it."""
    made = mlx_lm_lora.build_parser()
    made.prog = "compiled-adam lora"
    made.description = "Fine-tuning with mlx-lm's models, data sets and files, on a compiled step."
    made.epilog = (
        "Ctrl-C and SIGTERM finish the step and save. Beside the adapters are log.jsonl, a line of JSON for every step,"
        " and checkpoints, from which --resume goes on exactly."
    )
    for action in made._actions:
        if action.dest in ("clear_cache_threshold", "trust_remote_code"):
            action.default = None  # mlx-lm's defaults of 0 and False would hide the YAML keys
        if action.dest == "optimizer":
            action.type = str.lower
        if action.dest == "clear_cache_threshold":
            action.type = _size
            action.help = (
                "After a step, give the allocator's cached memory back to the system if it is more than this"
                " (such as 4GB). Memory in the cache is used again by the next step without asking the system, so a"
                " small threshold makes steps slow; set one if other programs need the memory. Default: 0, never"
                " (mlx_lm.lora: after every step)."
            )
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    ours = made.add_argument_group("optimizer, also as YAML keys; for adam and adamw")
    ours.add_argument("--max-grad-norm", type=float, help="Clip gradients to this global norm. Default: no clipping.")
    ours.add_argument(
        "--skip-nonfinite", **switch, help="Skip updates whose gradients are infinite or not a number. Default: on."
    )
    ours.add_argument("--moments", choices=POLICIES, help="How the moments are stored. Default: float32.")
    ours.add_argument("--weight-decay", type=float, help="Weight decay for adamw. Default: 0.01.")
    ours.add_argument(
        "--bias-correction", **switch, help="Adam's bias correction. Default: on, unlike mlx_lm.lora, where it is off."
    )
    ours.add_argument(
        "--decay-matrices-only",
        **switch,
        help="No weight decay for biases, norms and embeddings, in adamw. Default: off.",
    )
    loop = made.add_argument_group("training, also as YAML keys")
    loop.add_argument(
        "--max-traces",
        type=int,
        help="How many batch shapes stay compiled; the least recently used is dropped. Default: 64.",
    )
    loop.add_argument(
        "--bucket",
        type=float,
        nargs="?",
        const=1.25,
        metavar="RATIO",
        help="Pad batches to lengths of a geometric series with this ratio (1.25 if none is given) instead of to"
        " multiples of 32, so that fewer shapes are compiled; says what that costs in padding. Default: off.",
    )
    loop.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="Keep the newest N checkpoints, and only N numbered adapter files; 0 writes no checkpoints. Default:"
        f" {KEPT} checkpoints, and all adapter files like mlx_lm.lora.",
    )
    loop.add_argument(
        "--save-best", **switch, help="Keep the adapters with the lowest validation loss in best/. Default: off."
    )
    loop.add_argument(
        "--early-stop-patience",
        type=int,
        metavar="N",
        help="End after N validations in a row without a new lowest loss. Default: never.",
    )
    loop.add_argument(
        "--nonfinite-limit",
        type=int,
        metavar="N",
        help="Stop after N steps in a row whose loss or gradient is infinite or not a number. Default: 20.",
    )
    loop.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="Go on from this checkpoint, as if the run had never stopped. Without PATH (or with auto): from the newest"
        " undamaged checkpoint beside the adapters, or from the beginning if none was ever written. Default: start from"
        " the beginning.",
    )
    loop.add_argument(
        "--allow-change",
        action="append",
        metavar="NAME",
        help="With --resume: a setting that may differ from the checkpoint's, such as learning_rate; repeatable.",
    )
    loop.add_argument(
        "--report", **switch, help="Draw the run into report.html beside the adapters when it ends. Default: off."
    )
    workers = made.add_argument_group(
        "several workers, also as YAML keys; for processes that mlx.launch starts, which share every batch"
    )
    workers.add_argument(
        "--reduce-dtype",
        choices=DTYPES,
        help="The dtype in which gradients are communicated; param, the parameters' dtype, halves the bytes for"
        " half-precision weights."
        " Default: float32.",
    )
    workers.add_argument(
        "--shard-state",
        **switch,
        help="Spread the optimizer's state over the workers: each keeps the state of its part of the parameters. The"
        " results are the same, in less memory, but new weights are communicated, too. Default: off.",
    )
    workers.add_argument(
        "--worker-timeout",
        type=float,
        metavar="SECONDS",
        help="Stop when the other workers are silent for so many seconds, or for five of the longest steps if that is"
        " more."
        " Default: 60.",
    )
    return made


def check_together(args: types.SimpleNamespace) -> list[str]:
    """Raises ValueError for options that contradict each other, or that the command line has for nothing.

    Returns sentences about options that mlx-lm accepts and that are not used.
    """
    given, notes = set(args.given), []
    if not args.train and not args.test:
        raise InputError("there is nothing to do; give --train, --test or both")
    if not args.train:
        for name in sorted(given & {*OURS, "resume_adapter_file"} - {"worker_timeout"}):
            hint = "; --adapter-path says what is tested" if name == "resume_adapter_file" else ""
            raise InputError(f"{called(name)} is an option of training, but there is no --train{hint}")
        if unused := [called(name) for name in _OF_TRAINING if name in given]:
            notes.append(f"{', '.join(unused)}: not used by --test, which reads adapter_config.json")
    if not args.test and "test_batches" in given:
        raise InputError(f"{called('test_batches')} is an option of testing, but there is no --test")
    for name in ("resume", "resume_adapter_file"):
        if getattr(args, name) == "":
            raise InputError(f"{called(name)} is empty; give a path, or leave it out")
    if args.resume not in (None, "auto") and args.resume_adapter_file:
        raise InputError(
            "resume continues a run and resume_adapter_file begins one with old weights; give one of them. Or give"
            " --resume without a path: then the weights are used if there is no checkpoint yet"
        )
    if args.allow_change and not args.resume:
        raise InputError("allow_change is about a checkpoint's settings, but there is no --resume")
    if args.decay_matrices_only and args.weight_decay == 0:
        raise InputError("decay_matrices_only chooses what decays, but weight_decay is 0; leave one of them out")
    # What wins is what mlx-lm takes. In one file both may stand: mlx-lm's own example has all of them.
    for loser, winner, meaning in (
        ("learning_rate", "lr_schedule", "which sets the learning rate"),
        ("data", "hf_dataset", "which says where the data are"),
        *((feature, "hf_dataset", "which has a key of this name itself") for feature in FEATURES),
    ):
        if not getattr(args, winner, None):
            continue
        if loser in given:
            raise InputError(f"{called(loser)} is given beside {winner}, {meaning}; give one of them")
        if loser in args.in_file:
            notes.append(f"{loser} is not used, because there is {winner}, {meaning}")
    if args.train:
        notes += _unused_by_optimizer(args)
    for what in ("model", "data"):
        value = str(getattr(args, what))
        if what == "data" and getattr(args, "hf_dataset", None):
            continue
        if not Path(value).exists() and (value.startswith((".", "/", "~")) or value.count("/") > 1):
            raise InputError(f"{what} is {value!r}, which does not exist and is not a name on Hugging Face either")
    return notes


def _unused_by_optimizer(args: types.SimpleNamespace) -> list[str]:
    notes = [
        f"optimizer_config of {name} is not used: the optimizer is {args.optimizer}"
        for name, config in args.optimizer_config.items()
        if config and name != args.optimizer
    ]
    own = args.optimizer_config.get(args.optimizer, {})
    rate = "lr_schedule" if args.lr_schedule else "learning_rate"
    if args.optimizer == "adafactor" and own.get("relative_step", True) and rate in {*args.given, *args.in_file}:
        notes.append(
            f"{rate} is not used: adafactor computes a rate of its own, unless optimizer_config has"
            " {adafactor: {relative_step: false}}"
        )
    if args.fine_tune_type == "full" and "lora_parameters" in args.in_file:
        notes.append("lora_parameters is not used: fine_tune_type is full")
    return notes
