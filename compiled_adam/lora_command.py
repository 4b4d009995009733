"""``compiled-adam lora``: the jobs of ``mlx_lm.lora``, with its flags, YAML keys and files, on a compiled step."""

from __future__ import annotations

import argparse
import os
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import yaml
from mlx.utils import tree_flatten
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters, print_trainable_parameters
from mlx_lm.utils import load, save_config

from . import fingerprint, loader, schedulers
from .groups import decay_matrices
from .lora import train
from .moments import POLICIES
from .optimizers import Adam, AdamW

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
    "save_best": False,
    "early_stop_patience": None,
    "nonfinite_limit": 20,
    "resume": None,
    "allow_change": None,
}
# Options that decide which numbers a run computes, beside the optimizer's and those that `train` knows.
_OF_THE_RESULT = ("fine_tune_type", "num_layers", "lora_parameters", "mask_prompt", "bucket", "seed")
KEPT = 2  # checkpoints, unless --keep-checkpoints says otherwise
# Keys that mlx-lm reads from YAML only.
_YAML_ONLY = {"hf_dataset", "prompt_feature", "completion_feature", "text_feature", "chat_feature"}


def main(argv: Sequence[str]) -> None:
    """Runs the command line ``argv``; raises ValueError or OSError for what cannot be done."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    run(settings(argv))


def settings(argv: Sequence[str]) -> types.SimpleNamespace:
    """Command line before YAML before defaults, as in mlx-lm; an unknown YAML key is a ValueError that names it."""
    found = vars(parser().parse_args(argv))
    defaults = {**mlx_lm_lora.CONFIG_DEFAULTS, **OURS}
    if found["config"]:
        with open(found["config"]) as file:
            config = yaml.load(file, mlx_lm_lora.yaml_loader) or {}
        if not isinstance(config, dict):
            raise ValueError(f"{found['config']} is not a mapping of options to values")
        if unknown := sorted(config.keys() - defaults.keys() - found.keys() - _YAML_ONLY):
            raise ValueError(f"{found['config']} has the unknown key {unknown[0]!r}; --help lists the options")
        config = _checked(config, found["config"])
        for key, value in config.items():
            if found.get(key) is None:
                found[key] = value
    for key, value in defaults.items():
        if found.get(key) is None:
            found[key] = value
    return types.SimpleNamespace(**found)


def _checked(config: dict[str, Any], file: str) -> dict[str, Any]:
    """The values of a YAML file as the parser would have made them; ValueError for one that it would refuse."""
    checked = dict(config)
    for action in parser()._actions:
        value = config.get(action.dest)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wrong = None
        if action.nargs == 0 and not isinstance(value, bool):
            wrong = "true or false"
        elif (action.type is int and not (number and value == int(value))) or (action.type is float and not number):
            wrong = "a whole number" if action.type is int else "a number"
        elif action.choices is not None and value not in action.choices:
            wrong = f"one of {', '.join(map(str, action.choices))}"
        elif action.dest == "clear_cache_threshold" and isinstance(value, str):
            checked[action.dest] = mlx_lm_lora._parse_size(value)  # mlx-lm parses it on the command line only
        if wrong:
            raise ValueError(f"{file}: {action.dest} is {value!r}; it must be {wrong}")
    return checked


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
    return made


def _check_together(args: types.SimpleNamespace) -> None:
    """Raises ValueError for options that contradict each other."""
    if not args.train and not args.test:
        raise ValueError("there is nothing to do; give --train, --test or both")
    if not args.train:
        for name in ("resume", "save_best", "early_stop_patience", "bucket", "keep_checkpoints"):
            if getattr(args, name):
                raise ValueError(f"{name} is an option of training, but there is no --train")
    if args.resume and args.resume_adapter_file:
        raise ValueError("resume continues a run and resume_adapter_file begins one with old weights; give one of them")
    if args.allow_change and not args.resume:
        raise ValueError("allow_change is about a checkpoint's settings, but there is no --resume")
    if args.decay_matrices_only and args.weight_decay == 0:
        raise ValueError("decay_matrices_only chooses what decays, but weight_decay is 0; leave one of them out")
    for what in ("model", "data"):
        value = str(getattr(args, what))
        if not Path(value).exists() and (value.startswith((".", "/", "~")) or value.count("/") > 1):
            raise ValueError(f"{what} is {value!r}, which does not exist and is not a name on Hugging Face either")


def run(args: types.SimpleNamespace) -> None:
    """One job: training, testing, or both."""
    _check_together(args)
    optimizer = make_optimizer(args)  # before the model is loaded, which takes longer
    np.random.seed(args.seed)
    everything: Any = vars(args)
    callback = get_reporting_callbacks(
        args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=everything
    )
    tokenizer: Any
    if hasattr(args, "trust_remote_code"):
        trust = args.trust_remote_code
        model, tokenizer, *_ = load(args.model, tokenizer_config={"trust_remote_code": trust}, trust_remote_code=trust)
    else:  # mlx-lm before 0.32 has no such flag, and always trusts the tokenizer's code
        model, tokenizer, *_ = load(args.model, tokenizer_config={"trust_remote_code": True})
    try:
        train_set, valid_set, test_set = load_dataset(args, tokenizer)
    except IndexError:  # mlx-lm looks at the first example of each file
        raise ValueError(f"a file in {args.data} has no examples; give it some, or remove it") from None
    if args.train:
        _train(args, model, optimizer, train_set, valid_set, callback)
    elif args.adapter_path:
        load_adapters(model, args.adapter_path)
    if args.test:
        mlx_lm_lora.evaluate_model(args, model, test_set)


def _train(
    args: types.SimpleNamespace,
    model: nn.Module,
    optimizer: optim.Optimizer,
    train_set: Any,
    valid_set: Any,
    callback: TrainingCallback | None,
) -> None:
    base = fingerprint.of_arrays(dict(tree_flatten(model.parameters()))) if _checkpoints(args) or args.resume else None
    mx.random.seed(args.seed)
    model.freeze()
    if args.num_layers > len(model.layers):
        raise ValueError(f"num_layers is {args.num_layers}, but the model has {len(model.layers)} layers")
    if args.fine_tune_type == "full":
        for layer in model.layers[-max(args.num_layers, 0) :]:
            layer.unfreeze()
        args.lora_parameters = None
    else:
        dora = args.fine_tune_type == "dora"
        linear_to_lora_layers(model, args.num_layers, args.lora_parameters, use_dora=dora)
    if args.resume_adapter_file is not None:
        model.load_weights(args.resume_adapter_file, strict=False)
    print_trainable_parameters(model)
    folder = Path(args.adapter_path)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(vars(args), folder / "adapter_config.json")
    padding = loader.geometric(args.bucket) if args.bucket else loader.multiple_of_32
    cached = CacheDataset(train_set)
    if args.bucket:
        _print_forecast(args, cached)
    train(
        model,
        optimizer,
        cached,
        CacheDataset(valid_set),
        TrainingArgs(
            batch_size=args.batch_size,
            iters=args.iters,
            val_batches=args.val_batches,
            steps_per_report=args.steps_per_report,
            steps_per_eval=args.steps_per_eval,
            steps_per_save=args.save_every,
            max_seq_length=args.max_seq_length,
            adapter_file=str(folder / "adapters.safetensors"),
            grad_checkpoint=args.grad_checkpoint,
            grad_accumulation_steps=args.grad_accumulation_steps,
            clear_cache_threshold=args.clear_cache_threshold,
        ),
        iterate_batches=partial(loader.Batches, padding=padding),
        training_callback=callback,
        max_traces=args.max_traces,
        log=True,
        keep_checkpoints=_checkpoints(args),
        keep_adapters=args.keep_checkpoints or None,
        save_best=args.save_best,
        early_stop_patience=args.early_stop_patience,
        nonfinite_limit=args.nonfinite_limit,
        resume=args.resume,
        settings={
            "model": base,
            "data": _data_fingerprint(Path(args.data)) or args.data,
            **{name: getattr(args, name) for name in _OF_THE_RESULT},
        },
        allow=args.allow_change or (),
    )


def _checkpoints(args: types.SimpleNamespace) -> int:
    return KEPT if args.keep_checkpoints is None else args.keep_checkpoints


def _data_fingerprint(folder: Path) -> str | None:
    file = folder / "train.jsonl"
    return fingerprint.of_file(file) if file.exists() else None


def _print_forecast(args: types.SimpleNamespace, dataset: Any) -> None:
    def forecast(padding: loader.Padding) -> loader.Forecast:
        return loader.Batches(dataset, args.batch_size, args.max_seq_length, padding=padding).forecast()

    ours, stock = forecast(loader.geometric(args.bucket)), forecast(loader.multiple_of_32)
    print(
        f"bucket {args.bucket:g}: at most {ours.traces} traces, {100 * ours.overhead:.1f} % padding"
        f" (multiples of 32: {stock.traces} traces, {100 * stock.overhead:.1f} %)"
    )


def make_optimizer(args: types.SimpleNamespace) -> optim.Optimizer:
    """The optimizer of a job: ours for adam and adamw, mlx-lm's for the others, for which our options are errors."""
    name = args.optimizer.lower()
    config = dict((args.optimizer_config or {}).get(name) or {})
    rate = schedulers.from_config(args.lr_schedule) if args.lr_schedule else args.learning_rate
    options = {
        key: getattr(args, key)
        for key in ("max_grad_norm", "skip_nonfinite", "moments", "weight_decay", "bias_correction")
        if getattr(args, key) is not None
    }
    if name != "adamw":
        for key in ("weight_decay", "decay_matrices_only"):
            if getattr(args, key) is not None:
                raise ValueError(f"{key} is an option of adamw, but the optimizer is {name}")
    try:
        if name in ("adam", "adamw"):
            options = {"bias_correction": True, "skip_nonfinite": True, **config, **options}
            if args.decay_matrices_only:
                options["decay_filter"] = decay_matrices
            return (Adam if name == "adam" else AdamW)(rate, **options)
        if options:
            raise ValueError(f"{next(iter(options))} is an option of adam and adamw, but the optimizer is {name}")
        others = {"muon": optim.Muon, "sgd": optim.SGD, "adafactor": optim.Adafactor}
        if name not in others:
            raise ValueError(f"optimizer is {name!r}; it must be one of adam, adamw, {', '.join(others)}")
        return others[name](learning_rate=rate, **config)
    except TypeError as error:
        raise ValueError(f"optimizer_config of {name}: {error}") from None
