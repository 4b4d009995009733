"""The log of a run: a line of JSON for every step and every validation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LOG = "log.jsonl"  # its name beside the adapters


class RunLog:
    """Appends to ``file``, whose lines after iteration ``keep`` are dropped first: they are about to happen again.

    Lines of a step have ``iteration``, ``loss``, ``tokens``, ``grad_norm``, ``learning_rate``, ``skipped`` (updates
    skipped so far), ``traces``, ``seconds`` and ``memory`` (peak, bytes); of a validation ``iteration`` (before which
    it was made), ``val_loss`` and ``seconds``. What is infinite or not a number is null, as JSON has no other word.
    """

    def __init__(self, file: Path, keep: int) -> None:
        kept = [line for line in read(file) if line.get("iteration", 0) <= keep] if keep and file.exists() else []
        # Written anew rather than cut: the last line of a run that was killed may be half a line.
        temporary = file.with_name(f".{file.name}.partial")
        temporary.write_text("".join(map(_line, kept)))
        temporary.replace(file)
        self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`

    def write(self, entry: dict[str, Any]) -> None:
        self._stream.write(_line(entry))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line without its end, of a run that was killed, is left out.

    Raises ValueError for a file that is no log.
    """
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    try:
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not the log of a run: {error}") from None


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite) + "\n"
