"""What a resumed run must have in common with the one that was stopped."""

from __future__ import annotations

from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import numpy as np
import pytest
from compiled_adam.base.errors import TrainingStopped
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from trees import assert_identical

from tests.tiny_runs import always_nan, losses_of, stop_after, train, weights


def test_an_early_stop_is_the_same_when_resumed(tiny_model: Path, tmp_path: Path, capsys) -> None:
    options = {"val": True, "iters": 60, "steps_per_eval": 3, "early_stop_patience": 2, "log": True}
    bad = ca.Adam(0.3, skip_nonfinite=True)  # so fast that the loss soon rises
    train(tiny_model, tmp_path, optimizer=bad, **options)
    stopped = losses_of(tmp_path)
    assert len(stopped) < 59
    train(tiny_model, tmp_path, optimizer=ca.Adam(0.3, skip_nonfinite=True), resume="auto", **options)
    assert losses_of(tmp_path) == stopped
    assert capsys.readouterr().out.count("stopped early: 2 validations without a lower loss") == 2


def test_more_iterations_follow_as_if_the_last_had_not_been_the_last(tiny_model: Path, tmp_path: Path) -> None:
    options = {"val": True, "log": True, "steps_per_eval": 5, "grad_accumulation_steps": 3}
    for name, iterations in (("long", [20]), ("short", [8, 13, 20])):
        (tmp_path / name).mkdir()
        for i, iters in enumerate(iterations):
            train(tiny_model, tmp_path / name, iters=iters, resume="auto" if i else None, **options)
    assert losses_of(tmp_path / "long") == losses_of(tmp_path / "short")
    assert_identical(*(weights(tmp_path / name / "adapters.safetensors") for name in ("long", "short")))


def test_random_numbers_that_a_callback_draws(tiny_model: Path, tmp_path: Path) -> None:
    class Drawing(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            np.random.permutation(7)

    options = {"log": True, "training_callback": Drawing(), "steps_per_save": 1}
    for name, iterations in (("long", [20]), ("short", [5, 20])):
        (tmp_path / name).mkdir()
        for i, iters in enumerate(iterations):
            train(tiny_model, tmp_path / name, iters=iters, resume="auto" if i else None, **options)
    assert losses_of(tmp_path / "long") == losses_of(tmp_path / "short")


def test_dropout_is_on_again_after_a_validation(tiny_model: Path, tmp_path: Path) -> None:
    seen = []

    def loss(model, batch, lengths):
        seen.append(model.training)
        return trainer.default_loss(model, batch, lengths)

    train(tiny_model, tmp_path, val=True, loss=loss, steps_per_eval=1, iters=3)
    # One trace for training, and two batches for each of three validations, called each time.
    assert seen.count(True) == 1 and seen.count(False) == 6


def test_failures_in_a_row_are_counted_over_a_stop(tiny_model: Path, tmp_path: Path) -> None:
    options = {"loss": always_nan, "log": True, "iters": 60}
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path, training_callback=stop_after(5), nonfinite_limit=8, **options)
    with pytest.raises(TrainingStopped, match=r"not finite in (8|9) steps in a row"):
        train(tiny_model, tmp_path, resume="auto", nonfinite_limit=8, **options)


@pytest.mark.parametrize("limit", [2, 3, 7])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_limit_of_failures_is_met_whatever_the_reports(
    limit: int, every: int, tiny_model: Path, tmp_path: Path
) -> None:
    def nan_gradient(model, batch, lengths):
        value, tokens = trainer.default_loss(model, batch, lengths)
        # Finite, but with a gradient that is not: sqrt at zero.
        return value + mx.sqrt(0.0 * value) * 0.0, tokens

    with pytest.raises(TrainingStopped, match="not finite in"):
        options = {"steps_per_report": every, "grad_accumulation_steps": 2, "iters": 60}
        train(tiny_model, tmp_path, loss=nan_gradient, nonfinite_limit=limit, **options)
