"""The numbers of a run: the results of steps, which are read one step late, and their sums between two reports."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import mlx.core as mx

from ..step import StepResult, TrainStep


class StepReader:
    """Turns a `StepResult` into numbers when the next step is on its way, so that the device never waits for Python."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self._waiting: tuple[int, StepResult, int, float] | None = None
        self._clock = time.perf_counter()

    def put(self, iteration: int, result: StepResult) -> list[dict[str, Any]]:
        """The numbers of the step before this one, if there is one."""
        ready = self._read()
        # The time since the step before was put is this one's, whether the device has begun with it (CUDA, Metal) or
        # is nearly done, as on the CPU, whose queue is short.
        self._waiting = iteration, result, self.step.traces["grad"], self.restart_clock()
        return ready

    def drain(self) -> list[dict[str, Any]]:
        """The numbers of the step that was put last, unless they were given already. Waits for it."""
        ready = self._read()
        for entry in ready:
            entry["seconds"] += self.restart_clock()
        return ready

    def _read(self) -> list[dict[str, Any]]:
        if self._waiting is None:
            return []
        (iteration, result, traces, seconds), self._waiting = self._waiting, None
        tokens = _number(result.aux[0])  # a loss of one's own may count in Python
        return [
            {
                "iteration": iteration,
                "loss": result.loss.item() if tokens > 0 else math.nan,  # the mean of nothing
                "tokens": tokens,
                "grad_norm": _number(result.grad_norm),
                "learning_rate": _number(result.learning_rate),
                "skipped": result.skipped.item(),
                "traces": traces,
                "seconds": seconds,
                "memory": mx.get_peak_memory(),
                "votes": _number(result.extra),
            }
        ]

    def restart_clock(self) -> float:
        """The seconds since the last call. To be called after a validation or a save, whose time is not a step's."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before


class Report:
    """The sums between two training reports."""

    def __init__(self) -> None:
        # Only what JSON can hold: checkpoints have it, so that a resumed run reports what it would have reported.
        self.sums: dict[str, Any] = {"trained_tokens": 0, "grad_norm": None}
        self.last: dict[str, Any] = {}  # step
        self._open()

    def _open(self) -> None:
        self.sums |= {"loss": 0.0, "losses": 0, "tokens": 0, "iterations": 0, "seconds": 0.0}

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a step. A line of a log may lack some numbers."""
        tokens, loss, norm = entry.get("tokens", 0), entry.get("loss"), entry.get("grad_norm")
        if tokens > 0:  # otherwise there is no loss
            self.sums["loss"] += math.nan if loss is None else loss
            self.sums["losses"] += 1
        self.sums["tokens"] += tokens
        self.sums["trained_tokens"] += tokens
        self.sums["seconds"] += entry.get("seconds", 0.0)
        self.sums["iterations"] += 1
        if norm is not None:
            self.sums["grad_norm"] = norm
        self.last = entry

    @property
    def loss(self) -> float:
        """The mean over those iterations that had a token to train, nan if none had."""
        return self.sums["loss"] / self.sums["losses"] if self.sums["losses"] else math.nan

    def close(self) -> dict[str, Any]:
        """The dictionary for callbacks: mlx-lm's, and three more keys; starts the next report."""
        sums, last = self.sums, self.last
        info = {
            "iteration": last["iteration"],
            "train_loss": self.loss,
            "learning_rate": last["learning_rate"],
            "iterations_per_second": sums["iterations"] / sums["seconds"],
            "tokens_per_second": sums["tokens"] / sums["seconds"],
            "trained_tokens": sums["trained_tokens"],
            "peak_memory": last["memory"] / 1e9,
            "grad_norm": sums["grad_norm"],
            "skipped_steps": last["skipped"],
            "traces": last["traces"],
        }
        self._open()
        return info


def failures(before: int, entry: dict[str, Any]) -> int:
    """How many steps in a row were not finite, after one more; ``before`` counts those before it.

    A micro-batch without an update has no gradient norm, so that a finite loss does not say that all is well. Nor does
    one without tokens, which has no loss and the gradient 0, unless it ends a window in which others have some. With a
    learning rate that is none an update is skipped, or makes the weights not finite.
    """
    norm, tokens, rate = entry["grad_norm"], entry["tokens"], entry.get("learning_rate")
    if (tokens > 0 and not math.isfinite(entry["loss"])) or (norm is not None and not math.isfinite(norm)):
        return before + 1
    if norm is not None and rate is not None and not 0 <= rate < math.inf:
        return before + 1
    return before if norm is None or (tokens <= 0 and norm == 0) else 0


def machine_memory() -> float:
    """The memory of this machine, in bytes."""
    known = mx.device_info().get("memory_size")
    return float(known) if known else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, mx.array) else value
