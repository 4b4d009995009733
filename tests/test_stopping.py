"""How a run ends: asked to, early, for want of memory, for losses that are not finite; and what is saved then."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

import compiled_adam as ca
from compiled_adam import loop
from compiled_adam.loader import Batches
from compiled_adam.run_log import read
from compiled_adam.stopping import TrainingStopped, is_out_of_memory
from tests.conftest import ROOT


class Tokens(list):
    """A data set of mlx-lm's kind, already tokenized."""


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


class WithoutBadBatch(WithBadBatch):
    skip = True


def test_one_bad_batch_costs_one_step_and_not_the_run(tiny_model: Path, tmp_path: Path) -> None:
    import mlx.optimizers as optim

    def run(train, optimizer, batches, iters, name):
        (tmp_path / name).mkdir()
        train(
            lora(tiny_model),
            optimizer,
            dataset(40),
            args=arguments(tmp_path / name, iters=iters),
            loss=loss_that_fails_on_bad,
            iterate_batches=batches,
        )
        return weights(tmp_path / name / "adapters.safetensors")

    stock = run(trainer.train, optim.Adam(1e-3), WithBadBatch, 12, "stock")
    assert all(mx.isnan(array).any().item() for array in stock.values())
    ours = run(ca.train, ca.Adam(1e-3, skip_nonfinite=True), WithBadBatch, 12, "ours")
    without = run(ca.train, ca.Adam(1e-3, skip_nonfinite=True), WithoutBadBatch, 11, "without")
    for path, array in without.items():
        assert mx.array_equal(ours[path], array).item(), path


def test_not_finite_for_too_long(tiny_model: Path, tmp_path: Path) -> None:
    def always_nan(model, batch, lengths):
        value, tokens = trainer.default_loss(model, batch, lengths)
        return value * float("nan"), tokens

    model = lora(tiny_model)
    start = weights_of(model)
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row.*; .*has the weights after iteration"):
        ca.train(
            model,
            ca.Adam(1e-3, skip_nonfinite=True),
            dataset(),
            args=arguments(tmp_path),
            loss=always_nan,
            nonfinite_limit=3,
            log=True,
        )
    assert len(read(tmp_path / "log.jsonl")) in (3, 4)  # a result is read while the next step is on its way
    saved = weights(tmp_path / "adapters.safetensors")
    assert all(mx.array_equal(saved[path], array).item() for path, array in start.items())

    (tmp_path / "adapters.safetensors").write_bytes(b"older")
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row.*; nothing was saved"):
        ca.train(
            lora(tiny_model), ca.Adam(1e-3), dataset(), args=arguments(tmp_path), loss=always_nan, nonfinite_limit=3
        )
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"older"  # weights that are NaN replace nothing
    with pytest.raises(TrainingStopped, match=r"the weights were not saved: .* not a number.*; nothing was saved"):
        ca.train(lora(tiny_model), ca.Adam(1e-3), dataset(), args=arguments(tmp_path), loss=always_nan)
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"older"


def weights_of(model) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        RuntimeError("cudaMallocAsync failed: out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory(error: Exception, tiny_model: Path, tmp_path: Path) -> None:
    calls = []

    def loss(model, batch, lengths):
        calls.append(batch.shape)
        if len(set(calls)) == 2:
            raise error
        return trainer.default_loss(model, batch, lengths)

    examples = dataset(12)
    examples += [(list(range(1, 100)), 0)] * 2
    expected = r"out of memory in iteration \d+: .*; .*adapters.safetensors has the weights after iteration \d+\. Use"
    with pytest.raises(TrainingStopped, match=expected):
        # The long batch is in the permutation's middle; everything before it was saved.
        ca.train(
            lora(tiny_model), ca.Adam(1e-3), examples, args=arguments(tmp_path, steps_per_save=1, iters=40), loss=loss
        )
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("[matmul] shapes"))
    with pytest.raises(RuntimeError, match="shapes"):

        def broken(*_):
            raise RuntimeError("[matmul] shapes")

        ca.train(lora(tiny_model), ca.Adam(1e-3), examples, args=arguments(tmp_path), loss=broken)


