"""The checkpoints of a folder: the newest that is whole, and the removal of older ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from ..base import InputError
from .checkpoint import check_checkpoint
from .claims import leftovers, remove_abandoned
from .durable import discard, present, remove_old


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def latest_checkpoint(folder: str | Path, *, warn: Callable[[str], None] = _warn) -> Path:
    """The newest checkpoint in ``folder`` that is not damaged. Names of checkpoints are numbers.

    ``warn`` gets a sentence about each damaged checkpoint. If a process was killed while it replaced a checkpoint, that
    checkpoint may be under another name in the folder. It is found as well, here and by `load_checkpoint`.

    Raises:
        ValueError: the folder has no checkpoint that is not damaged.
    """
    folder = Path(folder)
    found = numbered(folder)
    while True:
        for path in reversed(found):
            try:
                check_checkpoint(path)
                return path
            except (ValueError, OSError) as error:
                if path in numbered(folder):  # else: another process has pruned it, because there is a newer one
                    warn(f"{error}; trying the checkpoint before it")
        if found == (found := numbered(folder)):
            raise InputError(f"there is no {'whole ' if found else ''}checkpoint in {folder}")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first; where each is found, `durable.present` says."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"(\d+)|\.(\d+)\.old", path.name) for path in folder.iterdir())
    paths = {folder / (name[1] or name[2]) for name in names if name}
    return sorted((path for path in paths if present(path).is_dir()), key=lambda path: (int(path.name), path.name))


def prune(folder: Path, keep: int) -> list[Path]:
    """Removes all but the newest ``keep`` checkpoints, once the newest is known to be whole; returns what went.

    Also what killed processes have left of checkpoints that they wrote or removed. Others may prune at the same time.
    """
    for leftover in leftovers(folder):
        remove_abandoned(leftover)
    while found := numbered(folder):
        try:
            check_checkpoint(found[-1])
            break
        except InputError:
            if found[-1:] == numbered(folder)[-1:]:  # else: another process has pruned it, because there is a newer one
                raise
    for path in found:
        remove_old(path)
    return [path for path in found[: max(0, len(found) - max(keep, 1))] if discard(path)]
