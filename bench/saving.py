"""What a verified checkpoint costs, against writing the same bytes with MLX and flushing them to the disk."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import compiled_adam as ca

from .spread import noisy, ratios


class Matrices(nn.Module):
    """``count`` trainable matrices of a million parameters each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.matrices = [mx.random.normal((1000, 1000)) for _ in range(count)]


def plain(folder: Path, step: ca.TrainStep) -> None:
    """The same arrays, each file written by MLX and flushed."""
    folder.mkdir()
    state = step.state_dict()
    for name in ("model", "optimizer"):
        file = folder / f"{name}.safetensors"
        mx.save_safetensors(str(file), state[name])
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def measure(millions: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, taking turns in a new folder on an idle disk, and the ratios within a round."""
    mx.random.seed(0)
    model = Matrices(millions)
    step = ca.make_step(model, lambda model: sum((m.sum() for m in model.matrices), mx.array(0.0)), ca.AdamW(1e-3))
    step()
    contenders: dict[str, Callable[[Path, ca.TrainStep], None]] = {
        "mx.save_safetensors": plain,
        "save_checkpoint": ca.save_checkpoint,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        for _ in range(rounds):
            order.reverse()
            for name in order:
                folder = Path(temporary) / "checkpoint"
                os.sync()  # what is still being written must not be counted to the next one
                start = time.perf_counter()
                contenders[name](folder, step)
                times[name].append(time.perf_counter() - start)
                shutil.rmtree(folder)
    within = ratios(times["save_checkpoint"], times["mx.save_safetensors"])
    return {
        "parameters": 1_000_000 * millions,
        "bytes": sum(a.nbytes for part in ("model", "optimizer") for a in step.state_dict()[part].values()),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(within),
        "ratio_noisy": noisy(within),
        "ratios": sorted(within),
        "rounds": times,
    }
