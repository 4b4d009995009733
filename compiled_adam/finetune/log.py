"""The log of a run: a line of JSON for every step and every validation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..base import InputError
from ..checkpoint import output


class RunLog:
    """Appends to ``file``, whose lines after iteration ``keep`` are dropped first: they are about to happen again.

    Lines of a step have ``iteration``, ``loss``, ``tokens``, ``grad_norm``, ``learning_rate``, ``skipped`` (updates
    skipped so far), ``traces``, ``seconds`` and ``memory`` (peak, bytes); of a validation ``iteration`` (before which
    it was made), ``val_loss`` and ``seconds``. What is infinite or not a number is null, as JSON has no other word.

    A log must not end a run: if it cannot be written, ``warn`` gets a sentence, once.
    """

    def __init__(self, file: Path, keep: int, warn: Callable[[str], None]) -> None:
        self._file, self._warn = file, warn
        self._stream: IO[str] | None = None
        try:
            kept = [line for line in _salvaged(file, warn) if line["iteration"] <= keep]
            # Written anew rather than cut: the last line of a run that was killed may be half a line.
            output.write(file, "".join(map(_line, kept)).encode())
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`
        except (OSError, InputError) as error:
            self._give_up(error)

    def write(self, entry: dict[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(_line(entry))
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()

    def _give_up(self, error: Exception) -> None:
        self.close()
        self._stream = None
        self._warn(f"{self._file} cannot be written any more ({error}); the run goes on without it")


def is_log(file: Path) -> bool:
    """Whether ``file`` begins with a line as `RunLog` writes it."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with open(file, encoding="utf-8") as stream:
            _entry(stream.readline(1 << 16))
    except (OSError, ValueError):
        return False
    return True


def _salvaged(file: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """The lines of a log; if there are others among them, as after a power failure, it is kept under another name."""
    if not file.is_file():
        return []
    entries = []
    *lines, last = file.read_text(encoding="utf-8", errors="replace").split("\n")
    lines += [last] if last and not last.startswith("{") else []  # else the half line of a run that was killed
    for line in lines:
        with suppress(InputError):
            entries.append(_entry(line))
    if len(entries) < len(lines):
        damaged = file.with_name(f"damaged-{file.name}")
        file.rename(damaged)
        warn(
            f"{len(lines) - len(entries)} lines of {file} cannot be read; it is {damaged} now, and the others are kept"
        )
    return entries


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line without its end, of a run that was killed, is left out.

    Raises InputError, with the number of the line, for a file that is no log.
    """
    try:
        *lines, _ = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not the log of a run: {error}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(_entry(line))
        except InputError as error:
            raise InputError(f"{file} is not the log of a run: line {number} {error}") from None
    return entries


# What is written by `RunLog.write`. Null is for what is not finite, and for what an optimizer does not have.
_MAY_BE_NULL = {"loss", "val_loss", "grad_norm", "learning_rate"}
_NEVER_NEGATIVE = {"iteration", "tokens", "grad_norm", "skipped", "traces", "seconds", "memory"}
LARGEST = 3.5e38  # no line has more than float32 can hold


def _entry(line: str) -> dict[str, Any]:
    """A line as it was written; InputError if it is something else."""
    try:
        entry = json.loads(line)
    except RecursionError:
        raise InputError("is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise InputError("is not an object")
    if type(entry.get("iteration")) is not int:
        raise InputError(f"has iteration {_short(entry.get('iteration'))}; it must be a whole number")
    for name in entry.keys() & (_MAY_BE_NULL | _NEVER_NEGATIVE):
        value, nullable, least = entry[name], name in _MAY_BE_NULL, 0 if name in _NEVER_NEGATIVE else -LARGEST
        if not (value is None and nullable) and not (is_number(value) and value >= least):
            allowed = f"a number from {least:g} to {LARGEST:g}{', or null' if nullable else ''}"
            raise InputError(f"has {name} {_short(value)}; it must be {allowed}")
    return entry


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that a picture can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST  # false for nan


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def finite(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with None for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry)) + "\n"
