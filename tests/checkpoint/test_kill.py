"""A run that is killed at any moment, and resumed, ends bit for bit where the uninterrupted one ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from tests.conftest import ROOT

ITERS = 24
OPTIONS = [
    "--train",
    *["--iters", str(ITERS), "--batch-size", "2", "--num-layers", "2"],
    *["--val-batches", "1", "--steps-per-eval", "7", "--steps-per-report", "4", "--save-every", "2"],
    *["--grad-accumulation-steps", "3", "-c", "dropout.yaml", "--max-grad-norm", "1.0"],
]
DROPOUT = (
    "lora_parameters: {rank: 8, dropout: 0.2, scale: 20.0}\nlr_schedule: {name: cosine_decay, arguments: [1e-3, 9]}\n"
)


class Job:
    """One command line in one folder, with adapters in sub-folders."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.arguments = folder, arguments
        (folder / "dropout.yaml").write_text(DROPOUT)

    def start(self, out: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "compiled_adam.cli", "lora", *OPTIONS, *self.arguments]
        return subprocess.Popen(
            [*command, "--adapter-path", out, *more],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, out: str, *more: str) -> str:
        process = self.start(out, *more)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return output


def newest(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("[0-9]*") if (path / "meta.json").exists())


def logged(out: Path) -> int:
    """How many steps the log has."""
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_somewhere(process: subprocess.Popen[str], out: Path, chance: random.Random) -> None:
    """SIGKILL when the log has some more steps, every second time as soon as a save is seen after that."""
    end = min(logged(out) + chance.randrange(ITERS // 2), ITERS - 1)
    while process.poll() is None and logged(out) <= end:
        time.sleep(0.001)
    if chance.random() < 0.5:
        while process.poll() is None and not list(out.glob("**/.*.partial*")):
            time.sleep(0.0002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_same_run(one: Path, other: Path) -> None:
    """Adapters, checkpoint (weights, moments, residuals, window, random states, sums) and losses, bit for bit."""
    # "previous-1" has the log of a start that was killed before its first checkpoint.
    names = [sorted(p.name for p in folder.iterdir() if "previous-" not in p.name) for folder in (one, other)]
    assert names[0] == names[1]
    files = ["adapters.safetensors", *(f"checkpoints/{ITERS:07d}/{n}.safetensors" for n in ("weights", "optimizer"))]
    for file in files:
        a, b = (mx.load(str(folder / file)) for folder in (one, other))
        assert a.keys() == b.keys()
        for path in a:
            assert a[path].dtype == b[path].dtype and mx.array_equal(a[path], b[path]).item(), (file, path)
    metas = [json.loads((folder / f"checkpoints/{ITERS:07d}/meta.json").read_text()) for folder in (one, other)]
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    for meta in metas:
        del meta["sha256"], meta["files"], meta["extra"]["report"]["seconds"]  # the files are compared above
    assert metas[0] == metas[1]
    for log in logs:
        for line in log:
            for measured in ("seconds", "memory", "traces"):  # of the process
                line.pop(measured, None)
    assert logs[0] == logs[1]


def killed_and_resumed(job: Job, kills: int, seed: int) -> int:
    """Kills and resumes one run again and again until it is through; how many of the kills met a checkpoint."""
    job.finish("whole")
    chance = random.Random(seed)
    resumed, done = 0, 0
    while done < kills:
        # Killed so often that no progress could be made, each kill goes on from a checkpoint or from the start.
        out = job.folder / "killed"
        more = ("--resume",) if newest(out) else ()
        process = job.start("killed", *more)
        kill_somewhere(process, out, chance)
        done += 1
        resumed += bool(more)
        if any(path.name == f"{ITERS:07d}" for path in newest(out)) and done < kills:
            job.finish("killed", "--resume")
            assert_same_run(job.folder / "whole", out)
            for path in newest(out)[-1:]:  # go back to an early point, for the next kills
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
    job.finish("killed", *(("--resume",) if newest(job.folder / "killed") else ()))
    assert_same_run(job.folder / "whole", job.folder / "killed")
    return resumed


@pytest.fixture
def half_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with bfloat16 weights."""
    folder = tmp_path / "half"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = mx.load(str(tiny_model / "model.safetensors"))
    assert isinstance(weights, dict)
    halves = {path: array.astype(mx.bfloat16) for path, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves, metadata={"format": "mlx"})
    return folder


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(half_model: Path, data: Path, tmp_path: Path) -> None:
    full = ("--fine-tune-type", "full", "--optimizer", "adamw", "--moments", "8bit")
    job = Job(tmp_path, "--model", str(half_model), "--data", str(data), *full)
    assert killed_and_resumed(job, kills=3, seed=0) >= 1


@pytest.mark.long
@pytest.mark.parametrize("policy", ["float32", "bfloat16", "8bit", "param"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_fifty_times(policy: str, kind: str, half_model: Path, tiny_model: Path, data: Path, tmp_path) -> None:
    # Full fine-tuning of bfloat16 weights has residuals; adapters, like everything with dropout, are float32.
    model = half_model if kind == "full" else tiny_model
    more = ("--fine-tune-type", kind, "--optimizer", "adamw", "--moments", policy)
    job = Job(tmp_path, "--model", str(model), "--data", str(data), *more)
    assert killed_and_resumed(job, kills=7, seed=hash_of(policy, kind)) >= 3


def hash_of(*words: str) -> int:
    return sum(ord(letter) for word in words for letter in word)
