"""The options of ``compiled-adam lora``: mlx-lm's own parser and YAML keys, and what this command has beside them."""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from mlx_lm import lora as mlx_lm_lora

from .errors import InputError
from .moments import POLICIES
from .reduce import DTYPES

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
YAML_ONLY = {"hf_dataset", "prompt_feature", "completion_feature", "text_feature", "chat_feature"}


def settings(argv: Sequence[str], made: argparse.ArgumentParser | None = None) -> types.SimpleNamespace:
    """Command line before YAML before defaults, as in mlx-lm; an unknown YAML key is a ValueError that names it.

    ``made`` is a `parser` with more options; default: without. ``given`` has the names of our options that the command
    line has.
    """
    found = vars((made or parser()).parse_args(argv))
    given = sorted(name for name in OURS if found[name] is not None)
    defaults = {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS}
    if found["config"]:
        with open(found["config"]) as file:
            try:
                config = yaml.load(file, mlx_lm_lora.yaml_loader) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"{found['config']} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            raise InputError(f"{found['config']} is not a mapping of options to values")
        if unknown := sorted(str(key) for key in config.keys() - defaults.keys() - found.keys() - YAML_ONLY):
            raise InputError(f"{found['config']} has the unknown key {unknown[0]!r}; --help lists the options")
        config = _checked(config, found["config"])
        for key, value in config.items():
            if found.get(key) is None:
                found[key] = value
    for key, value in defaults.items():
        if found.get(key) is None:
            found[key] = value
    return types.SimpleNamespace(**found, given=given)


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
        elif action.choices is not None:
            wrong = None if value in action.choices else f"one of {', '.join(map(str, action.choices))}"
        elif action.dest == "allow_change":
            wrong = None if isinstance(value, list) else "a list of names"
        elif not isinstance(value, str):
            wrong = "text"
        if wrong:
            raise InputError(f"{file}: {action.dest} is {value!r}; it must be {wrong}")
    for key in ("optimizer_config", "lora_parameters", "lr_schedule", "hf_dataset"):
        value, kinds = config.get(key), (dict, list) if key == "hf_dataset" else dict
        if value is not None and not isinstance(value, kinds):
            raise InputError(f"{file}: {key} is {value!r}; it must be a mapping")
    return checked


def _size(text: str) -> int:
    """Bytes from a text such as 4GB, as mlx-lm reads it."""
    try:
        return int(mlx_lm_lora._parse_size(text))
    except (KeyError, ValueError):
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
    made.set_defaults(clear_cache_threshold=None)  # mlx-lm's default of 0 would hide the YAML key
    for action in made._actions:
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
    ours.add_argument("--weight-decay", type=float, help="Of adamw. Default: 0.01.")
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
        "--max-traces", type=int, help="How many batch shapes stay compiled; the least recently used goes. Default: 64."
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
        help="Go on from this checkpoint, or from the newest whole one beside the adapters (auto, or no value), as if"
        " the run had never stopped. Default: start anew.",
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
        help="What gradients are communicated in: param, the parameters', halves it for half-precision weights."
        " Default: float32.",
    )
    workers.add_argument(
        "--shard-state",
        **switch,
        help="Spread the optimizer's state over the workers: each keeps that of its part of the parameters. The same"
        " results in less memory; new weights are communicated, too. Default: off.",
    )
    workers.add_argument(
        "--worker-timeout",
        type=float,
        metavar="SECONDS",
        help="Stop when the other workers are silent for so long, or for five of the longest steps if that is more."
        " Default: 60.",
    )
    return made


def check_together(args: types.SimpleNamespace) -> None:
    """Raises ValueError for options that contradict each other."""
    if not args.train and not args.test:
        raise InputError("there is nothing to do; give --train, --test or both")
    of_training = [name for name in args.given if name != "worker_timeout"]
    if not args.train and of_training:
        raise InputError(f"{of_training[0]} is an option of training, but there is no --train")
    if args.resume and args.resume_adapter_file:
        raise InputError("resume continues a run and resume_adapter_file begins one with old weights; give one of them")
    if args.allow_change and not args.resume:
        raise InputError("allow_change is about a checkpoint's settings, but there is no --resume")
    if args.decay_matrices_only and args.weight_decay == 0:
        raise InputError("decay_matrices_only chooses what decays, but weight_decay is 0; leave one of them out")
    for what in ("model", "data"):
        value = str(getattr(args, what))
        if not Path(value).exists() and (value.startswith((".", "/", "~")) or value.count("/") > 1):
            raise InputError(f"{what} is {value!r}, which does not exist and is not a name on Hugging Face either")
