"""The report of one or more runs: one HTML file, made from the logs beside the adapters, that needs no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checkpoint import output
from ..finetune.names import CONFIG, LOG, RECORD
from .report_html import page
from .report_run import Run, load

SECONDS = 2  # between two looks of `watch` at the logs, and between two reloads of the page


def write(folders: Sequence[Path], out: Path, live: bool = False) -> list[Run]:
    """Writes the report of the runs in ``folders``, which are compared in the same charts, to the file ``out``.

    With ``live`` the page loads itself again every few seconds. Returns the runs.

    Raises:
        InputError: a folder has no log of a run, or a damaged one, or it has no step yet; ``out`` is something else
            than a file, which is never replaced.
    """
    runs = [load(folder) for folder in folders]
    text = page(runs, refresh=SECONDS if live and not all(run.is_over for run in runs) else None)
    output.write(out, text.encode("utf-8", errors="replace"))  # JSON can have half a pair of surrogates
    return runs


def watch(folders: Sequence[Path], out: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Writes the report again whenever a log has grown, until all runs are over.

    After Ctrl-C, which raises KeyboardInterrupt, the page no longer loads itself again. ``wait`` is called between two
    looks at the logs.

    Raises:
        InputError: as `write`; but a run that has no step yet is waited for.
    """
    runs: list[Run] = []
    seen, told = None, False
    try:
        while True:
            stamps = [_stamp(folder / name) for folder in folders for name in (LOG, RECORD, CONFIG)]
            if stamps != seen and all(_has_steps(folder) for folder in folders):
                if not runs:
                    print(f"{out} shows the runs, and loads itself again; Ctrl-C ends the watch")
                runs, seen = write(folders, out, live=True), stamps
            elif not runs and not told:
                told = True
                print("waiting for the first step")
            # Of a run that is killed no file changes, but its process is gone.
            if runs and all(run.is_over for run in runs):
                break
            wait(SECONDS)
    except KeyboardInterrupt:
        if runs:
            write(folders, out)
        raise
    write(folders, out)


def _has_steps(folder: Path) -> bool:
    try:
        with open(folder / LOG, "rb") as stream:
            return any(b'"loss"' in line and line.endswith(b"\n") for line in stream)
    except OSError:
        return False


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
