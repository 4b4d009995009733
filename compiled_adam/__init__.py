"""Adam and AdamW for MLX, compiled: the whole update is one graph, and so is the training step around it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

try:
    from .base import InputError, TrainingStopped  # which loads a fast BLAS, and then MLX
except ImportError as error:
    _setting = type(error).__name__ == "BlasError"
    _what = (
        str(error)
        if _setting
        else f"MLX cannot be loaded ({error}); on Linux `mlx` comes without a backend, so install one with"
        " `pip install 'compiled-adam[cpu]'`, or [cuda12] or [cuda13] with an NVIDIA GPU."
    )
    if [os.path.basename(word) for word in sys.argv[:1]] == ["compiled-adam"]:
        print(f"compiled-adam: {_what}", file=sys.stderr)  # the command, `doctor` above all: not a traceback
        sys.exit(2 if _setting else 1)
    raise ImportError(_what) from error

from . import schedulers
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .finetune.history import History
from .optimizers import Adam, AdamW, Compensated
from .step import StepResult, TrainStep, losses, make_step
from .update import decay_matrices

if TYPE_CHECKING:
    from .finetune.trainer import train as train

__version__ = "0.2.0"
__all__ = [
    "Adam",
    "AdamW",
    "Compensated",
    "History",
    "InputError",
    "StepResult",
    "TrainStep",
    "TrainingStopped",
    "decay_matrices",
    "latest_checkpoint",
    "load_checkpoint",
    "losses",
    "make_step",
    "save_checkpoint",
    "schedulers",
]


def __getattr__(name: str) -> Any:
    # `train` needs mlx-lm, which is optional and takes seconds to import; so it is not in __all__ either.
    if name == "train":
        return importlib.import_module(".finetune.trainer", __name__).train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Only what works: `help` reads everything that is listed here.
    return sorted([*__all__, *(["train"] if importlib.util.find_spec("mlx_lm") else [])])
