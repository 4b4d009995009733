"""Folders of runs for the report, as `compiled-adam lora` leaves them, without a training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from compiled_adam.finetune.log import RunLog
from compiled_adam.finetune.record import Record


def make_run(folder: Path, iterations: int = 40, **settings) -> Path:
    """A log as `lora` writes it: every tenth update skipped, every fourth clipped at 1."""
    folder.mkdir()
    log = RunLog(folder / "log.jsonl", 0, warn=pytest.fail)
    for i in range(1, iterations + 1):
        if i % 20 == 1:
            log.write({"iteration": i, "val_loss": 5.0 / i + 1, "seconds": 0.1})
        bad = i % 10 == 0
        log.write(
            {
                "iteration": i,
                "loss": float("nan") if bad else 4.0 / i + 1,
                "tokens": 100,
                "grad_norm": float("inf") if bad else (2.0 if i % 4 == 1 else 0.5),
                "learning_rate": 1e-3 / i,
                "skipped": i // 10,
                "traces": min(i, 3),
                "seconds": 0.05,
                "memory": 2 * 10**9,
            }
        )
    log.close()
    (folder / "adapter_config.json").write_text(json.dumps({"max_grad_norm": 1.0, "seed": 0, **settings}))
    return folder


def record(folder: Path, because: str = "all 40 iterations are done", answers=(), last: int = 40) -> None:
    """A record as `train` writes it, of this machine; with ``answers`` before and after, three texts each."""
    with Record(folder / "run.json", 0, 1, warn=pytest.fail) as made:
        made.because = because
        for iteration in (0, last) if answers else ():
            texts = [dict(zip(("prompt", "expected", "answer"), each, strict=True)) for each in answers]
            made.add(iteration, [text if iteration else {**text, "answer": "the the the of"} for text in texts])


def example(folder: Path) -> Path:
    """A run as people have them: noise, a warmup, two updates that were skipped, and overfitting at the end."""
    chance = random.Random(0)
    folder.mkdir()
    log = RunLog(folder / "log.jsonl", 0, warn=pytest.fail)
    for i in range(1, 301):
        learned = 1.8 * math.exp(-i / 60)
        if i == 1 or i % 25 == 0:
            log.write({"iteration": i, "val_loss": 1.9 + learned + 0.0012 * max(0, i - 150), "seconds": 0.3})
        norm = math.inf if i in (40, 41) else 0.8 * math.exp(chance.gauss(0, 0.4))
        log.write(
            {
                "iteration": i,
                "loss": 1.75 + learned - 0.001 * i + chance.gauss(0, 0.12),
                "tokens": chance.randint(300, 500),
                "grad_norm": norm,
                "learning_rate": 2e-5 * min(1, i / 30) * (1 + math.cos(math.pi * i / 300)) / 2,
                "skipped": (i >= 40) + (i >= 41),
                "traces": min(i, 6),
                "seconds": chance.uniform(0.2, 0.3),
                "memory": 2_100_000_000 + 10**6 * min(i, 60),
            }
        )
    log.close()
    settings = {"iters": 300, "max_grad_norm": 1.0, "bias_correction": True, "learning_rate": 2e-5, "model": "model"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    said = ("How often is a run validated?", "Every 200 iterations, unless --steps-per-eval says otherwise.")
    record(folder, "all 300 iterations are done", [(*said, "Every 200 iterations by default.")], 300)
    return folder