def test_early_stop_and_best(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, float("nan"), 2.0, 1.0])
    seen = {}

    def evaluate(model, **_):
        loss = next(losses)
        seen[loss] = weights_of(model)
        return loss

    monkeypatch.setattr(loop, "evaluate", evaluate)
    (tmp_path / "adapter_config.json").write_text("{}")
    ca.train(
        lora(tiny_model),
        ca.Adam(1e-3),
        dataset(),
        dataset(),
        args=arguments(tmp_path),
        save_best=True,
        early_stop_patience=2,
        log=True,
    )
    log = read(tmp_path / "log.jsonl")
    assert [entry["val_loss"] for entry in log if "val_loss" in entry] == [3.0, 2.0, None, 2.0]
    assert log[-1]["iteration"] == 9 and "val_loss" in log[-1]  # stopped before the step of iteration 9
    assert sorted(os.listdir(tmp_path / "best")) == ["adapter_config.json", "adapters.safetensors"]
    best = weights(tmp_path / "best" / "adapters.safetensors")
    last = weights(tmp_path / "adapters.safetensors")
    for path, array in best.items():
        assert mx.array_equal(array, seen[2.0][path]).item() or path  # the later 2.0 is no improvement
    assert any(not mx.array_equal(best[path], last[path]).item() for path in best)


def test_checkpoints_and_adapters_that_stay(tiny_model: Path, tmp_path: Path) -> None:
    def run(**options) -> list[str]:
        ca.train(lora(tiny_model), ca.Adam(1e-3), dataset(), args=arguments(tmp_path, iters=14), **options)
        return sorted(
            str(path.relative_to(tmp_path)) for path in tmp_path.rglob("[0-9]*") if "previous" not in path.parts
        )

    adapters = [f"00000{i:02d}_adapters.safetensors" for i in (4, 8, 12)]
    assert run() == adapters
    assert run(keep_checkpoints=2) == [*adapters, "checkpoints/0000012", "checkpoints/0000014"]
    assert run(keep_checkpoints=3, keep_adapters=1) == [
        "0000012_adapters.safetensors",
        *(f"checkpoints/00000{i:02d}" for i in (8, 12, 14)),
    ]
    assert sorted(os.listdir(tmp_path / "previous" / "checkpoints")) == ["0000012", "0000014"]


