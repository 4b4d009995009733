"""The log of a run: a line of JSON for every step and every validation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .errors import InputError

LOG = "log.jsonl"  # its name beside the adapters


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
            kept = [line for line in _salvaged(file, warn) if line.get("iteration", 0) <= keep] if keep else []
            # Written anew rather than cut: the last line of a run that was killed may be half a line.
            temporary = file.with_name(f".{file.name}.partial")
            temporary.write_text("".join(map(_line, kept)))
            temporary.replace(file)
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`
        except OSError as error:
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

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._stream = None
        self._warn(f"{self._file} cannot be written any more ({error}); the run goes on without it")


def is_log(file: Path) -> bool:
    """Whether ``file`` begins with a line as `RunLog` writes it."""
    try:
        with open(file, encoding="utf-8") as stream:
            return "iteration" in json.loads(stream.readline(1 << 16))
    except (OSError, ValueError, TypeError):
        return False


def _salvaged(file: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """The lines of a log; if there are others among them, as after a power failure, it is kept under another name."""
    if not file.exists():
        return []
    entries = []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for line in lines:
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    if len(entries) < len(lines):
        damaged = file.with_name(f"damaged-{file.name}")
        file.rename(damaged)
        warn(
            f"{len(lines) - len(entries)} lines of {file} cannot be read; it is {damaged} now, and the others are kept"
        )
    return entries


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line without its end, of a run that was killed, is left out.

    Raises ValueError for a file that is no log.
    """
    try:
        *lines, _ = file.read_text(encoding="utf-8").split("\n")
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is not the log of a run: {error}") from None


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite) + "\n"
