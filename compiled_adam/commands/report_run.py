"""A run as the report sees it: its log, the options it was started with, and its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..base import InputError
from ..finetune import log
from ..finetune.names import CONFIG, LOG, RECORD
from ..finetune.record import is_alive, read

OF_A_STEP = ("tokens", "grad_norm", "learning_rate", "skipped", "traces", "seconds", "memory")  # what is drawn
_NO_RECORD: Mapping[str, Any] = {"sessions": [], "samples": []}

Points = list[tuple[int, float]]  # an iteration and a value


class Run(NamedTuple):
    """The log of one run, taken apart, the options it was started with, and its `finetune.record`."""

    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    settings: dict[str, Any]
    record: Mapping[str, Any] = _NO_RECORD

    def column(self, name: str) -> Points:
        """What a line of a step has, by iteration; where it is null there is no point."""
        return [(step["iteration"], step[name]) for step in self.steps if step[name] is not None]

    @property
    def losses(self) -> Points:
        """The losses of validations, each of the weights before the step of its iteration, as those of steps are."""
        return [(each["iteration"], each["val_loss"]) for each in self.validations if each["val_loss"] is not None]

    @property
    def best(self) -> tuple[int, float] | None:
        """The lowest validation loss, and the iteration of it."""
        return min(self.losses, key=lambda point: point[1], default=None)

    @property
    def skipped(self) -> list[int]:
        """The iterations whose update was skipped."""
        counts = [step["skipped"] for step in self.steps]
        before = [0, *counts[:-1]]
        return [step["iteration"] for step, a, b in zip(self.steps, before, counts, strict=True) if b > a]

    @property
    def last(self) -> int:
        """The last iteration."""
        return int(self.steps[-1]["iteration"])

    @property
    def session(self) -> dict[str, Any] | None:
        """The newest session of the record."""
        return self.record["sessions"][-1] if self.record["sessions"] else None

    @property
    def is_over(self) -> bool:
        """Whether no more lines can come, as far as anybody knows."""
        if self.session is not None:
            return not is_alive(self.session)
        iterations = self.settings.get("iters")
        return isinstance(iterations, int) and self.last >= iterations


def load(folder: Path) -> Run:
    """The run whose adapters are in ``folder``.

    Raises:
        InputError: the folder has no log of a run, or it has no step yet, or log, settings or record are damaged.
    """
    file = folder / LOG
    if not file.is_file():
        raise InputError(f"{folder} has no {LOG}; give a folder that `compiled-adam lora` wrote its adapters to")
    entries = log.read(file)
    steps = [entry for entry in entries if "loss" in entry]
    for number, entry in enumerate(entries, start=1):
        if "loss" in entry and (missing := [name for name in OF_A_STEP if name not in entry]):
            raise InputError(f"{file} is not the log of a run: line {number} has no {missing[0]}")
    if not steps:
        raise InputError(f"{file} has no step yet; train first, or wait for the first step with --watch")
    validations = [entry for entry in entries if "val_loss" in entry]
    return Run(str(folder), steps, validations, _settings(folder / CONFIG), read(folder / RECORD))


def _settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    if not file.is_file():
        raise InputError(f"{file} is no file; remove it, or put back what `compiled-adam lora` wrote there")
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is not JSON ({error}); repair it, or remove it: then the report shows no settings"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(f"{file} is not an object of settings; repair it, or remove it: then the report shows none")
    return settings
