"""The start of several workers: ``mx.distributed.init`` with a limit, and with a sentence for what can go wrong.

MLX waits for the other workers without end, and in C++ with Python's lock in its hands: neither a signal handler nor a
thread of Python can run until it returns. So the clock is outside: one of `faulthandler`, which needs no lock, ends
this process, and a small process beside it says why.
"""

from __future__ import annotations

import faulthandler
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from ..base import InputError
from . import ring
from .watchdog import PATIENCE
from .workers import Group, is_lost

_LONGEST = 1e8  # seconds of a timeout, three years; beyond some centuries Python cannot wait
# Set by mlx.launch for each of its backends, and by mpirun.
LAUNCHERS = ("MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_SIZE")
CHECK = (
    "check that every rank was started exactly once, that each address in the host file belongs to the machine of its"
    " rank, that its port is free, and that the machines reach each other"
)
# The other process: silent if its input has a byte (all are there) or ends too soon (the worker ended by itself).
_SPEAKER = """
import os, select, sys, time
end, sentence = float(sys.argv[1]), sys.argv[2]
ready, _, _ = select.select([0], [], [], max(0.0, end - time.monotonic()))
if not (ready and os.read(0, 1)) and time.monotonic() >= end:
    os.write(2, sentence.encode())
"""
LONGEST = 1e8  # seconds; no clock here takes much more
_joined: Group | None = None


def check_timeout(timeout: float) -> None:
    """Raises ValueError unless ``timeout`` is a number of seconds that Python can wait."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= _LONGEST:
        raise InputError(f"worker_timeout (--worker-timeout) is {timeout!r}; it must be a number of seconds above 0")


def join(timeout: float = 60.0) -> Group:
    """The group of all workers that a launcher started, or of this process alone; later calls return the same group.

    If the others are not there within ten times ``timeout`` seconds, the process ends with exit code 1 and a message.

    Raises:
        InputError: ``timeout`` is no number above 0, or this worker cannot start: a host file or a rank that is not
            one, an address that is not this machine's or in use, others that refuse.
    """
    global _joined
    check_timeout(timeout)
    if not any(name in os.environ for name in LAUNCHERS):
        return mx.distributed.init()
    if _joined is None:
        place = ring.place()
        me = _name(place)
        if place is not None:
            _check_free(place, me)
        try:
            with _limited(min(PATIENCE * timeout, LONGEST), me):
                group = mx.distributed.init()
        except RuntimeError as error:
            if not _is_known(error):
                raise
            raise InputError(f"{me} cannot start: {_with_reason(str(error))}; {CHECK}") from error
        _check_size(group, place)
        _joined = group
    return _joined


def _name(place: ring.Place | None) -> str:
    if place is None:
        return f"rank {os.environ.get('MLX_RANK', '?')}"
    return f"rank {place.rank} of {place.size} ({place.own[0]})"


def _check_free(place: ring.Place, me: str) -> None:
    """Two processes of one rank can listen at one port, as MLX opens it, and then one of them waits for ever."""
    for address in place.own:
        if ring.in_use(address):
            raise InputError(
                f"{me} cannot start: {address} is in use by another process, maybe one of the same rank or of a run"
                " before; end that one, or give the rank another port in the host file"
            )


def _is_known(error: RuntimeError) -> bool:
    return is_lost(error) or str(error).startswith("Can't parse address")  # a name that nobody knows


def _with_reason(text: str) -> str:
    """MLX gives the number of an error of the system; its name says more."""
    number = re.search(r"error: (\d+)\)", text)
    return f"{text}, {os.strerror(int(number[1]))}" if number else text


def _check_size(group: Group, place: ring.Place | None) -> None:
    """Where MLX has no such backend, or lacks a variable, each worker would train alone, into one folder."""
    told = [os.environ[name] for name in ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE") if name in os.environ]
    wanted = str(place.size) if place is not None else told[0] if told else None
    if wanted is None and (group.size() > 1 or os.environ.get("MLX_RANK", "0") == "0"):
        return  # a launcher gives rank 0 to one that is alone
    if str(group.size()) == wanted:
        return
    raise InputError(
        f"{_name(place)} was started as one of {wanted or 'several'} workers, but MLX has found {group.size()}; start"
        " them with mlx.launch and a --backend that this installation of MLX has (`compiled-adam doctor` says which),"
        f" or start a single one without {', '.join(name for name in LAUNCHERS if name in os.environ)}"
    )


@contextmanager
def _limited(seconds: float, me: str) -> Iterator[None]:
    """A time in which nothing of Python can run; after so many ``seconds`` the process ends with exit code 1."""
    sentence = f"compiled-adam: {me} has waited {seconds:g} s for the other workers; {CHECK}\n"
    end = str(time.monotonic() + seconds)
    # In a session of its own: Ctrl-C is for the worker.
    speaker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SPEAKER, end, sentence],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with open(os.devnull, "w") as nowhere:
            # A second later, so that the sentence is there when the process ends.
            faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
    finally:
        with suppress(OSError):
            speaker.communicate(b".")
