"""Files and folders that are written atomically (complete or not at all) and survive a power failure."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypedDict

import mlx.core as mx

from ..base import InputError
from .claims import Descriptor, claimed, held, remove


class Record(TypedDict):
    """The size and SHA-256 of a file. A damaged file has others."""

    bytes: int
    sha256: str


def record(file: Path | FileIO, written: threading.Event | None = None) -> Record:
    """The size and SHA-256 of a file (a path or an open file). A file may still grow until ``written`` is set."""
    if isinstance(file, Path):
        with FileIO(file) as stream:
            return record(stream, written)
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    file.seek(0)
    while True:
        complete = written is None or written.is_set()  # read before `readinto` finds the end of the file
        if count := file.readinto(block):
            digest.update(block[:count])
            size += count
        elif complete or os.fstat(file.fileno()).st_nlink == 0:  # the file was removed: no process writes it any more
            return Record(bytes=size, sha256=digest.hexdigest())
        else:
            time.sleep(1e-3)


@contextmanager
def recorded(file: Path, pool: ThreadPoolExecutor) -> Iterator[Future[Record]]:
    """Computes the `record` of a file on another thread while this context writes the file from front to end.

    To compute it afterwards would take as long as the writing itself.
    """
    written = threading.Event()
    try:
        file.touch()
        yield pool.submit(record, file, written)
    finally:
        written.set()


def save_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """``mx.save_safetensors``, flushed to the disk; its errors become an OSError."""
    try:
        mx.save_safetensors(str(file), arrays)
    except RuntimeError as error:
        raise OSError(f"{file} could not be written: {str(error).rstrip('.')}; is the disk full?") from error
    flush(file)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``. At the end it is flushed to disk and replaces ``path``.

    On an error the temporary folder is removed. Several processes may replace the same folder at the same time: each
    folder is complete, and the last one stays.

    Raises:
        ValueError: something other than a folder is in the way.
        OSError: writing failed.
    """
    path = _target(path)
    with claimed(path, Path.mkdir) as temporary:
        with _naming(path, temporary):
            yield temporary
            flush(temporary)
        _put(temporary, path)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Makes errors name ``path`` and not ``temporary``, whose hidden name is gone when a user looks for it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # from `save_arrays`
            raise OSError(str(error).replace(str(temporary), str(path))) from error
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def _target(path: Path) -> Path:
    """The real path to write ``path`` to, with all links followed, so that links stay links. Creates the parent."""
    for each in (path, *path.parents):
        # A link to a disk that is not mounted must not fill the disk of the mount point.
        if each.is_symlink() and not (end := Path(os.path.realpath(each))).parent.is_dir():
            raise InputError(
                f"{each} is a link to {end}, and there is no folder {end.parent}; make it, or mend the link"
            )
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise InputError(f"{path} is a link that leads in a circle; remove it")
    if real.exists() and not real.is_dir():
        raise InputError(f"{real} is not a folder; move it away, or name another folder")
    if os.path.ismount(real):
        raise InputError(f"{real} is where a disk is mounted, and cannot be replaced; name a folder in it")
    real.parent.mkdir(parents=True, exist_ok=True)
    return real


def _put(new: Path, path: Path) -> None:
    """Renames the folder ``new``, which this process has claimed, to ``path``, and replaces the folder there.

    This takes two renamings, because not every system can replace a folder in one. Between the two, and after a kill
    there, the old folder is at `_old`, where readers look next. Only the writer that holds the lock of the folder at
    ``path`` moves it. A writer removes `_old` only while it holds the lock and another folder is at ``path``.
    """
    old, put = _old(path), False
    while not put:
        with held(path) as there:
            if there:
                with held(old):
                    remove(old)
                try:
                    path.rename(old)
                    put = _renamed(new, path)
                    flush(path.parent)
                    _tidy(path, old)
                except BaseException:  # also Ctrl-C at any of these lines
                    _tidy(path, old)
                    raise
                continue
        with held(old) as left:
            if left and not path.exists():
                old.rename(path)  # a replacement was killed between its two renamings
                continue
        put = _renamed(new, path)
        flush(path.parent)


