"""The options of ``compiled-adam lora``: mlx-lm's own, and the ones that only this command has."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm import lora as mlx_lm_lora

from ..base import InputError
from ..distributed import DTYPES
from ..finetune import lora_values
from ..finetune.lora_values import FEATURES
from ..finetune.options import TrainOptions, called
from ..finetune.trainable import DTYPES as DTYPES_OF_WEIGHTS
from ..optimizers import AdamW
from ..update import POLICIES
from . import like_mlx_lm
from .lora_yaml import YAML_ONLY, read, size

KEPT = 2  # checkpoints, unless --keep-checkpoints says otherwise


class Option(NamedTuple):
    """An option that mlx-lm does not have; its ``help`` may name the ``{default}``."""

    name: str
    kind: Any  # int, float or str; bool for a switch; a collection of choices
    help: str
    more: Mapping[str, Any] = {}  # further arguments of argparse


_DTYPE = (
    "Cast the model's weights to this dtype after loading; full fine-tuning trains and saves them in it. Adapters of"
    " LoRA and DoRA stay float32. Not for quantized models. Default: the dtype in which the model is stored."
)
_TRACES = "The number of batch shapes that stay compiled; the least recently used is dropped. Default: {default}."
_PATIENCE = "Stop when the validation loss has not improved N times in a row. Default: never."
_BUCKET = (
    "Pad batches to lengths of a geometric series with this ratio (1.25 if none is given), so that fewer"
    " shapes are compiled. A line says how much padding this adds. Default: off."
)
_GROUP = (
    "Batches have examples of similar length, the longest first of all, and every example is trained in each epoch."
    " Default: on, unlike mlx_lm.lora."
)
_BATCH_TOKENS = (
    "A batch has as many examples of similar length as fit into N positions (examples times padded length);"
    " --batch-size is for validation then. Default: --batch-size examples."
)
_EPOCHS = "Train for so many epochs, instead of --iters. Default: as many as --iters are; a line says how many."
_LIKE = (
    "Compute what mlx_lm.lora computes: its batches, its loss, its schedules, Adam without bias correction, no skipped"
    " updates. Options that are given explicitly win. Default: off."
)
_TURNS = (
    "Train every turn of the assistant in a conversation, and nothing else. An example whose turns the model's chat"
    " template does not show for certain is an error. Default: off."
)
_CHUNKED = (
    "Compute the logits of a part of the target tokens at a time, and none for prompts and padding. Loss and gradient"
    " stay the same, and the memory for all logits is saved. Default: on."
)
_KEEP = (
    "Keep only the newest N checkpoints and N numbered adapter files; 0 writes no checkpoints. Default:"
    f" {KEPT} checkpoints, and all adapter files, as mlx_lm.lora does."
)
_LIMIT = "Stop after N steps in a row whose loss or gradient is infinite or not a number. Default: {default}."
_RESUME = (
    "Continue from this checkpoint, as if the run had never stopped. Without PATH (or with auto): from the newest"
    " undamaged checkpoint beside the adapters, or from the beginning if none was ever written. Default: start from the"
    " beginning."
)
_ALLOW = "With --resume: a setting that may differ from the checkpoint's, such as learning_rate; repeatable."
_REDUCE = (
    "The dtype in which gradients are communicated. param, the dtype of the parameters, halves the bytes for"
    " half-precision weights. Default: {default}."
)
_SHARD = (
    "Spread the optimizer's state over the workers: each keeps the state of its part of the parameters. Results are the"
    " same and memory is saved, but new weights must be communicated too. Default: off."
)
_TIMEOUT = (
    "Stop when the other workers are silent for this many seconds, or for five of the longest steps if that is more."
    " Default: {default:g}."
)
GROUPS = {
    "options of adam and adamw (also YAML keys)": (
        Option("max_grad_norm", float, "Clip gradients to this global norm. Default: no clipping."),
        Option("skip_nonfinite", bool, "Skip updates whose gradients are infinite or not a number. Default: on."),
        Option("moments", POLICIES, "The format in which the moments are stored. Default: {default}."),
        Option("weight_decay", float, "Weight decay for adamw. Default: {default}."),
        Option("bias_correction", bool, "Adam's bias correction. Default: on, unlike mlx_lm.lora, where it is off."),
        Option(
            "decay_matrices_only", bool, "No weight decay for biases, norms and embeddings, in adamw. Default: off."
        ),
    ),
    "options of training (also YAML keys)": (
        Option("dtype", tuple(DTYPES_OF_WEIGHTS), _DTYPE),
        Option("max_traces", int, _TRACES),
        Option("group_by_length", bool, _GROUP),
        Option("batch_tokens", int, _BATCH_TOKENS),
        Option("epochs", float, _EPOCHS, {"metavar": "N"}),
        Option("like_mlx_lm", bool, _LIKE),
        Option("chunked_loss", bool, _CHUNKED),
        Option("bucket", float, _BUCKET, {"nargs": "?", "const": 1.25, "metavar": "RATIO"}),
        Option("assistant_only_loss", bool, _TURNS),
        Option("keep_checkpoints", int, _KEEP),
        Option("save_best", bool, "Keep the adapters with the lowest validation loss in best/. Default: off."),
        Option("early_stop_patience", int, _PATIENCE),
        Option("nonfinite_limit", int, _LIMIT),
        Option("resume", str, _RESUME, {"nargs": "?", "const": "auto", "metavar": "PATH"}),
        Option("allow_change", str, _ALLOW, {"action": "append", "metavar": "NAME"}),
        Option("report", bool, "Draw the run into report.html beside the adapters when it ends. Default: off."),
    ),
    "options of several workers, which mlx.launch starts and which share each batch (also YAML keys)": (
        Option("reduce_dtype", DTYPES, _REDUCE),
        Option("shard_state", bool, _SHARD),
        Option("worker_timeout", float, _TIMEOUT, {"metavar": "SECONDS"}),
    ),
}
# Defaults are those of `train`, but for these. None: not asked for; then the optimizer's own default holds, or `KEPT`.
_OTHER_DEFAULTS = {"chunked_loss": True, "group_by_length": True, "keep_checkpoints": None, "nonfinite_limit": 20}
_DEFAULTS = {**{field.name: field.default for field in dataclasses.fields(TrainOptions)}, **_OTHER_DEFAULTS}
OURS: dict[str, Any] = {option.name: _DEFAULTS.get(option.name) for group in GROUPS.values() for option in group}
_ALSO_OF_TESTS = {"dtype", "worker_timeout", "like_mlx_lm", "assistant_only_loss", "chunked_loss"}
# Help for options of mlx-lm whose own help says less than they do here.
_CLEARER = {
    "optimizer": "The optimizer. adam and adamw are compiled_adam's, the others are MLX's. Default: adam.",
    "resume_adapter_file": "Begin a new run with the weights in this file. To continue a run, use --resume.",
    "save_every": "Save the adapters and a checkpoint every N iterations. Default: 100.",
}
# Options of mlx-lm that a test does not read.
_OF_TRAINING = (
    *("fine_tune_type", "optimizer", "num_layers", "iters", "val_batches", "learning_rate", "steps_per_report"),
    *("steps_per_eval", "grad_accumulation_steps", "save_every", "grad_checkpoint"),
)


def settings(argv: Sequence[str], made: argparse.ArgumentParser | None = None) -> types.SimpleNamespace:
    """The values of a job: from the command line, else from the YAML file, else the defaults, as in mlx-lm.

    ``made`` is a `parser`, maybe with more options. ``given`` has the names of the options on the command line, and
    ``in_file`` those in the YAML file.

    Raises ValueError for an unknown key in the file, or a value that no job can have.
    """
    made = made or parser()
    found = vars(made.parse_args(argv))
    given = sorted(name for name in found if found[name] is not None)
    defaults = {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS}
    known = {*defaults, *found, *YAML_ONLY} - {"config"}
    config = read(found["config"], known, parser()._actions) if found["config"] else {}
    like = config.get("like_mlx_lm") if found["like_mlx_lm"] is None else found["like_mlx_lm"]
    for values in (config, like_mlx_lm.DEFAULTS if like else {}, defaults):
        for key, value in values.items():
            if found.get(key) is None:
                found[key] = value
    args = types.SimpleNamespace(**found, given=given, in_file=sorted(config))
    lora_values.check(args)
    return args


def parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser, and our options. An option that is not given is None, so that the YAML file can have it."""
    made = mlx_lm_lora.build_parser()
    made.prog = "compiled-adam lora"
    made.description = (
        "Fine-tunes a language model, with the models, data sets, flags and files of mlx_lm.lora. Every option is also"
        " a YAML key, with _ for -."
    )
    made.epilog = (
        "After Ctrl-C or SIGTERM the run finishes its step and saves. The folder of the adapters also has log.jsonl,"
        " with a line for each step, and checkpoints. --resume continues from a checkpoint exactly."
    )
    for action in made._actions:
        if action.dest in ("clear_cache_threshold", "trust_remote_code"):
            action.default = None  # mlx-lm's defaults of 0 and False would hide the YAML keys
        if action.dest in _CLEARER:
            action.help = _CLEARER[action.dest]
        if action.dest == "optimizer":
            action.type = str.lower
        if action.dest == "clear_cache_threshold":
            action.type = size
            action.help = (
                "After a step, give MLX's cached memory back to the system if it is more than this (such as 4GB). The"
                " next step reuses memory in the cache, so a small threshold makes steps slow. Set a threshold if other"
                " programs need the memory. Default: 0, which means never (mlx_lm.lora: after every step)."
            )
    of_adamw = {name: each.default for name, each in inspect.signature(AdamW).parameters.items()}
    for title, options in GROUPS.items():
        group = made.add_argument_group(title)
        for option in options:
            text = option.help.format(default=of_adamw.get(option.name, OURS[option.name]))
            group.add_argument(f"--{option.name.replace('_', '-')}", help=text, **_kind(option.kind), **option.more)
    return made


