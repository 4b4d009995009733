"""Writes a result to a file that a user names, atomically (complete or not at all). It replaces regular files only."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

from ..base import InputError
from .claims import claimed

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_STREAMS = (1, 2)  # of this process: standard output and errors


def write(path: Path, content: bytes) -> None:
    """Writes ``content`` to a new file, or replaces an old file and keeps the permissions. Links are followed.

    Raises:
        InputError: ``path`` is a folder, a pipe, a device, a link in a circle or this program's own output, or the
            folder for the file is missing.
        OSError: writing failed. An old file is unchanged then.
    """
    target = Path(os.path.realpath(path))  # a link stays a link, to another file
    mode = _mode(path, target)
    try:
        with claimed(target, partial(Path.touch, exist_ok=False)) as temporary, open(temporary, "wb") as stream:
            if mode is not None:
                os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # on some file systems only this finds the disk full
            temporary.replace(target)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{path} could not be written: {reason}; nothing of it was changed") from error


def _mode(path: Path, target: Path) -> int | None:
    """The permissions of the file that will be replaced. None if there is no such file."""
    advice = "name a file, new or old"
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise InputError(f"{path} cannot be written: {target.parent} is no folder; make it first") from None
        return None
    except OSError as error:  # links in a circle, a file where a folder should be, a name that is too long
        raise InputError(f"{path} cannot be written: {error.strerror}; {advice}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}; {advice}")
    if any(_is(stream, found) for stream in _STREAMS):
        raise InputError(f"{path} is where this command's own messages go; {advice}")
    if not os.access(target, os.W_OK):
        raise InputError(f"{path} is read-only; {advice}")
    return stat.S_IMODE(found.st_mode)


def _is(descriptor: int, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), found)
    except OSError:  # it is closed
        return False
