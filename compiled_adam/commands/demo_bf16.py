"""The demo's last part: what stock AdamW loses in bfloat16, and ours does not.

The model is fine-tuned three times on the same batches, all of its weights: in float32 for reference, and in bfloat16
by ``mlx.optimizers.AdamW`` and by ours. The learning rate is one of the usual ones for full fine-tuning, at which most
updates are below half the spacing of bfloat16 at the weight, 2^-9 of it, and vanish when it is rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.trainer import evaluate, iterate_batches
from mlx_lm.utils import load

from ..finetune.console import TrainingProgress
from ..optimizers import AdamW
from ..step import losses, make_step

LEARNING_RATE = 5e-5
CONTENDERS = {
    "float32   compiled_adam.AdamW": (mx.float32, AdamW),
    "bfloat16  mlx.optimizers.AdamW": (mx.bfloat16, optim.AdamW),
    "bfloat16  compiled_adam.AdamW": (mx.bfloat16, AdamW),
}


class Losses(NamedTuple):
    """Validation losses of one fine-tuning."""

    before: float
    after: float


def compare(model: Path, train_set: Any, valid_set: Any, updates: int, seed: int) -> dict[str, Losses]:
    """Fine-tunes the model in the folder ``model`` with each of the `CONTENDERS`; nothing is written."""
    results = {}
    with TrainingProgress(len(CONTENDERS) * updates) as progress:
        for name, (dtype, optimizer) in CONTENDERS.items():
            network, *_ = load(str(model))
            network.set_dtype(mx.bfloat16)  # all begin with the same weights
            network.set_dtype(dtype)
            before = evaluate(network, valid_set, batch_size=4, num_batches=-1, loss=losses.next_token)
            network.train()
            np.random.seed(seed)  # the order of the batches
            step = make_step(network, losses.next_token, optimizer(LEARNING_RATE, bias_correction=True), weighted=True)
            batches = iterate_batches(train_set, batch_size=1, max_seq_length=256, loop=True)
            for _, batch in zip(range(updates), batches, strict=False):
                step(*batch)
                progress.advance()
            after = evaluate(network, valid_set, batch_size=4, num_batches=-1, loss=losses.next_token)
            results[name] = Losses(before, after)
            progress.line(f"{name:<32}validation loss {before:.4f} -> {after:.4f}")
    return results
