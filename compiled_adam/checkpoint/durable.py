"""Files and folders that appear whole or not at all, and stay after a power failure."""

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
    """What tells a file from a damaged one."""

    bytes: int
    sha256: str


def record(file: Path | FileIO, written: threading.Event | None = None) -> Record:
    """The size and SHA-256 of a file, which may be open; of one that is still growing, until ``written`` is set."""
    if isinstance(file, Path):
        with FileIO(file) as stream:
            return record(stream, written)
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    file.seek(0)
    while True:
        complete = written is None or written.is_set()  # asked before the end of the file is met
        if count := file.readinto(block):
            digest.update(block[:count])
            size += count
        elif complete or os.fstat(file.fileno()).st_nlink == 0:  # removed: nobody writes it any more
            return Record(bytes=size, sha256=digest.hexdigest())
        else:
            time.sleep(1e-3)


@contextmanager
def recorded(file: Path, pool: ThreadPoolExecutor) -> Iterator[Future[Record]]:
    """The `record` of a file that is written, from the front to the end, in this context; made at the same time.

    Afterwards it would take as long as the writing itself.
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
    """A temporary folder beside ``path`` that takes its place at the end, flushed to disk; on an error it goes.

    Others may replace the same folder at the same time: each folder is whole, and the last one stays.

    Raises:
        ValueError: something else than a folder is in the way.
        OSError: it could not be written.
    """
    path = _target(path)
    with claimed(path, Path.mkdir) as temporary:
        with _naming(path, temporary):
            yield temporary
            flush(temporary)
        _put(temporary, path)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """An error while ``temporary`` is written names ``path``: the hidden name is gone when a user looks for it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # from `save_arrays`
            raise OSError(str(error).replace(str(temporary), str(path))) from error
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def _target(path: Path) -> Path:
    """Where to write ``path``, whose parent exists then: links stay links, so that is where they lead to."""
    for each in (path, *path.parents):
        # Also: a link to a disk that is not there must not fill this one.
        if each.is_symlink() and not each.exists() and not (end := Path(os.path.realpath(each))).parent.is_dir():
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
    """Renames the folder ``new``, which this process has claimed, to ``path``, in place of what is there.

    In two renamings, because no system replaces a folder in one everywhere. Between them, and after a kill there, what
    was at ``path`` is at `_old`, where readers look next. Of several writers, the one that holds the folder at
    ``path`` moves it; and `_old` is removed only by one that holds it while there is another at ``path``.
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
                except BaseException:  # also Ctrl-C, at any line of these
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
    """After a replacement, or a part of one: one folder at ``path``, none at ``old``."""
    if old.exists() and (path.exists() or not _renamed(old, path)):
        remove(old)


def _renamed(new: Path, path: Path) -> bool:
    """Whether ``new`` is at ``path`` now; not if another writer has put a folder there."""
    try:
        new.rename(path)
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False


def remove_old(path: Path) -> None:
    """Removes what a replacement that was killed at its end has left beside ``path``."""
    if _old(path).exists():
        with held(_old(path)):
            if path.exists():
                remove(_old(path))


def discard(path: Path) -> bool:
    """Removes what `replacing` wrote to ``path``, which is never there by half; False if another was quicker."""
    old = _old(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # after a kill, a leftover like others
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
    """Where what `replacing` wrote to ``path`` is: a writer may be, or have been killed, between two renamings."""
    old = _old(Path(os.path.realpath(path)))
    return old if not path.exists() and old.exists() else path


@contextmanager
def opened(path: Path, names: Collection[str]) -> Iterator[tuple[Path, dict[str, FileIO]]]:
    """Those files of a folder that are among ``names``, open for reading, and where the folder was found.

    All belong together: they are opened in one and the same folder, which nobody changes while it has its name. If
    `replacing` gives the name to another meanwhile, and removes files before they are open, this begins again.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: one of the names is not that of a regular file.
    """
    # Each attempt fails only if a replacement ends within the moment that it takes, so that one is enough as a rule.
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
    place = path
    try:
        folder = Descriptor(path, os.O_DIRECTORY)
    except FileNotFoundError:
        place = _old(path)
        try:
            folder = Descriptor(place, os.O_DIRECTORY)
        except FileNotFoundError:
            return None
    files = {}
    for name in names:
        with suppress(FileNotFoundError):
            files[name] = stack.enter_context(_regular(place / name, folder.number))
    # What is missing was removed if the folder has lost its place; otherwise it never was there.
    complete = len(files) == len(names) or (folder.is_at(place) and (place == path or not path.exists()))
    return (place, files) if complete else None


def _regular(file: Path, folder: int) -> FileIO:
    """A regular file opened for reading; of anything else (a pipe, a device) nothing is read, nor is it waited for."""
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
            except OSError:  # a file system that has no such thing
                os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def replace_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """`save_arrays` to a file that readers see old or new, never in between; a link to one stays a link."""
    file = Path(os.path.realpath(file))
    with claimed(file, partial(Path.touch, exist_ok=False)) as temporary:
        with _naming(file, temporary):
            save_arrays(temporary, arrays)
        temporary.replace(file)
        flush(file.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; the lock is the operating system's and goes when the process does.

    Raises OSError with the pid of the process that has it.
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
