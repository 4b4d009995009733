"""Fine-tuning with mlx-lm's models, data sets and files, on a compiled step; it can be stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

try:
    from mlx_lm.tuner import trainer as mlx_lm_trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.utils import save_config
except ImportError as error:
    raise ImportError(
        f"fine-tuning needs mlx-lm ({error}); install it with `pip install 'compiled-adam[lm]'`"
    ) from error

from ..base import InputError, fingerprint, random_state
from ..checkpoint import locked, numbered
from ..distributed import Workers, check_timeout, join
from ..step import losses, make_step
from .batches import Batches
from .console import TrainingProgress
from .log import LOG, RunLog
from .loop import CHECKPOINTS, CONFIG, Options, TrainingLoop, Validation
from .lora_values import called, check_whole
from .rows import located
from .stopping import asked_to_stop

_MANY = 5000  # examples, whose tokenizing takes seconds


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: mlx_lm_trainer.TrainingArgs | None = None,
    loss: Callable[..., Any] = losses.next_token,
    iterate_batches: Callable[..., Any] = Batches,
    training_callback: TrainingCallback | None = None,
    *,
    max_traces: int = 64,
    log: bool = False,
    keep_checkpoints: int = 0,
    keep_adapters: int | None = None,
    save_best: bool = False,
    early_stop_patience: int | None = None,
    nonfinite_limit: int | None = None,
    resume: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    adapter_config: Mapping[str, Any] | None = None,
    reduce_dtype: str = "float32",
    shard_state: bool = False,
    worker_timeout: float = 60.0,
) -> None:
    """Fine-tunes ``model`` in place: the call, the defaults and the adapter files of ``mlx_lm.tuner.trainer.train``.

    What differs: accumulation weights micro-batches by their tokens and applies the last, partly filled window;
    the allocator's cache is cleared only beyond a ``clear_cache_threshold`` above 0, not after every step; reports
    have three more keys: ``grad_norm`` (of the last update, None before the first), ``skipped_steps`` and
    ``traces`` (gradient traces so far, one for each batch shape); weights that are not finite are never saved; after
    Ctrl-C or SIGTERM the step is finished and everything saved.

    Under ``mlx.launch`` each worker takes its part of every batch of ``batch_size``, and all together are one run, the
    same as a single process's. The first worker prints, logs, saves, and reads the checkpoint of a resumed run, which
    any number of workers can continue. All workers have the same random state, so their dropout masks are the same
    where shapes are the same. Callbacks are called at every worker.

    Args:
        model: an mlx-lm model whose adapter or unfrozen parameters are trained.
        optimizer: any MLX optimizer; its learning rate counts updates, not iterations.
        train_dataset: what ``iterate_batches`` takes, by default mlx-lm's ``CacheDataset``.
        val_dataset: the same for validation at the first, the last and every ``steps_per_eval``-th iteration.
        args: ``mlx_lm.tuner.trainer.TrainingArgs``; None means its defaults.
        loss: ``loss(model, *batch)`` returns the mean loss over tokens and the number of tokens. A batch of 0 tokens
            adds nothing to the gradient. Default: `losses.next_token`; mlx-lm's `default_loss` also trains one token of
            padding.
        iterate_batches: makes the batches, called as mlx-lm calls it; every worker must get the same number of them.
            Default: `Batches`, which has mlx-lm's order.
        training_callback: gets ``on_train_loss_report(info)`` and ``on_val_loss_report(info)``.

        max_traces: how many batch shapes stay compiled, as in `make_step`. Default 64.
        log: whether to write ``log.jsonl`` beside the adapters, a line for every step. Default False.
        keep_checkpoints: how many checkpoints to resume from stay in ``checkpoints`` beside the adapters; one is
            written whenever the adapters are saved. Default 0: none is written.
        keep_adapters: how many of the numbered adapter files stay. Default None: all, as in mlx-lm.
        save_best: whether to keep the weights with the lowest validation loss in ``best``. Default False.
        early_stop_patience: end after so many validations in a row without a new lowest loss. Default None: never.
        nonfinite_limit: end after so many steps in a row whose loss or gradient is not finite. Default None: never.
        resume: a checkpoint's folder, or "auto" for the newest undamaged checkpoint in ``checkpoints``. With "auto" the
            run starts from the beginning, and says so, if no checkpoint was ever written there. Default None.
        settings: names and values that results depend on and a resumed run must share. Default None. If checkpoints
            are written or read, ``data`` and ``validation data`` are added: digests of all tokenized examples. For
            that, all examples are tokenized before the first step.
        allow: names of settings that may differ from the checkpoint's, as in `load_checkpoint`.
        adapter_config: what mlx-lm needs to load the adapters, for ``adapter_config.json`` beside them. It is written
            after all checks, just before the training. Default None: not written.
        reduce_dtype: what gradients are communicated in between workers, as in `make_step`. Default "float32".
        shard_state: whether the optimizer's state is spread over the workers, as in `make_step`. Default False.
        worker_timeout: seconds without an answer after which a worker that waits for the others ends its process, with
            a message and exit code 1; more if steps are long, see `Watchdog`. (One that died is noticed at once.)

    Raises:
        ValueError: unusable arguments, as in `make_step`; a checkpoint that does not exist, is damaged or does not fit;
            workers that were started with different options.
        TrainingStopped: out of memory, ``nonfinite_limit`` was reached, another worker ended, or the last save failed.
            The message says what was saved. Other errors are raised as they are, after a line that says what was saved.
        KeyboardInterrupt, SystemExit(143): after Ctrl-C or SIGTERM, when everything is saved.
        OSError: another process is training in the folder of the adapters.
    """
    args = mlx_lm_trainer.TrainingArgs() if args is None else args
    train_dataset, val_dataset = located(train_dataset, "train set"), located(val_dataset, "validation set")
    check_timeout(worker_timeout)
    if resume is not None and not (isinstance(resume, (str, Path)) and str(resume)):
        raise InputError(f"{called('resume')} is {resume!r}; it must be a checkpoint's folder, 'auto' or None")
    numbers = {
        "max_traces": max_traces,
        "keep_checkpoints": keep_checkpoints,
        "keep_adapters": keep_adapters,
        "early_stop_patience": early_stop_patience,
        "nonfinite_limit": nonfinite_limit,
    }
    for name in (
        *("batch_size", "iters", "val_batches", "grad_accumulation_steps", "steps_per_report", "steps_per_eval"),
        *("steps_per_save", "max_seq_length", "clear_cache_threshold"),
    ):
        check_whole(name, getattr(args, name))
    for name, number in numbers.items():
        if number is not None or name in ("max_traces", "keep_checkpoints"):
            check_whole(name, number)
    for name, value in (("save_best", save_best), ("early_stop_patience", early_stop_patience)):
        if value and not val_dataset:
            raise InputError(f"{called(name)} needs a validation loss, but there is no validation set")
    if (limit := mx.device_info().get("max_recommended_working_set_size")) is not None:
        mx.set_wired_limit(int(limit))  # Metal: keeps weights from being paged out between steps
    if args.grad_checkpoint:
        mlx_lm_trainer.grad_checkpoint(model.layers[0])

    folder = Path(args.adapter_file).parent
    with ExitStack() as stack:
        world = join(worker_timeout)
        workers = stack.enter_context(Workers(world, worker_timeout))
        workers.first_does(lambda: _make(folder))
        anew = resume == "auto" and not workers.first_does(lambda: has_checkpoints(folder))
        resume = None if anew else resume
        step = make_step(
            model,
            loss,
            optimizer,
            accumulate=args.grad_accumulation_steps,
            weighted=True,
            max_traces=max_traces,
            group=world,
            reduce_dtype=reduce_dtype,
            shard_state=shard_state,
        )
        batches = iter(
            iterate_batches(
                dataset=train_dataset,
                batch_size=args.batch_size,
                max_seq_length=args.max_seq_length,
                loop=True,
                comm_group=world,
            )
        )
        if (keep_checkpoints or resume is not None) and not isinstance(batches, Batches):
            raise InputError("a checkpoint needs batches that know their position: use compiled_adam's iterate_batches")
        if val_dataset and isinstance(batches, Batches) and len(val_dataset) < args.batch_size:
            raise InputError(
                f"the validation set has {len(val_dataset)} examples, fewer than batch_size={args.batch_size};"
                " give it more, or use a smaller batch_size (--batch-size)"
            )
        data: dict[str, str | None] = {}
        if (keep_checkpoints or resume is not None) and isinstance(batches, Batches):
            if workers.first and len(train_dataset) > _MANY:
                print(f"tokenizing {len(train_dataset):,} examples, to notice when a resumed run has other data")
            validated = Batches(val_dataset, 1, args.max_seq_length).rows() if val_dataset else None
            data["data"] = fingerprint.of_rows(batches.rows())
            data["validation data"] = None if validated is None else fingerprint.of_rows(validated)
        # What decides which batches come, and after which of them a window ends.
        settings = (
            dict(settings or {})
            | data
            | {
                "batch_size": args.batch_size,
                "max_seq_length": args.max_seq_length,
                "examples": len(train_dataset),
                "validation": [args.steps_per_eval, args.val_batches, len(val_dataset)] if val_dataset else None,
                "grad_checkpoint": args.grad_checkpoint,  # which asks for dropout's random numbers twice
            }
        )
        options = Options(keep_checkpoints, keep_adapters, save_best, early_stop_patience, nonfinite_limit, settings)
        validation = Validation(val_dataset, loss, iterate_batches)
        # What decides where workers meet, and that the parts they take are of the same batches.
        workers.check_alike(
            {name: value for name, value in (options._asdict() | asdict(args)).items() if name != "adapter_file"}
            | settings
            | {"resume": resume is not None, "log": log, "NumPy's random state": fingerprint.of_numpy()}
            | {"MLX's random state": random_state.get().tolist(), "validation set": bool(val_dataset)}
        )
        if log or keep_checkpoints or resume is not None:
            workers.first_does(lambda: _enter(stack, locked(folder)))
        asked = stack.enter_context(asked_to_stop())
        progress = stack.enter_context(TrainingProgress(args.iters, quiet=not workers.first))
        loop = TrainingLoop(step, batches, validation, args, options, progress, asked, training_callback, workers)
        if resume is not None:
            loop.resume(resume, allow)
            if loop.iteration >= args.iters:
                progress.line(
                    f"iter {loop.iteration:>5}  all {args.iters} iterations are done; to train on, give more iters"
                    " (--iters)"
                )
        if anew:
            progress.line(f"there is no checkpoint in {folder / CHECKPOINTS} yet: the run starts from the beginning")

        def prepare_folder() -> None:
            if resume is None and (log or keep_checkpoints):
                loop.begin_anew()
            if log:
                loop.log = stack.enter_context(closing(RunLog(folder / LOG, loop.iteration, loop.warn)))
            if adapter_config is not None:
                temporary = folder / f".{CONFIG}.partial"
                save_config(dict(adapter_config), temporary)
                temporary.replace(folder / CONFIG)

        workers.first_does(prepare_folder)
        loop.run()


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has ever written a checkpoint beside the adapters in ``folder``, damaged or not."""
    checkpoints = folder / CHECKPOINTS
    # The second is what a replacement leaves that was killed between its two renamings.
    return bool(numbered(checkpoints)) or any(checkpoints.glob(".[0-9]*.old"))


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the adapters")
    folder.mkdir(parents=True, exist_ok=True)


def _enter(stack: ExitStack, context: AbstractContextManager[None]) -> None:
    stack.enter_context(context)
