"""A run that meets a new sequence length at every step neither traces without end nor grows."""

from __future__ import annotations

import gc
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.commands import lora_options
from compiled_adam.finetune import trainer as our_trainer
from mlx_lm.tuner import trainer

LENGTHS = 400
# Two windows of many steps, around the 100th and before the 400th, because some of a step's results are always live.
COMPARED = [*range(80, 120), *range(360, 400)]


class Small(nn.Module):
    """As little of a language model as mlx-lm's loss needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(32, 8), nn.RMSNorm(8), nn.Linear(8, 32)
        self.layers = [self.norm]

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head(self.norm(self.embedding(tokens)))


def live_arrays() -> int:
    gc.collect()
    return sum(isinstance(each, mx.array) for each in gc.get_objects())


@pytest.mark.slow
@pytest.mark.usefixtures("only_new_objects")
def test_four_hundred_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[ca.TrainStep] = []

    def make_step(*args, **kwargs) -> ca.TrainStep:
        steps.append(ca.make_step(*args, **kwargs))
        return steps[0]

    monkeypatch.setattr(our_trainer, "make_step", make_step)
    max_traces = lora_options.settings(["--max-traces", "16"]).max_traces
    # In a mixed order, or the batches themselves would grow over the run.
    lengths = np.random.default_rng(0).permutation(LENGTHS) + 3
    live: list[tuple[int, int, int]] = []

    def batches(dataset, **_):
        for i, length in enumerate(lengths):
            traces = steps[0].traces
            counted = live_arrays() if i in COMPARED else 0  # it takes longer than a step
            live.append((traces["grad"] - traces["evicted"], counted, mx.get_active_memory()))
            yield mx.zeros((1, int(length)), mx.int32) + 5, mx.array([[0, int(length)]])

    mx.random.seed(0)
    args = trainer.TrainingArgs(
        batch_size=1, iters=LENGTHS, steps_per_report=1000, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    ca.train(Small(), ca.Adam(1e-3), [0], args=args, iterate_batches=batches, max_traces=max_traces)
    assert steps[0].traces == {"grad": LENGTHS, "accumulate": 0, "update": 1, "evicted": LENGTHS - 16}
    traces, arrays, memory = (np.array(column) for column in zip(*live, strict=True))
    assert traces.max() == 16
    early, late = COMPARED[: len(COMPARED) // 2], COMPARED[len(COMPARED) // 2 :]
    assert 0 < arrays[late].max() <= arrays[early].max()
    # The median, because lengths differ by up to 400 tokens; what a trace holds on to would be there 280 times.
    assert np.median(memory[late]) <= 1.2 * np.median(memory[early])


def test_the_only_trace_that_is_kept_serves_every_call() -> None:
    model = nn.Linear(2, 1)
    step = ca.make_step(model, lambda model, x: mx.square(model(x)).mean(), ca.Adam(1e-2), max_traces=1)
    for _ in range(4):
        step(mx.ones((1, 2)))
    assert step.traces["grad"] == step.traces["update"] == 1
