"""Temporary files and folders, and how to tell those of living processes from leftovers of killed ones.

A process holds a lock (``flock``) on each temporary that it makes. The operating system releases the lock when the
process ends for any reason. The lock belongs to the file or folder, not to the name, so it survives a renaming. Before
a process moves or removes a folder that others also write, it takes the lock of that folder.
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
_LONG_AGO = 86400.0  # seconds after which a temporary counts as a leftover on a file system without locks


class Descriptor:
    """An open file or folder, and the lock on it. It closes with the last reference, also after Ctrl-C at any line."""

    number = -1

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def lock(self) -> bool | None:
        """Tries to take the lock; returns whether it worked. None if the file system cannot lock (NFS: folders)."""
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
        """Whether ``path`` is still the opened file or folder, and not another one of the same name."""
        try:
            return os.path.samestat(os.fstat(self.number), os.stat(path))
        except FileNotFoundError:
            return False


@contextmanager
def claimed(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary that ``make`` creates beside ``path``. Its lock tells other processes that it is no leftover.

    It is removed at the end, unless it was renamed. Leftovers of killed processes for the same ``path`` are removed
    first. Raises OSError if nothing can be created there. The message names the folder.
    """
    # A name may be as long as the file system allows. MLX insists on the suffix of its files.
    name, suffix = os.fsdecode(os.fsencode(path.name)[:150]), path.suffix[:20]
    for leftover in leftovers(path.parent, re.escape(name)):
        remove_abandoned(leftover)
    temporary, own = path, None
    try:
        while own is None:
            # No other process uses this name, so it can be removed after any error from here on.
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
                own.unlock()  # now, because an error object keeps frames alive, and with them this descriptor


def leftovers(folder: Path, names: str = r"\d+") -> list[Path]:
    """The temporaries in a folder for paths whose name matches the regular expression ``names``."""
    pattern = re.compile(rf"\.(?:{names})(?:\.[0-9a-f]{{16}})?\.partial(?:\.[^.]*)?")
    with suppress(FileNotFoundError):
        return [folder / name for name in os.listdir(folder) if pattern.fullmatch(name)]
    return []


def remove_abandoned(leftover: Path) -> None:
    """Removes a temporary, unless the process that made it is alive."""
    with suppress(OSError):  # it is already removed, or belongs to another user
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
    """Holds the lock of the file or folder at ``path``. Yields False if there is none.

    Other processes that call this function cannot move or remove it meanwhile. Raises TimeoutError after a long wait.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = Descriptor(path)
        except FileNotFoundError:
            yield False
            return
        try:
            free = descriptor.lock()  # None: no locks on this file system, so two writers may collide
            if free is not False and descriptor.is_at(path):
                yield True
                return
        finally:
            descriptor.unlock()
        if time.monotonic() > end:
            raise TimeoutError(
                f"{path} has been in use by another process for more than {PATIENCE:.0f} s; try again later"
            )
        time.sleep(1e-3)


def remove(path: Path) -> None:
    """Removes a file or a folder as far as possible. Errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _own(temporary: Path) -> Descriptor | None:
    """A new temporary, locked. None if another process removed it as a leftover before the lock was taken."""
    with suppress(FileNotFoundError):
        descriptor = Descriptor(temporary)
        if descriptor.lock() is not False and descriptor.is_at(temporary):
            return descriptor
    return None
