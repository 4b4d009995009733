"""The numbered checkpoints in a folder: finds the newest undamaged one, and removes older ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..base import InputError
from .checkpoint import check_checkpoint, warn_caller
from .claims import leftovers, remove_abandoned
from .durable import discard, present, remove_old


def latest_checkpoint(folder: str | Path, *, warn: Callable[[str], None] = warn_caller) -> Path:
    """The newest undamaged checkpoint in ``folder``. Checkpoints have numbers as names, and the largest is the newest.

    ``warn`` gets a sentence about each damaged checkpoint. If a process was killed while it replaced a checkpoint, this
    checkpoint may have a hidden name in the folder. This function and `load_checkpoint` find it nevertheless.

    Raises:
        ValueError: the folder has no undamaged checkpoint.
    """
    folder = Path(folder)
    found = numbered(folder)
    while True:
        for path in reversed(found):
            try:
                check_checkpoint(path)
                return path
            except (ValueError, OSError) as error:
                if path in numbered(folder):  # else: another process has removed it, because there is a newer one
                    warn(f"{error}; trying the checkpoint before it")
        if found == (found := numbered(folder)):
            raise InputError(f"there is no {'whole ' if found else ''}checkpoint in {folder}")


def numbered(folder: Path) -> list[Path]:
    """The paths of the checkpoints in a folder, the oldest first. `durable.present` finds the folder of a path."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"(\d+)|\.(\d+)\.old", path.name) for path in folder.iterdir())
    paths = {folder / (name[1] or name[2]) for name in names if name}
    return sorted((path for path in paths if present(path).is_dir()), key=lambda path: (int(path.name), path.name))


def prune(folder: Path, keep: int) -> list[Path]:
    """Removes all but the newest ``keep`` checkpoints; returns the removed paths. The newest must be undamaged.

    It also removes leftovers of killed processes. Several processes may prune at the same time.
    """
    for leftover in leftovers(folder):
        remove_abandoned(leftover)
    while found := numbered(folder):
        try:
            check_checkpoint(found[-1])
            break
        except InputError:
            if found[-1:] == numbered(folder)[-1:]:  # else: another process has removed it: there is a newer one
                raise
    for path in found:
        remove_old(path)
    return [path for path in found[: max(0, len(found) - max(keep, 1))] if discard(path)]
