"""Whether a connection of MLX's ring backend was closed at the other end, which MLX itself may not say.

The thread that serves a connection ends at the first failure. Whoever waits then gets an error, but what is sent or
awaited later waits for ever. The connections are found by the ports of the host file, and only looked at.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def is_cut() -> bool:
    """Whether a neighbour has closed a connection; False with other backends."""
    ports = _ports()
    return bool(ports) and any(_is_closed(each) for each in _connections(ports))


def _ports() -> set[int]:
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return {int(address.rsplit(":", 1)[1]) for host in hosts for address in host}
    except (KeyError, OSError, ValueError, AttributeError, IndexError, TypeError):
        return set()


def _connections(ports: set[int]) -> Iterator[socket.socket]:
    for name in os.listdir("/dev/fd"):
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(int(name))) as connection:
            is_tcp = connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6)
            # To the right neighbour the port is its own, from the left one it is ours.
            if is_tcp and {connection.getpeername()[1], connection.getsockname()[1]} & ports:
                yield connection


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
