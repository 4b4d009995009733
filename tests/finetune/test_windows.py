"""A window of accumulated gradients trains like one big batch, whatever the tokens of its micro-batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam import losses
from compiled_adam.base.errors import InputError
from compiled_adam.finetune.batches import Batches
from compiled_adam.finetune.padding import spaced
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from trees import assert_identical

from tests.tiny_runs import Reports, stop_after, train, weights

STEPS, WINDOWS = 3, 4


class Model(nn.Module):
    """Each token sees those before it, as in a language model, so that padding changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        self.embed, self.out = nn.Embedding(32, 16), nn.Linear(16, 32)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.out(mx.tanh(mx.cumsum(self.embed(tokens), axis=1)))


def examples() -> list[tuple[list[int], int]]:
    """Of 4 to 60 tokens; prompts fill the longest ones, which are the first batch of all."""
    chance = np.random.default_rng(0)
    lengths = [*chance.integers(4, 50, 30).tolist(), 60, 60]
    return [(chance.integers(0, 32, n).tolist(), n if n == 60 else n // 3) for n in lengths]


def optimizer() -> ca.AdamW:
    return ca.AdamW(1e-2, max_grad_norm=0.2, skip_nonfinite=True)


def big(batches: list[tuple[mx.array, ...]]) -> tuple[mx.array, mx.array]:
    longest = max(tokens.shape[1] for tokens, _ in batches)
    padded = [mx.pad(tokens, [(0, 0), (0, longest - tokens.shape[1])]) for tokens, _ in batches]
    return mx.concatenate(padded), mx.concatenate([ends for _, ends in batches])


@pytest.mark.parametrize("options", [{"group_by_length": True}, {"batch_tokens": 128}], ids=["examples", "tokens"])
def test_a_window_is_one_big_batch(options: dict[str, Any], tmp_path: Path) -> None:
    make = partial(Batches, padding=spaced(), **options)
    model, reports = Model(), Reports()
    args = TrainingArgs(batch_size=2, iters=STEPS * WINDOWS, adapter_file=str(tmp_path / "a.safetensors"))
    args.steps_per_report, args.grad_accumulation_steps = STEPS, STEPS
    np.random.seed(1)
    ca.train(model, optimizer(), examples(), args=args, iterate_batches=make, training_callback=reports)

    expected, its = Model(), optimizer()
    np.random.seed(1)
    batches = make(examples(), 2, 2048, loop=True)
    counts, expected_norms = [], []
    for _ in range(WINDOWS):
        window = [next(batches) for _ in range(STEPS)]
        counts += [losses.trained_targets(*batch).sum().item() for batch in window]
        _, gradients = nn.value_and_grad(expected, losses.next_token)(expected, *big(window))
        its.update(expected, gradients)
        expected_norms.append(its.grad_norm.item())
    assert counts[0] == 0 and len({*counts}) > STEPS  # no target at all in the first one
    assert min(expected_norms) > 0.2  # so that it is clipped
    norms = [info["grad_norm"] for info in reports.training]
    assert norms == pytest.approx(expected_norms, rel=1e-5)  # float32: the same sums in another order
    for (path, a), (_, b) in zip(*(tree_flatten(m.parameters()) for m in (model, expected)), strict=True):
        assert mx.abs(a - b).max().item() <= 1e-5, path


def test_a_stopped_run_does_not_apply_a_window_that_is_not_full(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path, grad_accumulation_steps=3, training_callback=stop_after(4))
    saved = weights(tmp_path / "adapters.safetensors")
    kept = weights(ca.latest_checkpoint(tmp_path / "checkpoints") / "weights.safetensors")
    assert_identical(saved, {path: kept[path] for path in saved})


def test_a_window_goes_on_with_the_weights_that_it_has(tiny_model: Path, tmp_path: Path) -> None:
    """Beside hundreds of tokens, a micro-batch that counts 1 would add nothing."""
    train(tiny_model, tmp_path, iters=4, grad_accumulation_steps=3)
    options = {"iters": 8, "weighted": False, "allow": ["weighted"], "resume": "auto"}
    with pytest.raises(InputError, match=r"in the middle of a window, whose 1 micro-batches are weighted in another"):
        train(tiny_model, tmp_path, grad_accumulation_steps=3, **options)
    train(tiny_model, tmp_path, iters=6, grad_accumulation_steps=3, resume="auto")
    train(tiny_model, tmp_path, grad_accumulation_steps=3, **options)
