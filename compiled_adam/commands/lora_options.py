"""The options of ``compiled-adam lora``: mlx-lm's own, and the ones that only this command has."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_lm import lora as mlx_lm_lora

from ..distributed import DTYPES
from ..finetune import lora_values
from ..finetune.options import TrainOptions
from ..finetune.trainable import DTYPES as DTYPES_OF_WEIGHTS
from ..optimizers import AdamW
from ..update import POLICIES
from . import like_mlx_lm
from .lora_yaml import YAML_ONLY, read, size
from .parsing import Help, Parser

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
_SAMPLES = (
    "Let the model answer N prompts of the validation set before and after the training; the report shows both."
    " Default: {default}."
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
_ALLOW = (
    "With --resume: a setting that may differ from the checkpoint's, such as learning_rate; repeatable. Default: none."
)
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
_SKIP = "Skip updates whose gradients are infinite or not a number. Default: on."
_BIAS = "The bias correction of adam and adamw. Default: on, unlike mlx_lm.lora, where it is off."
# The groups of `--help`. A name alone is an option of mlx-lm.
GROUPS: dict[str, tuple[str | Option, ...]] = {
    "model": (
        *("model", "trust_remote_code", "fine_tune_type", "num_layers", "resume_adapter_file"),
        Option("dtype", tuple(DTYPES_OF_WEIGHTS), _DTYPE),
    ),
    "data": (
        *("data", "mask_prompt"),
        Option("assistant_only_loss", bool, _TURNS),
        *("max_seq_length", "batch_size"),
        Option("group_by_length", bool, _GROUP),
        Option("batch_tokens", int, _BATCH_TOKENS),
        Option("bucket", float, _BUCKET, {"nargs": "?", "const": 1.25, "metavar": "RATIO"}),
    ),
    "training": (
        *("config", "train", "test", "iters"),
        Option("epochs", float, _EPOCHS, {"metavar": "N"}),
        *("seed", "grad_accumulation_steps", "grad_checkpoint"),
        Option("chunked_loss", bool, _CHUNKED),
        "clear_cache_threshold",
        Option("max_traces", int, _TRACES),
        *("steps_per_report", "steps_per_eval", "val_batches", "test_batches"),
        Option("early_stop_patience", int, _PATIENCE),
        Option("nonfinite_limit", int, _LIMIT),
        Option("like_mlx_lm", bool, _LIKE),
    ),
    "optimizer": (
        *("optimizer", "learning_rate"),
        Option("max_grad_norm", float, "Clip gradients to this global norm. Default: no clipping."),
        Option("skip_nonfinite", bool, _SKIP),
        Option("moments", POLICIES, "The format in which adam and adamw store the moments. Default: {default}."),
        Option("weight_decay", float, "Weight decay for adamw. Default: {default}."),
        Option("bias_correction", bool, _BIAS),
        Option(
            "decay_matrices_only", bool, "No weight decay for biases, norms and embeddings, in adamw. Default: off."
        ),
    ),
    "saving": (
        *("adapter_path", "save_every"),
        Option("keep_checkpoints", int, _KEEP),
        Option("save_best", bool, "Keep the adapters with the lowest validation loss in best/. Default: off."),
        Option("resume", str, _RESUME, {"nargs": "?", "const": "auto", "metavar": "PATH"}),
        Option("allow_change", str, _ALLOW, {"action": "append", "metavar": "NAME"}),
        Option("report", bool, "Draw the run into report.html beside the adapters when it ends. Default: off."),
        Option("sample_prompts", int, _SAMPLES),
        *("report_to", "project_name"),
    ),
    "workers, which mlx.launch starts and which share each batch": (
        Option("reduce_dtype", DTYPES, _REDUCE),
        Option("shard_state", bool, _SHARD),
        Option("worker_timeout", float, _TIMEOUT, {"metavar": "SECONDS"}),
    ),
}
# Defaults are those of `train`, but for these. None: not asked for; then the optimizer's own default holds, or `KEPT`.
_OTHER_DEFAULTS = {
    "chunked_loss": True,
    "group_by_length": True,
    "keep_checkpoints": None,
    "nonfinite_limit": 20,
    "sample_prompts": 0,
}
_DEFAULTS = {**{field.name: field.default for field in dataclasses.fields(TrainOptions)}, **_OTHER_DEFAULTS}
OURS: dict[str, Any] = {
    option.name: _DEFAULTS.get(option.name)
    for group in GROUPS.values()
    for option in group
    if isinstance(option, Option)
}
SWITCHES = [o.name for group in GROUPS.values() for o in group if isinstance(o, Option) and o.kind is bool]
# Help for options of mlx-lm whose own help says less than they do here.
_CLEARER = {
    "model": "The folder of a model, or its name on Hugging Face.",
    "num_layers": "How many of the last layers are trained; -1 for all.",
    "resume_adapter_file": "Begin a new run with the weights in this file. To continue a run, use --resume.",
    "data": "A folder with train.jsonl, valid.jsonl and test.jsonl, or a data set on Hugging Face.",
    "project_name": "The name of the project, for --report-to.",
    "mask_prompt": "Train no token of the prompts.",
    "config": "A YAML file with options; `compiled-adam init` writes one. The command line wins.",
    "train": "Train the model.",
    "test": "Compute the loss on the test set, after the training if there is one.",
    "clear_cache_threshold": (
        "After a step, give MLX's cached memory back to the system if it is more than this (such as 4GB). The next step"
        " reuses memory in the cache, so a small threshold makes steps slow. Set a threshold if other programs need the"
        " memory. 0 means never (mlx_lm.lora: after every step)."
    ),
    "optimizer": (
        "The optimizer. adam and adamw are compiled_adam's, the others are MLX's, in float32. muon is Muon for the"
        " matrices of layers, and AdamW at 0.015 of the learning rate for all other parameters."
    ),
    "learning_rate": "The learning rate. In a YAML file, lr_schedule can stand instead.",
    "adapter_path": "The folder for adapters, log and checkpoints.",
    "save_every": "Save the adapters and a checkpoint every N iterations.",
}
_METAVARS = {
    "config": "FILE",
    "resume_adapter_file": "FILE",
    "adapter_path": "FOLDER",
    "clear_cache_threshold": "SIZE",
    "report_to": "NAMES",
    "project_name": "NAME",
}
_EXAMPLES = """\
examples:
  # LoRA; train.jsonl and valid.jsonl are in the folder data
  compiled-adam lora --train --model mlx-community/Qwen3-0.6B-4bit --data data
  # a job whose options are in a file; it goes on if it was stopped before
  compiled-adam lora -c lora.yaml --train --resume
  # the loss of the adapters on data/test.jsonl
  compiled-adam lora --test --model mlx-community/Qwen3-0.6B-4bit --data data

