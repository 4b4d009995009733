"""``compiled-adam lora``: the jobs of ``mlx_lm.lora``, with its flags, YAML keys and files, on a compiled step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters, print_trainable_parameters
from mlx_lm.utils import load

from . import fingerprint, loader, model_config, schedulers
from .adamw import AdamW
from .errors import InputError
from .evaluation import mean_loss
from .groups import decay_matrices
from .joining import join
from .lora import train
from .lora_options import KEPT, YAML_ONLY, check_together, settings
from .optimizers import Adam
from .progress import TrainingProgress
from .run_log import LOG
from .workers import Workers

# Options that decide which numbers a run computes, beside the optimizer's and those that `train` knows.
_OF_THE_RESULT = (
    *("fine_tune_type", "num_layers", "lora_parameters", "lr_schedule", "mask_prompt", "bucket", "seed"),
    *sorted(YAML_ONLY),
)


def main(argv: Sequence[str]) -> None:
    """Runs the command line ``argv``; raises ValueError or OSError for what cannot be done.

    Of several workers, as ``mlx.launch`` starts them, the first one prints and reports.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    args = settings(argv)
    if join(args.worker_timeout).rank() == 0:
        run(args)
    else:
        args.report, args.report_to = False, None
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run(args)


def run(args: types.SimpleNamespace) -> None:
    """One job: training, testing, or both."""
    check_together(args)
    if args.report:
        from . import report  # noqa: F401, says now rather than after the training that matplotlib is missing
    optimizer = make_optimizer(args)  # before the model is loaded, which takes longer
    np.random.seed(args.seed)
    everything: Any = vars(args)
    callback = get_reporting_callbacks(
        args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=everything
    )
    with _readable(f"the model {args.model}"):
        model, tokenizer = _load(args)
    train_set, valid_set, test_set = _data(args, tokenizer)
    if args.test and len(test_set) < args.batch_size:
        raise InputError(f"the test set has {len(test_set)} examples, fewer than batch_size={args.batch_size}")
    if args.train:
        _train(args, model, optimizer, train_set, valid_set, callback)
    elif args.adapter_path:
        with _readable(f"the adapters in {args.adapter_path}"):
            load_adapters(model, args.adapter_path)
    if args.test:
        _test(args, model, test_set)


def _load(args: types.SimpleNamespace) -> tuple[nn.Module, Any]:
    if (Path(args.model) / "config.json").exists():
        model_config.check(model_config.read(args.model))
    if hasattr(args, "trust_remote_code"):
        trust = args.trust_remote_code
        model, tokenizer, *_ = load(args.model, tokenizer_config={"trust_remote_code": trust}, trust_remote_code=trust)
    else:  # mlx-lm before 0.32 has no such flag, and always trusts the tokenizer's code
        model, tokenizer, *_ = load(args.model, tokenizer_config={"trust_remote_code": True})
    return model, tokenizer


