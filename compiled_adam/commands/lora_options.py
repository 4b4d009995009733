"""The options of ``compiled-adam lora``, which are mlx-lm's own and ours, and of ``compiled-adam plan``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

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


# The groups of `--help`: options of mlx-lm, and ours.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("model", "trust_remote_code", "fine_tune_type", "num_layers", "resume_adapter_file", "dtype"),
    "data": (
        *("data", "mask_prompt", "assistant_only_loss", "max_seq_length", "batch_size", "group_by_length"),
        *("batch_tokens", "bucket"),
    ),
    "training": (
        *("config", "train", "test", "iters", "epochs", "seed", "grad_accumulation_steps", "grad_checkpoint"),
        *("chunked_loss", "clear_cache_threshold", "max_traces", "steps_per_report", "steps_per_eval", "val_batches"),
        *("test_batches", "early_stop_patience", "nonfinite_limit", "like_mlx_lm"),
    ),
    "optimizer": (
        *("optimizer", "learning_rate", "max_grad_norm", "skip_nonfinite", "moments", "weight_decay"),
        *("bias_correction", "decay_matrices_only"),
    ),
    "saving": (
        *("adapter_path", "save_every", "keep_checkpoints", "save_best", "resume", "allow_change", "report"),
        *("sample_prompts", "report_to", "project_name"),
    ),
    "workers, which mlx.launch starts and which share each batch": ("reduce_dtype", "shard_state", "worker_timeout"),
}
# The options that mlx-lm does not have. A new one is in `GROUPS`, `_KINDS` and `_HELP`.
SWITCHES = (
    *("assistant_only_loss", "group_by_length", "chunked_loss", "like_mlx_lm", "skip_nonfinite", "bias_correction"),
    *("decay_matrices_only", "save_best", "report", "shard_state"),
)
_WHOLE = ("batch_tokens", "max_traces", "early_stop_patience", "nonfinite_limit", "keep_checkpoints", "sample_prompts")
_KINDS: dict[str, Mapping[str, Any]] = {  # arguments of argparse
    **{name: {"action": argparse.BooleanOptionalAction} for name in SWITCHES},
    **{name: {"type": int} for name in _WHOLE},
    **{name: {"type": float} for name in ("epochs", "max_grad_norm", "weight_decay", "worker_timeout")},
    "bucket": {"type": float, "nargs": "?", "const": 1.25},
    "resume": {"nargs": "?", "const": "auto"},
    "allow_change": {"action": "append"},
    "dtype": {"choices": tuple(DTYPES_OF_WEIGHTS)},
    "moments": {"choices": POLICIES},
    "reduce_dtype": {"choices": DTYPES},
}
# Defaults are those of `train`, but for these. None: not asked for; then the optimizer's own default holds, or `KEPT`.
_DEFAULTS = {
    **{field.name: field.default for field in dataclasses.fields(TrainOptions)},
    "chunked_loss": True,
    "group_by_length": True,
    "keep_checkpoints": None,
    "nonfinite_limit": 20,
    "sample_prompts": 0,
}
OURS: dict[str, Any] = {name: _DEFAULTS.get(name) for name in _KINDS}
# The help of our options, and of those of mlx-lm whose own help says less than they do here. The default is added to a
# text that does not name it.
_HELP = {
    "model": "The folder of a model, or its name on Hugging Face.",
    "num_layers": "How many of the last layers are trained; -1 for all.",
    "resume_adapter_file": "Begin a new run with the weights in this file. To continue a run, use --resume.",
    "dtype": "Cast the model's weights to this dtype after loading; full fine-tuning trains and saves them in it."
    " Adapters of LoRA and DoRA stay float32. Not for quantized models. Default: the dtype in which the model is"
    " stored.",
    "data": "A folder with train.jsonl, valid.jsonl and test.jsonl, or a data set on Hugging Face.",
    "mask_prompt": "Train no token of the prompts.",
    "assistant_only_loss": "Train every turn of the assistant in a conversation, and nothing else. An example whose"
    " turns the model's chat template does not show for certain is an error.",
    "group_by_length": "Batches have examples of similar length, the longest first of all, and every example is trained"
    " in each epoch. Default: on, unlike mlx_lm.lora.",
    "batch_tokens": "A batch has as many examples of similar length as fit into N positions (examples times padded"
    " length); --batch-size is for validation then. Default: --batch-size examples.",
    "bucket": "Pad batches to lengths of a geometric series with this ratio (1.25 if none is given), so that fewer"
    " shapes are compiled. A line says how much padding this adds. Default: off.",
    "config": "A YAML file with options; `compiled-adam init` writes one. The command line wins.",
    "train": "Train the model.",
    "test": "Compute the loss on the test set, after the training if there is one.",
    "epochs": "Train for so many epochs, instead of --iters. Default: as many as --iters are; a line says how many.",
    "chunked_loss": "Compute the logits of a part of the target tokens at a time, and none for prompts and padding."
    " Loss and gradient stay the same, and the memory for all logits is saved.",
    "clear_cache_threshold": "After a step, give MLX's cached memory back to the system if it is more than this (such"
    " as 4GB). The next step reuses memory in the cache, so a small threshold makes steps slow. Set a threshold if"
    " other programs need the memory. 0 means never (mlx_lm.lora: after every step).",
    "max_traces": "The number of batch shapes that stay compiled; the least recently used is dropped.",
    "early_stop_patience": "Stop when the validation loss has not improved N times in a row. Default: never.",
    "nonfinite_limit": "Stop after N steps in a row whose loss or gradient is infinite or not a number.",
    "like_mlx_lm": "Compute what mlx_lm.lora computes: its batches, its loss, its schedules, Adam without bias"
    " correction, no skipped updates. Options that are given explicitly win.",
    "optimizer": "The optimizer. adam and adamw are compiled_adam's, the others are MLX's, in float32. muon is Muon for"
    " the matrices of layers, and AdamW at 0.015 of the learning rate for all other parameters.",
    "learning_rate": "The learning rate. In a YAML file, lr_schedule can stand instead.",
    "max_grad_norm": "Clip gradients to this global norm. Default: no clipping.",
    "skip_nonfinite": "Skip updates whose gradients are infinite or not a number.",
    "moments": "The format in which adam and adamw store the moments.",
    "weight_decay": "Weight decay for adamw.",
    "bias_correction": "The bias correction of adam and adamw. Default: on, unlike mlx_lm.lora, where it is off.",
    "decay_matrices_only": "No weight decay for biases, norms and embeddings, in adamw.",
    "adapter_path": "The folder for adapters, log and checkpoints.",
    "save_every": "Save the adapters and a checkpoint every N iterations.",
    "keep_checkpoints": "Keep only the newest N checkpoints and N numbered adapter files; 0 writes no checkpoints."
    f" Default: {KEPT} checkpoints, and all adapter files, as mlx_lm.lora does.",
    "save_best": "Keep the adapters with the lowest validation loss in best/.",
    "resume": "Continue from this checkpoint, as if the run had never stopped. Without PATH (or with auto): from the"
    " newest undamaged checkpoint beside the adapters, or from the beginning if none was ever written. Default: start"
    " from the beginning.",
    "allow_change": "With --resume: a setting that may differ from the checkpoint's, such as learning_rate;"
    " repeatable.",
    "report": "Draw the run into report.html beside the adapters when it ends.",
    "sample_prompts": "Let the model answer N prompts of the validation set before and after the training; the report"
    " shows both.",
    "project_name": "The name of the project, for --report-to.",
    "reduce_dtype": "The dtype in which gradients are communicated. param, the dtype of the parameters, halves the"
    " bytes for half-precision weights.",
    "shard_state": "Spread the optimizer's state over the workers: each keeps the state of its part of the parameters."
    " Results are the same and memory is saved, but new weights must be communicated too.",
    "worker_timeout": "Stop when the other workers are silent for this many seconds, or for five of the longest steps"
    " if that is more.",
}
_METAVARS = {
    **dict.fromkeys(("config", "resume_adapter_file"), "FILE"),
    "adapter_path": "FOLDER",
    "clear_cache_threshold": "SIZE",
    "report_to": "NAMES",
    **dict.fromkeys(("project_name", "allow_change"), "NAME"),
    "bucket": "RATIO",
    "epochs": "N",
    "resume": "PATH",
    "worker_timeout": "SECONDS",
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
_PLANNED = {"workers": 1, "link": 5}  # defaults of `plan` alone
_PLAN_EXAMPLES = """\
examples:
  # LoRA with the defaults, on this machine
  compiled-adam plan my_model
  # full fine-tuning with small moments, on a machine of 16 GB
  compiled-adam plan my_model --fine-tune-type full --moments 8bit --memory 16
  # four machines that share each batch and the state of the optimizer
  compiled-adam plan my_model --workers 4 --batch-size 8 --shard-state

