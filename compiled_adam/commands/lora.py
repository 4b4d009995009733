"""``compiled-adam lora``: the jobs of ``mlx_lm.lora``, with its flags, YAML keys and files, on a compiled step."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs

from ..base import InputError, fingerprint
from ..checkpoint import OtherRun, check_exists
from ..distributed import Workers, join
from ..finetune import attention, data, model_files, padding, samples
from ..finetune.adapters import check_folder, load_adapters, load_weights, other_scale, read_arrays, trained_dtype
from ..finetune.batches import Batches
from ..finetune.chunked import ChunkedLoss
from ..finetune.console import TrainingProgress, stage
from ..finetune.data import tokenize
from ..finetune.lora_values import OPTIMIZERS, check_rates
from ..finetune.names import LOG, REPORT, WEIGHTS
from ..finetune.options import TrainOptions, called
from ..finetune.saving import has_checkpoints
from ..finetune.trainable import add_adapters, cast, check_layers, unfreeze_last
from ..finetune.trainer import Job
from ..finetune.validation import mean_loss, no_targets
from ..step import losses
from . import like_mlx_lm, lora_screen, report, resuming
from .lora_optimizer import make_optimizer
from .lora_options import KEPT, SWITCHES, settings
from .lora_together import check_together, not_named, short_schedule
from .lora_yaml import YAML_ONLY

# Options that decide which numbers a run computes, beside the optimizer's and those that `train` knows.
_OF_THE_RESULT = (
    *("fine_tune_type", "num_layers", "lora_parameters", "lr_schedule", "mask_prompt", "bucket", "seed"),
    *("assistant_only_loss", "chunked_loss"),
    *sorted(YAML_ONLY),
)


def main(argv: Sequence[str]) -> None:
    """Runs the command line ``argv``; raises ValueError or OSError if that is not possible.

    Of several workers, as ``mlx.launch`` starts them, the first one prints and reports.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    args = settings(argv)
    args.typed = argv
    if join(args.worker_timeout).rank() == 0:
        try:
            run(args)
        except OtherRun as error:
            raise InputError(resuming.message(error, argv)) from error
    else:
        args.report, args.report_to = False, None
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run(args)


def run(args: types.SimpleNamespace) -> None:
    """One job: training, testing, or both."""
    for note in [*check_together(args), *not_named(args)]:
        print(f"note: {note}")
    # Before the model is loaded, which takes longer.
    optimizer = make_optimizer(args)
    _check_files(args)
    np.random.seed(args.seed)
    everything: Any = vars(args)
    callback = get_reporting_callbacks(
        args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=everything
    )
    with stage(f"loading {args.model}"):
        model, tokenizer = model_files.load(args.model, getattr(args, "trust_remote_code", None))
    with stage(f"reading {args.data}"):
        train_set, valid_set, test_set = data.load(args, tokenizer)
    if args.test:
        test_set = _test_set(args, test_set)
    if args.train:
        train_model(args, model, optimizer, train_set, valid_set, callback)
    else:
        _load_adapters(args, model)
    if args.test:
        _test(args, model, test_set)


def _load_adapters(args: types.SimpleNamespace, model: nn.Module) -> None:
    """The model of a test without training, in the dtype that it was trained in unless another one is asked for."""
    if args.adapter_path:
        print(load_adapters(model, args.adapter_path))
        args.dtype = args.dtype or trained_dtype(args.adapter_path)
    cast(model, args.dtype)
    if args.dtype is not None:
        print(f"the weights are cast to {args.dtype}")


def _check_files(args: types.SimpleNamespace) -> None:
    """Raises ValueError for files that are missing or damaged; drops resume_adapter_file if there is a checkpoint."""
    if not args.train and args.adapter_path:
        check_folder(args.adapter_path)
    alone = join(args.worker_timeout).size() == 1  # other workers may not have the checkpoints, and all begin alike
    if alone and args.resume and args.resume_adapter_file and has_checkpoints(Path(args.adapter_path)):
        # A loop that starts a run again and again has one command line for the first time and for the others.
        print(f"note: resume_adapter_file is not used: the run goes on from a checkpoint in {args.adapter_path}")
        args.resume_adapter_file = None
    if alone and args.train and args.resume not in (None, "auto"):
        check_exists(Path(args.resume))
    if args.train and args.resume_adapter_file is not None:
        file = Path(args.resume_adapter_file)
        if not file.exists():
            raise InputError(
                f"{called('resume_adapter_file')} is {str(file)!r}, which does not exist; give a file of weights, such"
                f" as {WEIGHTS} in the folder of an earlier run"
            )
        read_arrays(file)


