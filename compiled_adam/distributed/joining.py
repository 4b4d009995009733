"""The start of several workers: ``mx.distributed.init`` with a time limit and with clear error messages.

MLX waits for the other workers for ever, in C++ and with Python's global lock: no signal handler and no Python thread
can run until it returns. So the time limit works outside Python: a timer of `faulthandler`, which needs no lock, ends
this process, and a small second process prints the reason.
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

from ..base import InputError, is_lost
from . import ring
from .watchdog import PATIENCE
from .workers import Group

_LONGEST = 1e8  # seconds of a timeout, three years; Python's timers accept not much more
# Environment variables that mlx.launch sets for each backend, or mpirun.
LAUNCHERS = ("MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_SIZE")
CHECK = (
    "check that every rank was started exactly once, that each address in the host file belongs to the machine of its"
    " rank, that its port is free, and that the machines reach each other"
)
# The second process. It prints nothing if a byte arrives (all workers have joined), or if the input ends before the
# time is up (this worker has ended by itself).
_SPEAKER = """
import os, select, sys, time
end, sentence = float(sys.argv[1]), sys.argv[2]
ready, _, _ = select.select([0], [], [], max(0.0, end - time.monotonic()))
if not (ready and os.read(0, 1)) and time.monotonic() >= end:
    os.write(2, sentence.encode())
"""
_joined: Group | None = None


def check_timeout(timeout: float) -> None:
    """Raises ValueError unless ``timeout`` is a number of seconds that Python can wait."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= _LONGEST:
        raise InputError(f"worker_timeout (--worker-timeout) is {timeout!r}; it must be a number of seconds above 0")


def join(timeout: float = 60.0) -> Group:
    """The group of all workers that a launcher started, or of this process alone. Later calls return the same group.

    If the others have not joined within ten times ``timeout`` seconds, the process ends with exit code 1 and a message.

    Raises:
        InputError: ``timeout`` is no number above 0, or this worker cannot start: the host file or the rank is invalid,
            the address is in use or belongs to another machine, or other workers refuse the connection.
    """
    global _joined
    check_timeout(timeout)
    if not any(name in os.environ for name in LAUNCHERS):
        return mx.distributed.init()
    if _joined is None:
        _joined = _started(timeout)
    return _joined


def _started(timeout: float) -> Group:
    place = ring.place()
    if place is None:
        own, me = [], f"rank {os.environ.get('MLX_RANK', '?')}"
    else:
        own = place.addresses[place.rank]
        me = f"rank {place.rank} of {len(place.addresses)} ({own[0]})"
    for address in own:
        if ring.in_use(address):  # MLX lets two processes listen at one port, and one would wait for ever
            raise InputError(
                f"{me} cannot start: {address} is in use by another process, maybe a second start of this rank or"
                " an earlier run; end that process, or give the rank another port in the host file"
            )
    try:
        with _limited(min(PATIENCE * timeout, _LONGEST), me):
            group = mx.distributed.init()
    except RuntimeError as error:
        text = str(error)
        if not is_lost(error) and not text.startswith("Can't parse address"):  # an unknown host name
            raise
        if number := re.search(r"error: (\d+)\)", text):  # MLX gives only the number of an error of the system
            text += f", {os.strerror(int(number[1]))}"
        raise InputError(f"{me} cannot start: {text}; {CHECK}") from error
    _check_size(group, place, me)
    return group


def _check_size(group: Group, place: ring.Place | None, me: str) -> None:
    """Raises if the group has not the started size. Without a backend or variable MLX would train each worker alone."""
    wanted = os.environ.get("MLX_WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE"))
    if place is not None:
        wanted = str(len(place.addresses))
    if wanted is None and (group.size() > 1 or os.environ.get("MLX_RANK", "0") == "0"):
        return  # a single worker has rank 0
    if str(group.size()) == wanted:
        return
    raise InputError(
        f"{me} was started as one of {wanted or 'several'} workers, but MLX has found {group.size()}; start"
        " them with mlx.launch and a --backend that this installation of MLX has (`compiled-adam doctor` says which),"
        f" or start a single one without {', '.join(name for name in LAUNCHERS if name in os.environ)}"
    )


@contextmanager
def _limited(seconds: float, me: str) -> Iterator[None]:
    """Ends the process with exit code 1 if the context takes more than ``seconds``, even if Python cannot run."""
    sentence = f"compiled-adam: {me} has waited {seconds:g} s for the other workers; {CHECK}\n"
    end = str(time.monotonic() + seconds)
    # In a new session, so that Ctrl-C goes to the worker only.
    speaker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SPEAKER, end, sentence],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with open(os.devnull, "w") as nowhere:
            # One second later, so that the message is printed before this process ends.
            faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
    finally:
        with suppress(OSError):
            speaker.communicate(b".")