The memory is that of the largest batch: --batch-size examples of
--max-seq-length tokens. If the job does not fit, the last line has options with
which it does. The exit code is 1 if there are none, and else 0."""


def settings(argv: Sequence[str], made: Parser | None = None) -> types.SimpleNamespace:
    """The values of a job: from the command line, else from the YAML file, else the defaults, as in mlx-lm.

    ``made`` is a `parser`, maybe with more options. ``given`` has the names of the options on the command line, and
    ``in_file`` those in the YAML file.

    Raises ValueError for an unknown key in the file, or a value that no job can have.
    """
    made = made or parser()
    found = vars(made.parse_args(argv))
    given = sorted(name for name in found if found[name] is not None)
    defaults = {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS, **(_PLANNED if "planned" in found else {})}
    known = {*defaults, *found, *YAML_ONLY} - {"config"}
    config = read(found["config"], known, made._actions) if found["config"] else {}
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
    grouped = {name for names in GROUPS.values() for name in names}
    more = tuple(name for name in theirs if name not in grouped)
    defaults = effective_defaults()
    for title, names in {**GROUPS, "more of mlx_lm.lora": more}.items():
        group = made.add_argument_group(title)
        for name in names:
            if name in _KINDS:
                _describe(group.add_argument(f"--{name.replace('_', '-')}", **_KINDS[name]), defaults[name])
            elif name in theirs:  # mlx-lm 0.31 lacks some
                _describe(group._add_action(theirs[name]), defaults.get(name))
    return made


def plan_parser() -> Parser:
    made = parser()
    made.prog = "compiled-adam plan"
    made.usage = "compiled-adam plan MODEL [options]"
    made.description = (
        "Computes the memory and communication that a job needs. Reads only the model's\n"
        "config.json. Takes the options of compiled-adam lora."
    )
    made.epilog = _PLAN_EXAMPLES
    ours = made.add_argument_group("planning")
    ours.add_argument(
        "planned", metavar="MODEL", help="A folder with a config.json, the file itself, or the name of a cached model."
    )
    ours.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"How many processes share each batch. Default: {_PLANNED['workers']}.",
    )
    ours.add_argument(
        "--link",
        type=float,
        metavar="GB/S",
        help=f"The bandwidth between workers in each direction. Default: {_PLANNED['link']} (Thunderbolt 4).",
    )
    ours.add_argument(
        "--memory", type=float, metavar="GB", help="The memory of each worker. Default: the memory of this machine."
    )
    return made


def _describe(action: argparse.Action, default: Any) -> None:
    """Gives an option the help, and the reading of its values, that it has here."""
    text = (_HELP.get(action.dest) or action.help or "").rstrip(".")
    if "Default: " not in text:
        words = {"None": "none", "False": "off", "True": "on"}
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        text += f". Default: {words.get(shown, shown)}"
    action.help = f"{text}."
    action.default = None  # mlx-lm's 0 and False would hide the YAML keys
    by_type: dict[Any, str] = {int: "N", float: "X"}
    action.metavar = _METAVARS.get(action.dest, by_type.get(action.type))
    if action.dest == "optimizer":
        action.type, action.choices = str.lower, tuple(lora_values.OPTIMIZERS)
    if action.dest == "clear_cache_threshold":
        action.type = size


def effective_defaults() -> dict[str, Any]:
    """The value that each option has if nobody gives it: its default here, or that of the optimizer."""
    parameters = inspect.signature(AdamW).parameters
    of_adamw = {name: parameters[name].default for name in ("max_grad_norm", "moments", "weight_decay")}
    on = dict.fromkeys(("bias_correction", "skip_nonfinite"), True)  # `like_mlx_lm.options_of_adam`
    switches = {name: bool(OURS[name]) for name in SWITCHES}
    return {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS, **switches, **of_adamw, **on}
