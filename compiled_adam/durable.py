"""Files and folders that appear whole or not at all, and stay after a power failure."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import mlx.core as mx


class Record(TypedDict):
    """What tells a file from a damaged one."""

    bytes: int
    sha256: str


def record(file: Path, written: threading.Event | None = None) -> Record:
    """The size and SHA-256 of a file; of one that is still growing, until ``written`` is set."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with open(file, "rb", buffering=0) as stream:
        while True:
            complete = written is None or written.is_set()  # asked before the end of the file is met
            if count := stream.readinto(block):
                digest.update(block[:count])
                size += count
            elif complete:
                return Record(bytes=size, sha256=digest.hexdigest())
            else:
                time.sleep(1e-3)


@contextmanager
def recorded(file: Path, pool: ThreadPoolExecutor) -> Iterator[Future[Record]]:
    """The `record` of a file that is written, from the front to the end, in this context; made at the same time.

    Afterwards it would take as long as the writing itself.
    """
    written = threading.Event()
    file.touch()
    future = pool.submit(record, file, written)
    try:
        yield future
    finally:
        written.set()


def save_arrays(file: Path, arrays: dict[str, mx.array]) -> None:
    """``mx.save_safetensors``, flushed to the disk; its errors become an OSError."""
    try:
        mx.save_safetensors(str(file), arrays)
    except RuntimeError as error:
        raise OSError(f"{file} could not be written: {error}") from error
    flush(file)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place at the end, flushed to disk; on an error it goes."""
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and _old(path).exists():
        _old(path).rename(path)  # a replacement was killed between its two renamings
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        yield temporary
        flush(temporary)
        if path.exists():
            shutil.rmtree(_old(path), ignore_errors=True)
            path.rename(_old(path))
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists() and _old(path).exists():
            _old(path).rename(path)
        raise
    flush(path.parent)
    shutil.rmtree(_old(path), ignore_errors=True)


def present(path: Path) -> Path:
    """Where to read what `replacing` wrote to ``path``: a writer may be, or have been killed, between two renamings."""
    return _old(path) if not path.exists() and _old(path).exists() else path


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
    """`save_arrays` to a file that readers see old or new, never in between."""
    temporary = file.with_name(f".{file.stem}.partial{file.suffix}")  # MLX insists on the suffix
    try:
        save_arrays(temporary, arrays)
        temporary.replace(file)
        flush(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
