"""Options of a job that contradict each other, or that it does not use."""

from __future__ import annotations

import types

from .. import schedulers
from ..base import InputError
from ..finetune import places
from ..finetune.lora_values import FEATURES
from ..finetune.options import called
from .lora_options import OURS

_ALSO_OF_TESTS = {"dtype", "worker_timeout", "like_mlx_lm", "assistant_only_loss", "chunked_loss"}
# Options of mlx-lm that a test does not read.
_OF_TRAINING = (
    *("fine_tune_type", "optimizer", "num_layers", "iters", "val_batches", "learning_rate", "steps_per_report"),
    *("steps_per_eval", "grad_accumulation_steps", "save_every", "grad_checkpoint"),
)


def check_together(args: types.SimpleNamespace) -> list[str]:
    """Raises ValueError for options that contradict each other, or that the command line has for nothing.

    Returns sentences about options that mlx-lm accepts and that are not used.
    """
    given, notes = set(args.given), []
    if not args.train and not args.test:
        raise InputError(
            "there is nothing to do; give --train, --test or both, as in `compiled-adam lora --train --model MODEL"
            " --data DATA`"
        )
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
        notes += [] if args.epochs else short_schedule(args)
    for what in ("model", *([] if getattr(args, "hf_dataset", None) else ["data"])):
        places.check(what, str(getattr(args, what)))
    return notes


def not_named(args: types.SimpleNamespace) -> list[str]:
    """Sentences about a model and data that nobody named, and that are downloaded."""
    named = {*args.given, *args.in_file, *(["data"] if getattr(args, "hf_dataset", None) else [])}
    return [
        f"{what} (--{what}) is not given, so it is mlx-lm's default, {getattr(args, what)} on Hugging Face"
        for what in ("model", "data")
        if what not in named
    ]


def short_schedule(args: types.SimpleNamespace) -> list[str]:
    """A sentence if the schedule ends before the run."""
    end = None if args.lr_schedule is None else schedulers.last_update(args.lr_schedule)
    updates = -(-args.iters // args.grad_accumulation_steps)
    if end is None or end >= updates:
        return []
    rate = schedulers.from_config(args.lr_schedule)(end).item()
    name = "iters" if args.epochs is None else "epochs"
    by = "" if name in {*args.given, *args.in_file} else " by default"
    return [
        f"lr_schedule ends at update {end}, but the run has {updates} ({name} is {getattr(args, name):g}{by}): from"
        f" there on the learning rate stays {rate:g}{'' if rate else ', so nothing more is learned'}. Give --iters"
        f" {end * args.grad_accumulation_steps}, or a longer schedule"
    ]


def _unused_by_optimizer(args: types.SimpleNamespace) -> list[str]:
    used = {args.optimizer, *(["adamw"] if args.optimizer == "muon" and not args.like_mlx_lm else [])}
    notes = [
        f"optimizer_config of {name} is not used: the optimizer is {args.optimizer}"
        for name, config in args.optimizer_config.items()
        if config and name not in used
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
