"""Whether a connection of MLX's ring backend was closed at the other end, which MLX itself may not say.

The thread that serves a connection ends at the first failure. Whoever waits then gets an error, but what is sent or
awaited later waits for ever. The connections are found by the ports of the host file, and only looked at.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


class Connections:
    """The connections to the neighbours; none with other backends."""

    def __init__(self) -> None:
        # Found now, since one that was reset no longer has an address. Copies of the descriptors: MLX has its own.
        self._open = list(_connections(_ports()))

    def is_cut(self) -> bool:
        """Whether a neighbour has closed one."""
        return any(_is_closed(each) for each in self._open)

    def close(self) -> None:
        for each in self._open:
            each.close()


def _ports() -> set[int]:
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return {int(address.rsplit(":", 1)[1]) for host in hosts for address in host}
    except (KeyError, OSError, ValueError, AttributeError, IndexError, TypeError):
        return set()


def _connections(ports: set[int]) -> Iterator[socket.socket]:
    for name in os.listdir("/dev/fd") if ports else []:
        with suppress(OSError, ValueError):  # one that was closed since
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
            is_tcp = connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6)
            # To the right neighbour the port is its own, from the left one it is ours.
            if is_tcp and _addresses(connection) & ports:
                yield connection
            else:
                connection.close()


def _addresses(connection: socket.socket) -> set[int]:
    try:
        return {connection.getpeername()[1], connection.getsockname()[1]}
    except OSError:  # it listens
        return set()


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