def test_a_save_that_fails_is_reported_and_the_run_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = loop.write_checkpoint

    def full(folder, *rest, **more):
        if folder.name == "0000008":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, *rest, **more)

    monkeypatch.setattr(loop, "write_checkpoint", full)
    ca.train(lora(tiny_model), ca.Adam(1e-3), dataset(), args=arguments(tmp_path), keep_checkpoints=3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["0000004", "0000012"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "not saved" in line)
    assert re.search(r"iter +8  not saved: .*No space left on device; training goes on", line)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(kind: int, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compiled_adam.cli", "lora", "--model", str(tiny_model), "--data", str(data)]
    options = "--train --iters 100000 --batch-size 2 --num-layers 2 --steps-per-report 1 --val-batches 1"
    process = subprocess.Popen(
        [*command, *options.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("iter     3"):
            break
    process.send_signal(kind)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + kind
    assert "Traceback" not in errors
    message = re.search(rf"stopped by {signal.Signals(kind).name} after iteration (\d+); .*", output + errors)
    iteration = int(message.group(1))
    assert f"adapters.safetensors has the weights after iteration {iteration}" in message.group()
    assert "--resume" in message.group()
    assert os.listdir(tmp_path / "adapters" / "checkpoints") == [f"{iteration:07d}"]
    assert read(tmp_path / "adapters" / "log.jsonl")[-1]["iteration"] == iteration
    saved = weights(tmp_path / "adapters" / "adapters.safetensors")
    kept = weights(tmp_path / "adapters" / "checkpoints" / f"{iteration:07d}" / "weights.safetensors")
    assert all(mx.array_equal(saved[path], kept[path]).item() for path in saved)


def test_a_signal_during_validation_does_not_wait_for_its_end(tiny_model: Path, tmp_path: Path) -> None:
    calls = 0

    def loss(model, batch, lengths):
        nonlocal calls
        if not model.training:
            calls += 1
            if calls == 8:  # in the second validation, which is before iteration 3
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        return trainer.default_loss(model, batch, lengths)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT after iteration 2"):
        ca.train(
            lora(tiny_model),
            ca.Adam(1e-3),
            dataset(),
            dataset(),
            args=arguments(tmp_path, val_batches=6),
            loss=loss,
            keep_checkpoints=1,
        )
    assert calls == 8 and signal.getsignal(signal.SIGINT) is handler
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    (tmp_path / "checkpoints").rename(resumed / "checkpoints")
    for folder, resume in ((whole, None), (resumed, "auto")):
        ca.train(
            lora(tiny_model),
            ca.Adam(1e-3),
            dataset(),
            dataset(),
            args=arguments(folder, val_batches=6),
            keep_checkpoints=1,
            resume=resume,
        )
    a, b = (weights(folder / "adapters.safetensors") for folder in (whole, resumed))
    assert all(mx.array_equal(a[path], b[path]).item() for path in a)


def test_the_second_ctrl_c_acts_at_once() -> None:
    code = (
        "import time; from compiled_adam.stopping import asked_to_stop\n"
        "with asked_to_stop() as asked:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "once more to stop at once" in errors and "KeyboardInterrupt" in errors


def test_options_that_cannot_be(tiny_model: Path, tmp_path: Path) -> None:
    def refused(message: str, val: bool = False, batches=Batches, **options) -> None:
        args = arguments(tmp_path, **{k: options.pop(k) for k in list(options) if k.startswith("steps")})
        with pytest.raises(ValueError, match=message):
            ca.train(
                lora(tiny_model),
                ca.Adam(1e-3),
                dataset(),
                dataset() if val else None,
                args,
                iterate_batches=batches,
                **options,
            )

    refused("save_best needs a validation loss, but there is no validation set", save_best=True)
    refused("early_stop_patience needs a validation loss", early_stop_patience=1)
    refused("early_stop_patience is 0; it must be an integer of at least 1", True, early_stop_patience=0)
    refused("keep_checkpoints is -1", keep_checkpoints=-1)
    refused("nonfinite_limit is True", nonfinite_limit=True)
    refused("steps_per_report is 0", steps_per_report=0)
    refused("a checkpoint needs batches that know their position", batches=trainer.iterate_batches, keep_checkpoints=1)
    refused("there is no checkpoint in", resume="auto")
    refused("nowhere is not a checkpoint", resume=tmp_path / "nowhere")
    ca.save_checkpoint(tmp_path / "own", ca.make_step(lora(tiny_model), trainer.default_loss))
    refused("was saved by another run", resume=tmp_path / "own")


def test_log_has_every_step(tiny_model: Path, tmp_path: Path) -> None:
    ca.train(
        lora(tiny_model),
        ca.Adam(1e-3, max_grad_norm=1.0),
        dataset(),
        args=arguments(tmp_path, steps_per_report=5, grad_accumulation_steps=2),
        log=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    assert [line["grad_norm"] is None for line in lines] == [True, False] * 6
    assert all(line["loss"] > 0 and line["tokens"] == 40 and line["seconds"] > 0 for line in lines)
    assert lines[0].keys() == {
        *("iteration", "loss", "tokens", "grad_norm", "learning_rate", "skipped", "traces", "seconds", "memory")
    }
