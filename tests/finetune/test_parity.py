"""With everything of ours off, sixty iterations of mlx-lm's own loop and of ours are the same run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.commands.small_model import texts
from mlx_lm import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.tiny_runs import Reports, weights


def run(train, loss, optimizer, tiny_model: Path, kind: str, accumulate: int, file: Path) -> tuple[list, list, dict]:
    model, tokenizer = load(str(tiny_model))[:2]
    mx.random.seed(1)
    np.random.seed(0)
    model.freeze()
    if kind == "full":
        for layer in model.layers[-2:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 10.0}, use_dora=kind == "dora")
    text = texts()[1]
    # Pieces of two lengths.
    pieces = [{"text": text[i : i + (40 if i % 400 else 80)]} for i in range(0, 6000, 100)]
    train_set, valid_set = (CacheDataset(TextDataset(part, tokenizer)) for part in (pieces[8:], pieces[:8]))
    args = trainer.TrainingArgs(
        batch_size=2,
        iters=60,
        val_batches=2,
        steps_per_report=1,
        steps_per_eval=25,
        steps_per_save=1000,
        adapter_file=str(file),
        grad_accumulation_steps=accumulate,
    )
    reports = Reports()
    train(model, optimizer, train_set, valid_set, args, loss=loss, training_callback=reports)
    losses = [info["train_loss"] for info in reports.training], [info["val_loss"] for info in reports.validation]
    return *losses, weights(file)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_sixty_iterations_of_mlx_lm(kind: str, accumulate: int, tiny_model: Path, tmp_path: Path) -> None:
    rate = optim.join_schedules([optim.linear_schedule(0.0, 1e-3, 5), optim.cosine_decay(1e-3, 55 // accumulate)], [6])
    training, validation, stock = run(
        trainer.train, trainer.default_loss, optim.Adam(rate), tiny_model, kind, accumulate, tmp_path / "a.safetensors"
    )
    train = partial(ca.train, weighted=False)
    our_training, our_validation, ours = run(
        train, ca.losses.like_mlx_lm, ca.Adam(rate), tiny_model, kind, accumulate, tmp_path / "b.safetensors"
    )
    assert len(our_training) == 60 and training[-1] < training[0]
    # Float32 rounding in differently fused graphs.
    assert our_training == pytest.approx(training, rel=1e-5)
    assert our_validation == pytest.approx(validation, rel=1e-5)
    assert ours.keys() == stock.keys()
    for path, array in stock.items():
        # Adam divides by sqrt(v): where that is tiny, rounding of the gradient moves the whole step.
        np.testing.assert_allclose(
            np.array(ours[path]), np.array(array), atol=1e-3 * mx.abs(array).max().item(), rtol=0, err_msg=path
        )
