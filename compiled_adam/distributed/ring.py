"""Checks that MLX's ring backend lacks: errors in the host file, and closed connections.

MLX's thread for a connection ends at the first failure. A communication that waits at this moment raises an error, but
every later one waits for ever. This file finds the connections by the ports of the host file, and reads no data.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..base import InputError


class Place(NamedTuple):
    """The place of a worker in the ring: the rank, and the addresses of all workers by rank."""

    rank: int
    addresses: list[list[str]]


def place() -> Place | None:
    """The place according to ``MLX_HOSTFILE`` and ``MLX_RANK``. None for other backends, which have no host file.

    Raises InputError for values that MLX would misread, crash at, or wait for ever with.
    """
    name, rank = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK")
    if name is None:
        return None
    if rank is None:
        raise InputError("MLX_HOSTFILE is set, but MLX_RANK is not; start the workers with mlx.launch, or set both")
    addresses = _read(Path(name))
    if not re.fullmatch("[0-9]{1,9}", rank) or int(rank) >= len(addresses):
        last = len(addresses) - 1
        raise InputError(f"MLX_RANK is {rank!r}; with the {last + 1} hosts of {name} it must be from 0 to {last}")
    return Place(int(rank), addresses)


def _read(file: Path) -> list[list[str]]:
    said = f"MLX_HOSTFILE is {str(file)!r}"
    form = 'a list with the addresses of each rank, such as [["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
    alone = "start a single worker without mlx.launch and without MLX_HOSTFILE"
    try:
        content = file.read_bytes() if file.is_file() else None
        hosts = json.loads(content) if content and content.strip() else None
    except OSError as error:
        raise InputError(f"{said}, which cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{said}, which is not JSON ({error}); it must be {form}") from None
    if content is None:
        raise InputError(f"{said}, which is no file; it must name one that has {form}")
    if hosts is None:  # mlx.launch -n 1 makes an empty file
        raise InputError(f"{said}, which is empty; {alone}")
    hosts = [[host] if isinstance(host, str) else host for host in hosts] if isinstance(hosts, list) else []
    if not hosts or not all(isinstance(host, list) and host and all(map(_is_address, host)) for host in hosts):
        raise InputError(f"{said}, which is not {form} (mlx.launch makes it of --hostfile)")
    if len(hosts) == 1:
        raise InputError(f"{said}, with one host; {alone}")
    if len({len(host) for host in hosts}) > 1:
        raise InputError(f"{said}; every rank in it must have equally many addresses")
    owners: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        for address in host:
            if address in owners:
                ranks = f"of rank {owners[address]} and of rank {rank}"
                raise InputError(f"{said}, where {address} is {ranks}; give each a port of its own")
            owners[address] = rank
    return hosts


def _is_address(value: object) -> bool:
    host, _, port = value.partition(":") if isinstance(value, str) else ("", "", "")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16


def in_use(address: str) -> bool:
    """Whether another process listens at an address of this machine."""
    host, _, port = address.partition(":")
    with socket.socket() as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections of an ended run don't count
        try:
            test.bind((host, int(port)))
        except OSError as error:
            return error.errno == errno.EADDRINUSE  # MLX will report other errors
        except UnicodeError:  # an invalid host name
            return False
    return False


class Connections:
    """The connections to the neighbours in the ring. Empty with other backends."""

    def __init__(self) -> None:
        # They are found now, because a reset connection has no address. The descriptors are copies of MLX's.
        self._open = list(_connections())

    def is_cut(self) -> bool:
        """Whether a neighbour has closed a connection."""
        return any(_is_closed(each) for each in self._open)

    def close(self) -> None:
        for each in self._open:
            each.close()


def _connections() -> Iterator[socket.socket]:
    try:
        here = place()
    except InputError:  # the host file was removed after the start
        here = None
    if here is None:
        return
    ports = {int(address.rpartition(":")[2]) for host in here.addresses for address in host}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError, ValueError):  # the descriptor was closed in the meantime
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
            is_tcp = connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6)
            # The port belongs to the right neighbour on the connection to it, to this worker on the other one.
            if is_tcp and _addresses(connection) & ports:
                yield connection
            else:
                connection.close()


def _addresses(connection: socket.socket) -> set[int]:
    try:
        return {connection.getpeername()[1], connection.getsockname()[1]}
    except OSError:  # a listening socket has no peer
        return set()


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