def _data(args: types.SimpleNamespace, tokenizer: Any) -> tuple[Any, Any, Any]:
    try:
        return load_dataset(args, tokenizer)
    except IndexError:  # mlx-lm looks at the first example of each file
        raise InputError(f"a file in {args.data} has no examples; give it some, or remove it") from None
    except json.JSONDecodeError as error:
        raise InputError(f"a .jsonl file in {args.data} has a line that is not JSON: {error.doc[:60]!r}") from None
    except ImportError as error:
        raise InputError(
            f"data is {args.data!r}, which is no folder; for a data set on Hugging Face install {error.name}"
        ) from None


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """What mlx-lm raises for files that are missing, damaged or not what they should be becomes a ValueError."""
    try:
        yield
    except (RuntimeError, KeyError, AttributeError) as error:
        raise InputError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error


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
    make_trainable(args, model)
    if args.resume_adapter_file is not None:
        with _readable(f"resume_adapter_file {args.resume_adapter_file}"):
            model.load_weights(args.resume_adapter_file, strict=False)
    print_trainable_parameters(model)
    folder = Path(args.adapter_path)
    padding = loader.multiple_of_32 if args.bucket is None else loader.geometric(args.bucket)
    cached = CacheDataset(train_set)
    if args.bucket is not None:
        _print_forecast(args, cached)
    try:
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
            save_best=bool(args.save_best),
            early_stop_patience=args.early_stop_patience,
            nonfinite_limit=args.nonfinite_limit,
            resume=args.resume,
            settings={
                "model": base,
                "data": _fingerprint(Path(args.data), "train") or args.data,
                "validation data": _fingerprint(Path(args.data), "valid"),
                **{name: getattr(args, name, None) for name in _OF_THE_RESULT},
            },
            allow=args.allow_change or (),
            adapter_config={name: value for name, value in vars(args).items() if name != "given"},
            reduce_dtype=args.reduce_dtype,
            shard_state=bool(args.shard_state),
            worker_timeout=args.worker_timeout,
        )
    finally:
        if args.report and (folder / LOG).exists():
            from .report import write

            write([folder], folder / "report.html")


def _test(args: types.SimpleNamespace, model: nn.Module, test_set: Any) -> None:
    """Prints what mlx-lm prints, and ends if the other workers are gone, as training does."""
    batches = len(test_set) // args.batch_size
    batches = batches if args.test_batches == -1 else min(batches, args.test_batches)
    with Workers(join(args.worker_timeout), args.worker_timeout) as workers:
        workers.saved = lambda: "there is no test loss"
        with TrainingProgress(batches, quiet=not workers.first, what="test") as progress:

            def before_batch() -> None:
                workers.beat()
                progress.advance()

            loss = mean_loss(
                model,
                CacheDataset(test_set),
                default_loss,
                before_batch,
                args.clear_cache_threshold,
                batch_size=args.batch_size,
                num_batches=args.test_batches,
                max_seq_length=args.max_seq_length,
                iterate_batches=iterate_batches,
            )
        print(f"Test loss {loss:.3f}, Test ppl {math.exp(loss):.3f}.")


def make_trainable(args: types.SimpleNamespace, model: nn.Module) -> None:
    """Freezes a model, but for what the job trains: adapters that are added, or its last layers."""
    model.freeze()
    if args.num_layers > len(model.layers):
        raise InputError(f"num_layers is {args.num_layers}, but the model has {len(model.layers)} layers")
    if args.fine_tune_type == "full":
        for layer in model.layers[-max(args.num_layers, 0) :]:
            layer.unfreeze()
        args.lora_parameters = None
    else:
        dora = args.fine_tune_type == "dora"
        with _readable(f"lora_parameters {args.lora_parameters}"):
            linear_to_lora_layers(model, args.num_layers, args.lora_parameters, use_dora=dora)


def _checkpoints(args: types.SimpleNamespace) -> int:
    return KEPT if args.keep_checkpoints is None else args.keep_checkpoints


def _fingerprint(folder: Path, name: str) -> str | None:
    file = folder / f"{name}.jsonl"
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
                raise InputError(f"{key} is an option of adamw, but the optimizer is {name}")
    try:
        if name in ("adam", "adamw"):
            options = {"bias_correction": True, "skip_nonfinite": True, **config, **options}
            if args.decay_matrices_only:
                options["decay_filter"] = decay_matrices
            return (Adam if name == "adam" else AdamW)(rate, **options)
        if options:
            raise InputError(f"{next(iter(options))} is an option of adam and adamw, but the optimizer is {name}")
        others = {"muon": optim.Muon, "sgd": optim.SGD, "adafactor": optim.Adafactor}
        if name not in others:
            raise InputError(f"optimizer is {name!r}; it must be one of adam, adamw, {', '.join(others)}")
        return others[name](learning_rate=rate, **config)
    except TypeError as error:
        raise InputError(f"optimizer_config of {name}: {error}") from None
