"""Ctrl-C and SIGTERM: the step is finished and saved, and a second one acts at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled_adam import losses
from compiled_adam.finetune.log import read
from compiled_adam.finetune.stopping import asked_to_stop
from trees import assert_identical

from tests.conftest import ROOT
from tests.tiny_runs import train, weights


@pytest.mark.slow
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
    assert_identical(saved, {path: kept[path] for path in saved})


def test_a_signal_during_validation_does_not_wait_for_its_end(tiny_model: Path, tmp_path: Path) -> None:
    calls = 0

    def loss(model, batch, lengths):
        nonlocal calls
        if not model.training:
            calls += 1
            if calls == 8:  # in the second validation, which is before iteration 3
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        return losses.next_token(model, batch, lengths)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT after iteration 2"):
        train(tiny_model, tmp_path, val=True, val_batches=6, loss=loss, keep_checkpoints=1)
    assert calls == 8 and signal.getsignal(signal.SIGINT) is handler
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    (tmp_path / "checkpoints").rename(resumed / "checkpoints")
    for folder, resume in ((whole, None), (resumed, "auto")):
        train(tiny_model, folder, val=True, val_batches=6, keep_checkpoints=1, resume=resume)
    assert_identical(*(weights(folder / "adapters.safetensors") for folder in (whole, resumed)))


def test_in_another_thread_signals_are_left_alone() -> None:
    def signal_in_thread() -> int | None:
        with asked_to_stop() as asked:
            return asked.signal

    with ThreadPoolExecutor() as pool:
        assert pool.submit(signal_in_thread).result() is None


def test_the_second_ctrl_c_acts_at_once() -> None:
    code = (
        "import time; from compiled_adam.finetune.stopping import asked_to_stop\n"
        "with asked_to_stop() as asked:\n"
        "    print('ready', flush=True)\n"
        "    while asked.signal is None: time.sleep(0.01)\n"
        "    print('going on', flush=True)\n"
        "    while True: time.sleep(0.01)"
    )
    # With Python's own handler, also where the tests run in the background and inherit that Ctrl-C is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "going on\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "once more to stop at once" in errors and "KeyboardInterrupt" in errors
