"""The record of a run, beside its log: where and when it ran, how it ended, and samples of the model's answers."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base import InputError, packages
from ..checkpoint import output

# What a record has. A session is one process; a resumed run has several.
_FORM = {
    "sessions": [
        {"iteration": int, "started": str, "ended": str, "because": str, "machine": str, "host": str, "pid": int}
        | {"workers": int, "versions": dict}
    ],
    "samples": [{"iteration": int, "answers": [{"prompt": str, "expected": str, "answer": str}]}],
}


class Record:
    """Writes the record of a run that begins after ``iteration``; as a context it notes how the run ends.

    A resumed run adds a session, and drops samples of later iterations. ``because`` says why a run ended without an
    error. Without a ``file``, nothing is written. A record must not end a run: if it cannot be written, ``warn`` gets a
    sentence, once.
    """

    because = ""

    def __init__(self, file: Path | None, iteration: int, workers: int, warn: Callable[[str], None]) -> None:
        self._file, self._warn = file, warn
        kept: dict[str, Any] = {"sessions": [], "samples": []}
        try:
            kept = read(file) if file is not None and iteration else kept
        except (InputError, OSError) as error:
            warn(f"{error}; a new one is begun")
        self.samples = [each for each in kept["samples"] if each["iteration"] <= iteration]
        self._session: dict[str, Any] = {
            "iteration": iteration,
            "started": _now(),
            "ended": "",
            "because": "",
            "machine": _machine(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "workers": workers,
            "versions": packages(),
        }
        self._sessions = [*kept["sessions"], self._session]
        self._write()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        reason = "stopped by a signal" if isinstance(error, SystemExit) else str(error) or repr(error)
        self._session |= {"ended": _now(), "because": self.because if error is None else reason}
        self._write()

    def add(self, iteration: int, answers: Sequence[dict[str, str]]) -> None:
        """Adds samples of the model after ``iteration``."""
        self.samples.append({"iteration": iteration, "answers": list(answers)})
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            text = json.dumps({"sessions": self._sessions, "samples": self.samples}, indent=1)
            output.write(self._file, text.encode())
        except (OSError, InputError) as error:
            self._warn(f"{self._file} cannot be written any more ({error}); the run goes on without it")
            self._file = None


def read(file: Path) -> dict[str, Any]:
    """The sessions and samples of a run; none if there is no such file. Raises InputError for something else."""
    if not file.exists():
        return {"sessions": [], "samples": []}
    remedy = "remove it: the report then shows neither the machine nor samples"
    if not file.is_file():  # a pipe would be waited for
        raise InputError(f"{file} is no file; {remedy}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); {remedy}") from None
    if not _fits(found, _FORM):
        raise InputError(f"{file} is not the record of a run; {remedy}")
    return dict(found)


def is_alive(session: dict[str, Any]) -> bool:
    """Whether the process of a session may still be training: always true on other machines."""
    if session["ended"]:
        return False
    if session["host"] != socket.gethostname():
        return True
    try:
        os.kill(session["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, dict):
        return isinstance(value, dict) and all(name in value and _fits(value[name], form[name]) for name in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(each, form[0]) for each in value)
    return type(value) is form


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _machine() -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = "CPU" if mx.default_device().type == mx.DeviceType.cpu else "GPU"
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{mx.device_info()['device_name']}, {device}, {cores} cores, {memory:.1f} GB; {system}"