def _kind(kind: Any) -> dict[str, Any]:
    """The arguments of argparse for a ``kind`` of `Option`."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if kind is int:
        return {"type": int, "metavar": "N"}
    return {"type": kind} if isinstance(kind, type) else {"choices": kind}


def check_together(args: types.SimpleNamespace) -> list[str]:
    """Raises ValueError for options that contradict each other, or that the command line has for nothing.

    Returns sentences about options that mlx-lm accepts and that are not used.
    """
    given, notes = set(args.given), []
    if not args.train and not args.test:
        raise InputError("there is nothing to do; give --train, --test or both")
    if not args.train:
        for name in sorted(given & {*OURS, "resume_adapter_file"} - _ALSO_OF_TESTS):
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
    if args.assistant_only_loss and args.mask_prompt:
        raise InputError(
            f"{called('assistant_only_loss')} trains every turn of the assistant and {called('mask_prompt')} only the"
            " last message; give one of them"
        )
    if args.allow_change and not args.resume:
        raise InputError("allow_change is about a checkpoint's settings, but there is no --resume")
    if args.batch_tokens and not args.group_by_length and "group_by_length" in {*args.given, *args.in_file}:
        raise InputError(
            f"{called('batch_tokens')} groups examples by length, but group_by_length is off; leave one of them out"
        )
    if args.decay_matrices_only and args.weight_decay == 0:
        raise InputError("decay_matrices_only chooses what decays, but weight_decay is 0; leave one of them out")
    # What wins is what mlx-lm takes. In one file both may stand: mlx-lm's own example has all of them.
    for loser, winner, meaning in (
        ("learning_rate", "lr_schedule", "which sets the learning rate"),
        ("iters", "epochs", "which says how long to train"),
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