def _tidy(path: Path, old: Path) -> None:
    """Cleans up after a complete or interrupted replacement: one folder stays at ``path``, none at ``old``."""
    if old.exists() and (path.exists() or not _renamed(old, path)):
        remove(old)


def _renamed(new: Path, path: Path) -> bool:
    """Renames ``new`` to ``path``; returns whether it worked. False if another writer has put a folder there."""
    try:
        new.rename(path)
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False


def remove_old(path: Path) -> None:
    """Removes the old folder that a killed replacement has left beside ``path``."""
    with held(_old(path)) as there:
        if there and path.exists():
            remove(_old(path))


def discard(path: Path) -> bool:
    """Removes a folder that `replacing` wrote to ``path``, atomically. False if another process removed it first."""
    old = _old(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # after a kill it counts as a leftover
    with held(path) as there, held(old) as left:
        if there and left:
            remove(old)
        if there or left:
            try:
                (path if there else old).rename(aside)
                aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
            except BaseException:  # Ctrl-C
                remove(aside)
                raise
    return there or left


def present(path: Path) -> Path:
    """The present place of the folder of ``path``. It is `_old` if `replacing` is, or was killed, between renamings."""
    return path if path.exists() else _old(Path(os.path.realpath(path)))


@contextmanager
def opened(path: Path, names: Collection[str]) -> Iterator[tuple[Path, dict[str, FileIO]]]:
    """Yields the place of the folder, and the existing files among ``names``, open for reading.

    All files come from the same folder, and no process changes a folder at ``path``. If `replacing` replaces the folder
    meanwhile and removes files before they are open, this function starts again with the new folder.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: one of the names is not a regular file.
    """
    # An attempt fails only if a replacement ends within this short moment, so one attempt is mostly enough.
    for _ in range(100):
        with ExitStack() as stack:
            found = _opened_once(Path(os.path.realpath(path)), names, stack)
            if found is not None:
                yield found
                return
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _opened_once(path: Path, names: Collection[str], stack: ExitStack) -> tuple[Path, dict[str, FileIO]] | None:
    if path.is_symlink():
        raise FileNotFoundError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    for place in (path, _old(path)):
        with suppress(FileNotFoundError):
            folder = Descriptor(place, os.O_DIRECTORY)
            break
    else:
        return None
    files = {}
    for name in names:
        with suppress(FileNotFoundError):
            files[name] = stack.enter_context(_regular(place / name, folder.number))
    # If the folder was moved, missing files may have been removed. Otherwise they never existed.
    is_there = folder.is_at(place) and (place == path or not path.exists())
    return (place, files) if is_there else None


def _regular(file: Path, folder: int) -> FileIO:
    """Opens a regular file for reading. Raises ValueError for a pipe or device, without reading or waiting."""
    try:
        if stat.S_ISREG(os.stat(file.name, dir_fd=folder).st_mode):
            descriptor = os.open(file.name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
            stream = FileIO(descriptor)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return stream
            stream.close()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise type(error)(error.errno, error.strerror, str(file)) from None
    raise InputError(f"{file} is damaged: it is not a regular file")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # On macOS fsync leaves the data in the drive's cache.
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is None:
            os.fsync(descriptor)
        else:
            try:
                fcntl.fcntl(descriptor, full)
            except OSError:  # the file system does not support F_FULLFSYNC
                os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def replace_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """`save_arrays` that replaces ``file`` atomically: readers see the old or the new file. A link stays a link."""
    file = Path(os.path.realpath(file))
    with claimed(file, partial(Path.touch, exist_ok=False)) as temporary:
        with _naming(file, temporary):
            save_arrays(temporary, arrays)
        temporary.replace(file)
        flush(file.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes. The operating system releases the lock when the process ends.

    Raises OSError if another process holds the lock. The message has the pid of that process.
    """
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OSError(f"process {file.read().strip() or '?'} is already training in {folder}") from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
