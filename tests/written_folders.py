"""Checkpoints of one number, which show what a folder has."""

from __future__ import annotations

from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
from compiled_adam.checkpoint import durable


class Scalar(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.w = mx.array(float(value))


def make(value: float = 0.0) -> ca.TrainStep:
    return ca.make_step(Scalar(value), lambda model: model.w, ca.Adam(1e-2))


def save(folder: Path, value: int) -> None:
    """A checkpoint whose weight and whose extra say the same."""
    ca.save_checkpoint(folder, make(value), {"value": value})


def load(folder: Path) -> int:
    step = make()
    value = ca.load_checkpoint(folder, step)["value"]
    assert step.model.w.item() == value
    return value


def write(folder: Path, value: str) -> None:
    with durable.replacing(folder) as temporary:
        for name in "ab":
            (temporary / name).write_text(value)
