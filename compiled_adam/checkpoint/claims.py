"""Temporary files and folders of processes that live, told from those that killed ones have left.

Who makes one holds a lock on it (``flock``), which the operating system gives back when the process ends, however it
ends. The lock belongs to the file or folder, not to its name: it goes along with a renaming. Whoever wants to move or
remove a folder that others write, too, takes its lock first.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 60.0  # seconds to wait for a lock that others hold while they rename and remove
_LONG_AGO = 86400.0  # seconds after which a leftover is one, where the file system has no locks that would tell


class Descriptor:
    """A file or folder that is open until nothing refers to this any more, wherever Ctrl-C comes; with its lock."""

    number = -1

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def lock(self) -> bool | None:
        """Whether the lock is this one's now; None on a file system that has no locks, or none on folders (NFS)."""
        try:
            fcntl.flock(self.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            return None

    def unlock(self) -> None:
        with suppress(OSError):
            fcntl.flock(self.number, fcntl.LOCK_UN)

    def is_at(self, path: Path) -> bool:
        """Whether a path still means what was opened, and not another of the same name."""
        try:
            return os.path.samestat(os.fstat(self.number), os.stat(path))
        except FileNotFoundError:
            return False


@contextmanager
def claimed(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary that ``make`` creates beside ``path``, and that nobody else takes for a leftover.

    It is removed at the end, if it has its name still. Leftovers of killed processes for the same ``path`` go first.
    Raises OSError, naming the folder, if nothing can be created there.
    """
    # A name may be as long as the file system allows. MLX insists on the suffix of its files.
    name, suffix = _short(path.name), path.suffix if len(path.suffix) < 20 else ""
    for leftover in leftovers(path.parent, re.escape(name)):
        remove_abandoned(leftover)
    temporary, own = path, None
    try:
        while own is None:
            # Nobody else's name: it can be removed whatever happens from here on.
            temporary = path.with_name(f".{name}.{secrets.token_hex(8)}.partial{suffix}")
            try:
                make(temporary)
            except OSError as error:
                message = f"{path.name} cannot be written: {error.strerror}"
                raise type(error)(error.errno, message, str(path.parent)) from None
            own = _own(temporary)
        yield temporary
    finally:
        try:
            if temporary is not path:
                remove(temporary)
        except BaseException:  # Ctrl-C
            remove(temporary)
            raise
        finally:
            if own is not None:
                own.unlock()  # now, because an error keeps its frames, and so descriptors, for as long as it is kept


def leftovers(folder: Path, names: str = r"\d+") -> list[Path]:
    """What looks like temporaries, in a folder, for paths whose name the regular expression matches."""
    pattern = re.compile(rf"\.(?:{names})(?:\.[0-9a-f]{{16}})?\.partial(?:\.[^.]*)?")
    return [folder / name for name in _names(folder) if pattern.fullmatch(name)]


def remove_abandoned(leftover: Path) -> None:
    """Removes a temporary, unless the process that made it is alive."""
    with suppress(OSError):  # it has gone, or belongs to another user
        descriptor = Descriptor(leftover)
        try:
            free = descriptor.lock()
            if free is None:
                free = time.time() - os.fstat(descriptor.number).st_mtime > _LONG_AGO
            if free:
                remove(leftover)
        finally:
            descriptor.unlock()


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Keeps others, who must call this as well, from moving or removing what is at ``path``; False if nothing is.

    Waits until others let go of it. Raises TimeoutError if one does not.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = Descriptor(path)
        except FileNotFoundError:
            yield False
            return
        try:
            free = descriptor.lock()  # None: without locks, two writers at one moment are on their own
            if free is not False and descriptor.is_at(path):
                yield True
                return
        finally:
            descriptor.unlock()
        if time.monotonic() > end:
            raise TimeoutError(
                f"{path} has been in use by another process for more than {PATIENCE:.0f} s; try again later"
            )
        if free is False:
            time.sleep(1e-3)


def remove(path: Path) -> None:
    """Removes a file or a folder as far as it can be; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:150])


def _own(temporary: Path) -> Descriptor | None:
    """A new temporary with its lock; None if somebody took it for a leftover before that."""
    with suppress(FileNotFoundError):
        descriptor = Descriptor(temporary)
        if descriptor.lock() is not False and descriptor.is_at(temporary):
            return descriptor
    return None


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
