"""Runs of a tiny model by train, and ways to end them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import numpy as np
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.log import read
from mlx_lm import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers


class Tokens(list):
    """A data set of mlx-lm's kind, already tokenized; ``asked`` is how often a `CacheDataset` has asked for tokens."""

    asked = 0

    def process(self, example):
        self.asked += 1
        return example


class Group:
    """The worker ``rank`` of ``size``, for batches, which do not communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def same(batch: tuple[mx.array, ...], other: tuple[mx.array, ...]) -> bool:
    return all(mx.array_equal(a, b).item() and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))


def lora(tiny_model: Path):
    mx.random.seed(0)
    np.random.seed(0)
    model = load(str(tiny_model))[0]
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 10.0})
    return model


def dataset(count: int = 12) -> Tokens:
    chance = np.random.default_rng(0)
    return Tokens((chance.integers(1, 500, 20).tolist(), 0) for _ in range(count))


def arguments(folder: Path, **changes) -> trainer.TrainingArgs:
    defaults = {"batch_size": 2, "iters": 12, "val_batches": 2, "steps_per_report": 1, "steps_per_eval": 3}
    adapters = {"steps_per_save": 4, "adapter_file": str(folder / "adapters.safetensors")}
    return trainer.TrainingArgs(**{**defaults, **adapters, **changes})


def weights(file: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


BAD = 511  # a token that no example has


def loss_that_fails_on_bad(model, batch, lengths):
    """mlx-lm's loss, which is not a number, nor is its gradient, for a batch with the token `BAD`."""
    value, tokens = trainer.default_loss(model, batch, lengths)
    return value * mx.where((batch == BAD).any(), float("nan"), 1.0), tokens


class WithBadBatch(Batches):
    """Its sixth batch has the token `BAD`; or, with ``skip``, does not come."""

    skip = False

    def __next__(self):
        batch, lengths = super().__next__()
        if self._loop:
            self.count = getattr(self, "count", 0) + 1
            if self.count == 6:
                if self.skip:
                    return super().__next__()
                batch[0, 1] = BAD
        return batch, lengths


class Reports(TrainingCallback):
    """Keeps what callbacks get."""

    def __init__(self) -> None:
        self.training: list[dict] = []
        self.validation: list[dict] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.training.append(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        self.validation.append(val_info)


def stop_after(iteration: int, kind: int = signal.SIGINT):
    """A callback that asks the run to stop when it reports this iteration."""

    class Stopper(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            if train_info["iteration"] == iteration:
                os.kill(os.getpid(), kind)

    return Stopper()


def always_nan(model, batch, lengths):
    value, tokens = trainer.default_loss(model, batch, lengths)
    return value * float("nan"), tokens


def train(tiny_model: Path, folder: Path, val: bool = False, optimizer=None, rows=None, **options) -> ca.History:
    """A short run with checkpoints; what `arguments` knows goes there. Without ``rows`` it is trained on `dataset`."""
    names = trainer.TrainingArgs.__dataclass_fields__
    changes = {name: options.pop(name) for name in list(options) if name in names}
    args = arguments(folder, **changes)
    options = {"keep_checkpoints": 9, **options}
    rate = ca.Adam(1e-3, skip_nonfinite=True) if optimizer is None else optimizer
    rows = dataset() if rows is None else rows
    return ca.train(lora(tiny_model), rate, rows, dataset() if val else None, args=args, **options)


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read(folder / "log.jsonl") if "loss" in entry]