def _test_set(args: types.SimpleNamespace, dataset: Any) -> CacheDataset:
    """The test set. It is tokenized before a training, so that an error does not come at the end of a long one."""
    if len(dataset) < args.batch_size:
        raise InputError(
            f"the test set has {len(dataset)} examples, fewer than batch_size={args.batch_size};"
            f" give it more, or use a smaller {called('batch_size')}"
        )
    cached = CacheDataset(dataset)
    for index in range(len(cached)) if args.train else ():
        cached[index]
    return cached


def train_model(
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
        _begin_with(args, model)
    cached = CacheDataset(train_set)
    tokenize(cached, quiet=join(args.worker_timeout).rank() > 0)
    make_batches = _batches(args, args.bucket)
    if args.epochs is not None:
        args.iters = _iterations(args, cached, make_batches)
        check_rates(args)
        for note in short_schedule(args):
            print(f"note: {note}")
    valid = CacheDataset(valid_set)
    forecast = None if args.bucket is None else _forecast(args, cached)
    options = _options(args, base, valid_set)
    job = Job(model, optimizer, cached, valid, _loss(args, model), make_batches, _training_args(args), options)
    try:
        with lora_screen.how_to_go_on(args), attention.in_blocks(not args.like_mlx_lm):
            job.run(callback, lora_screen.facts(args, model, cached, valid, forecast))
    finally:
        _report(args)
    print(f"try: {lora_screen.generate(args, valid_set)}")


def _options(args: types.SimpleNamespace, base: Any, valid_set: Any) -> TrainOptions:
    return TrainOptions(
        max_traces=args.max_traces,
        log=True,
        keep_checkpoints=_checkpoints(args),
        keep_adapters=args.keep_checkpoints or None,
        save_best=args.save_best,
        early_stop_patience=args.early_stop_patience,
        nonfinite_limit=args.nonfinite_limit,
        resume=args.resume,
        settings=_settings(args, base),
        allow=args.allow_change or (),
        adapter_config=_effective(args),
        reduce_dtype=args.reduce_dtype,
        shard_state=args.shard_state,
        worker_timeout=args.worker_timeout,
        weighted=like_mlx_lm.tokens_count_alike(args),
        sample=_sample(args, valid_set),
    )


def _batches(args: types.SimpleNamespace, bucket: float | None) -> partial[Batches]:
    grouped = like_mlx_lm.is_grouped(args)
    lengths = padding.chosen(bucket, grouped, cuda=not args.like_mlx_lm and padding.on_cuda())
    return partial(Batches, padding=lengths, group_by_length=grouped, batch_tokens=args.batch_tokens)


def _iterations(args: types.SimpleNamespace, dataset: CacheDataset, make_batches: partial[Batches]) -> int:
    world = join(args.worker_timeout)
    made = make_batches(dataset, args.batch_size, args.max_seq_length, loop=True, comm_group=world)
    if (iterations := args.epochs * made.per_epoch) > sys.maxsize:
        raise InputError(f"{called('epochs')} is {args.epochs:g}, which no run can finish; give fewer")
    return max(1, math.ceil(iterations))


def _settings(args: types.SimpleNamespace, base: Any) -> dict[str, Any]:
    """The settings that a resumed run must have, too, beside those that `train` knows."""
    found = {"model": base, **{name: getattr(args, name, None) for name in _OF_THE_RESULT}}
    # Checkpoints of earlier versions do not have these.
    later = {"like_mlx_lm": args.like_mlx_lm or None, "dtype": args.dtype}
    return {**found, **{name: value for name, value in later.items() if value is not None}}


def _effective(args: types.SimpleNamespace) -> dict[str, Any]:
    """The options of a job for its configuration: with the values that hold, where none were given."""
    found = {name: value for name, value in vars(args).items() if name not in ("given", "in_file", "typed")}
    found |= {name: False for name in SWITCHES if found[name] is None} | {"keep_checkpoints": _checkpoints(args)}
    if args.optimizer not in ("adam", "adamw"):
        return found | like_mlx_lm.options_of_others(args)
    options = like_mlx_lm.options_of_adam(args)
    defaults = inspect.signature(OPTIMIZERS[args.optimizer]).parameters
    return found | {name: options.get(name, defaults[name].default) for name in like_mlx_lm.OF_ADAM if name in defaults}


def _sample(args: types.SimpleNamespace, dataset: Any) -> partial[samples.Answers] | None:
    """What takes the samples of ``--sample-prompts``; None if there are to be none."""
    if not args.sample_prompts:
        return None
    if not dataset:
        raise InputError(f"{called('sample_prompts')} needs a validation set; add valid.jsonl, or leave it out")
    return partial(samples.answers, chosen=samples.prompts(dataset, args.sample_prompts, args.max_seq_length))


def _loss(args: types.SimpleNamespace, model: nn.Module) -> Callable[..., Any]:
    """The loss of training, validation and test: in chunks where the model allows it."""
    whole = losses.like_mlx_lm if args.like_mlx_lm else losses.next_token
    if not args.chunked_loss:
        return whole
    try:
        return ChunkedLoss(model)
    except InputError as error:
        print(f"note: {called('chunked_loss')} is not used, and all logits exist at once: {error}")
        return whole


def _training_args(args: types.SimpleNamespace) -> TrainingArgs:
    """mlx-lm's arguments of a training; two have other names on the command line."""
    same = {field.name: getattr(args, field.name) for field in fields(TrainingArgs) if hasattr(args, field.name)}
    return TrainingArgs(**same, steps_per_save=args.save_every, adapter_file=str(Path(args.adapter_path) / WEIGHTS))


def _report(args: types.SimpleNamespace) -> None:
    """Draws the report that was asked for. If that fails, a line says so: the run itself has ended as it has."""
    folder = Path(args.adapter_path)
    if args.report and (folder / LOG).exists():
        try:
            report.write([folder], folder / REPORT)
            print(f"report -> {folder / REPORT}")
        except (InputError, OSError) as error:
            print(f"warning: there is no report: {error}")


def _test(args: types.SimpleNamespace, model: nn.Module, test_set: Any) -> None:
    """Prints what mlx-lm prints, and ends if the other workers are gone, as training does."""
    count = len(test_set) // args.batch_size
    count = count if args.test_batches == -1 else min(count, args.test_batches)
    loss_fn = _loss(args, model)
    with Workers(join(args.worker_timeout), args.worker_timeout) as workers:
        workers.saved = "there is no test loss"
        with TrainingProgress(count, quiet=not workers.first, what="test") as progress:

            def before_batch(_: int) -> None:
                workers.beat()
                progress.advance()

            with attention.in_blocks(not args.like_mlx_lm):
                loss = mean_loss(model, test_set, loss_fn, Batches, args, count, before_batch)
        if loss is None:
            raise InputError(f"there is no test loss: {no_targets(args.max_seq_length)}")
        print(f"Test loss {loss:.3f}, Test ppl {math.inf if loss >= 700 else math.exp(loss):.3f}.")


def make_trainable(args: types.SimpleNamespace, model: nn.Module) -> None:
    """Casts a model, and freezes all but the parameters that the job trains: new adapters, or the last layers."""
    cast(model, args.dtype)
    model.freeze()
    check_layers(model, args.num_layers, given="num_layers" in (*args.given, *args.in_file))
    if args.fine_tune_type == "full":
        unfreeze_last(model, args.num_layers)
        args.lora_parameters = None
    else:
        add_adapters(model, args.num_layers, args.lora_parameters, dora=args.fine_tune_type == "dora")


def _begin_with(args: types.SimpleNamespace, model: nn.Module) -> None:
    """Puts the weights of ``resume_adapter_file`` into the model, and says how many."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    print(load_weights(model, args.resume_adapter_file, wanted=trained))
    cast(model, args.dtype)  # the file may have another one
    if note := other_scale(args.resume_adapter_file, args.lora_parameters):
        print(f"note: {note}")


def _checkpoints(args: types.SimpleNamespace) -> int:
    return KEPT if args.keep_checkpoints is None else args.keep_checkpoints


def _forecast(args: types.SimpleNamespace, dataset: Any) -> str:
    ours, without = (
        _batches(args, bucket)(dataset, args.batch_size, args.max_seq_length, loop=True).forecast()
        for bucket in (args.bucket, None)
    )
    return (
        f"bucket {args.bucket:g}: at most {ours.traces} traces, {100 * ours.overhead:.1f} % padding"
        f" (without --bucket: {without.traces} traces, {100 * without.overhead:.1f} %)"
    )
