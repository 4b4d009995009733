"""The options of `compiled_adam.train`, the range of each whole number, and the name of an option in a message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base import InputError
from ..distributed import check_timeout

# The least value of each whole number.
WHOLE = {
    **dict.fromkeys(("num_layers", "batch_size", "iters", "val_batches", "test_batches", "steps_per_report"), 1),
    **dict.fromkeys(("steps_per_eval", "save_every", "steps_per_save", "grad_accumulation_steps", "max_traces"), 1),
    **dict.fromkeys(("batch_tokens", "keep_adapters", "early_stop_patience", "nonfinite_limit"), 1),
    **dict.fromkeys(("seed", "clear_cache_threshold", "keep_checkpoints", "sample_prompts"), 0),
    "max_seq_length": 2,
}
# The meaning of -1, where it has one.
_ALL = {
    "num_layers": "for all layers",
    "val_batches": "for the whole validation set",
    "test_batches": "for the whole test set",
}
# The flags whose names differ from the names of the arguments.
_FLAGS = {"keep_adapters": "--keep-checkpoints", "steps_per_save": "--save-every"}


def called(name: str) -> str:
    """The name of an option in Python and YAML, and its name on the command line.

    >>> called("batch_size")
    'batch_size (--batch-size)'
    """
    return f"{name} ({_FLAGS.get(name) or '--' + name.replace('_', '-')})"


def check_whole(name: str, value: Any) -> None:
    """Raises ValueError if ``value`` is not a whole number in the range of the option ``name``."""
    least, most = WHOLE[name], 2**32 - 1 if name == "seed" else sys.maxsize
    number = type(value) is int
    if number and (least <= value <= most or (value == -1 and name in _ALL)):
        return
    bounded = name == "seed" or (number and value > most)
    allowed = f"a whole number from {least} to {most}" if bounded else f"a whole number of at least {least}"
    allowed += f", or -1 {_ALL[name]}" if name in _ALL else ""
    raise InputError(f"{called(name)} is {value!r}; it must be {allowed}")


@dataclass(frozen=True)
class TrainOptions:
    """The keyword arguments of `compiled_adam.train`, with their defaults.

    Args:
        max_traces: the number of batch shapes that stay compiled, as in `make_step`. Default 64.
        log: whether to write ``log.jsonl`` beside the adapters, one line for each step. Default False.
        keep_checkpoints: the number of checkpoints that stay in the folder ``checkpoints`` beside the adapters. A
            checkpoint is written whenever the adapters are saved; a run can be resumed from it. Default 0: none.
        keep_adapters: the number of numbered adapter files that stay. Default None: all, as in mlx-lm.
        save_best: whether to keep the weights with the lowest validation loss in the folder ``best``. Default False.
        early_stop_patience: training stops when the validation loss has not improved this many times in a row.
            Default None: never.
        nonfinite_limit: training stops when the loss or gradient was not finite in this many steps in a row.
            Default None: never.
        resume: the folder of a checkpoint, or "auto" for the newest undamaged checkpoint in ``checkpoints``. With
            "auto", if no checkpoint was ever written there, the run starts from the beginning and says so.
            Default None: start from the beginning.
        settings: names and values that the results depend on; a resumed run must have the same. Default None. If
            checkpoints are written or read, ``data`` and ``validation data`` are added: digests of all tokenized
            examples. For this, all examples are tokenized before the first step.
        allow: names of settings that may differ from those of the checkpoint, as in `load_checkpoint`. Default: none.
        adapter_config: the content of ``adapter_config.json``, which mlx-lm needs to load the adapters. It is written
            beside the adapters after all checks, just before the training. Default None: not written.
        reduce_dtype: the dtype in which workers communicate gradients, as in `make_step`. Default "float32".
        shard_state: whether the optimizer's state is spread over the workers, as in `make_step`. Default False.
        worker_timeout: a worker that waits this many seconds for the other workers ends its process, with a message
            and exit code 1. The time is longer if steps are long, see `Watchdog`. A worker whose connection is closed
            is noticed earlier. Default 60.
        weighted: whether micro-batches of a window, and the workers' parts of a batch, are weighted by their tokens, as
            in `make_step`. Default True: they equal one big batch. False: all count alike, as in mlx-lm.
        sample: is called as ``sample(model, stop)`` by the first worker, before the first step and after the last one.
            It returns samples of the model for the report, dictionaries with the texts ``prompt``, ``expected`` and
            ``answer``, and should end soon when ``stop()`` becomes true. Needs ``log``. Default None: no samples.

    Raises:
        ValueError: a value is out of its range; the message names the option.
    """

    max_traces: int = 64
    log: bool = False
    keep_checkpoints: int = 0
    keep_adapters: int | None = None
    save_best: bool = False
    early_stop_patience: int | None = None
    nonfinite_limit: int | None = None
    resume: str | Path | None = None
    settings: Mapping[str, Any] | None = None
    allow: Collection[str] = ()
    adapter_config: Mapping[str, Any] | None = None
    reduce_dtype: str = "float32"
    shard_state: bool = False
    worker_timeout: float = 60.0
    weighted: bool = True
    sample: Callable[[nn.Module, Callable[[], bool]], list[dict[str, str]]] | None = None

    def __post_init__(self) -> None:
        check_timeout(self.worker_timeout)
        if self.resume is not None and not (isinstance(self.resume, (str, Path)) and str(self.resume)):
            raise InputError(f"{called('resume')} is {self.resume!r}; it must be a checkpoint's folder, 'auto' or None")
        if self.sample is not None and not self.log:
            raise InputError("sample is given, but its results are for the report, which needs log=True; give both")
        for name in ("max_traces", "keep_checkpoints"):
            check_whole(name, getattr(self, name))
        for name in ("keep_adapters", "early_stop_patience", "nonfinite_limit"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value)

    def check_validation(self) -> None:
        """Raises ValueError if an option needs a validation loss; to be called if there is no validation set."""
        for name in ("save_best", "early_stop_patience"):
            if getattr(self, name):
                raise InputError(f"{called(name)} needs a validation loss, but there is no validation set")