After Ctrl-C or SIGTERM the run finishes its step and saves. The folder of the
adapters also has log.jsonl, with a line for each step, and checkpoints.
--resume continues from a checkpoint exactly."""


def settings(argv: Sequence[str], made: Parser | None = None) -> types.SimpleNamespace:
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


def parser() -> Parser:
    """mlx-lm's options and ours in one. An option that is not given is None, so that the YAML file can have it."""
    made = Parser(
        prog="compiled-adam lora",
        usage="compiled-adam lora (--train | --test) --model MODEL --data DATA [options]",
        description="Fine-tunes a language model, with the models, data sets, flags and files of\n"
        "mlx_lm.lora. Every option is also a YAML key, with _ for -.",
        epilog=_EXAMPLES,
        formatter_class=Help,
    )
    theirs = {action.dest: action for action in mlx_lm_lora.build_parser()._actions if action.dest != "help"}
    shown = effective_defaults()
    for title, options in GROUPS.items():
        group = made.add_argument_group(title)
        for option in options:
            if isinstance(option, Option):
                text = option.help.format(default=shown[option.name])
                group.add_argument(
                    f"--{option.name.replace('_', '-')}", help=text, **{**_kind(option.kind), **option.more}
                )
            elif option in theirs:  # mlx-lm 0.31 lacks some
                group._add_action(_as_here(theirs.pop(option), shown.get(option)))
    if theirs:
        group = made.add_argument_group("more of mlx_lm.lora")
        for name, action in theirs.items():
            group._add_action(_as_here(action, shown.get(name)))
    return made


def _as_here(action: argparse.Action, default: Any) -> argparse.Action:
    """An option of mlx-lm with the help and the reading of its values that it has here."""
    words = {"None": "none", "False": "off", "True": "on"}
    text = (_CLEARER.get(action.dest, action.help) or "").rstrip(".")
    action.help = f"{text}. Default: {words.get(str(default), default)}."
    action.default = None  # mlx-lm's 0 and False would hide the YAML keys
    by_type: dict[Any, str] = {int: "N", float: "X"}
    action.metavar = _METAVARS.get(action.dest, by_type.get(action.type))
    if action.dest == "optimizer":
        action.type, action.choices = str.lower, tuple(lora_values.OPTIMIZERS)
    if action.dest == "clear_cache_threshold":
        action.type = size
    return action


def effective_defaults() -> dict[str, Any]:
    """The value that each option has if nobody gives it: its default here, or that of the optimizer."""
    parameters = inspect.signature(AdamW).parameters
    of_adamw = {name: parameters[name].default for name in ("max_grad_norm", "moments", "weight_decay")}
    on = dict.fromkeys(("bias_correction", "skip_nonfinite"), True)  # `like_mlx_lm.options_of_adam`
    switches = {
        option.name: bool(OURS[option.name])
        for group in GROUPS.values()
        for option in group
        if isinstance(option, Option) and option.kind is bool
    }
    return {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS, **switches, **of_adamw, **on}


def _kind(kind: Any) -> dict[str, Any]:
    """The arguments of argparse for a ``kind`` of `Option`."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if kind is int:
        return {"type": int, "metavar": "N"}
    if kind is float:
        return {"type": float, "metavar": "X"}
    return {"type": kind} if isinstance(kind, type) else {"choices": kind}
