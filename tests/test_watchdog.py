"""What notices that other workers are gone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from compiled_adam import ring, watchdog


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("unread", [False, True])  # data that was not read makes a reset of the end
def test_a_closed_connection_is_seen(side: str, unread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ring.Connections().is_cut()
    with socket.create_server(("127.0.0.1", 0)) as server:
        hosts = tmp_path / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{server.getsockname()[1]}"], ["127.0.0.1:1"]]))
        monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
        assert not ring.Connections().is_cut()
        sockets = {"right": socket.create_connection(server.getsockname()), "left": server.accept()[0]}
        seen = ring.Connections()
        gone, other = sockets.pop(side), next(iter(sockets.values()))
        if unread:
            other.sendall(b"x")
        assert not seen.is_cut()
        # Both ends are in this process, and so are their copies: what closes the connection is the end of the last.
        gone.shutdown(socket.SHUT_RDWR)
        gone.close()
        assert seen.is_cut()
        seen.close()
        other.close()


def test_how_long_a_watchdog_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    dog = watchdog.Watchdog(10.0, lambda: "nothing was saved")
    assert dog.limit() == 100.0  # until something was finished
    for seconds in (1.0, 4.0, 7.0):
        now = seconds
        dog.beat()
    assert dog.limit() == 15.0
    with dog.patient():
        assert dog.limit() == 100.0
        now = 50.0
    dog.beat()
    assert dog.limit() == 15.0


@pytest.mark.parametrize(
    ("cut", "message"), [(False, "no answer from the other workers for 1"), (True, "another worker has ended")]
)
def test_it_ends_the_process(cut: bool, message: str, run: Callable) -> None:
    program = f"""
import time
from compiled_adam import ring, watchdog
watchdog.GRACE = 0.1
ring.Connections.is_cut = lambda self: {cut}
with watchdog.Watchdog(1.0, lambda: "the checkpoint is there") as dog:
    with dog.busy():
        time.sleep(1.5)
    dog.beat()
    time.sleep(30)
"""
    ended = run("-c", program)
    assert ended.returncode == 1
    assert message in ended.stderr and "the checkpoint is there" in ended.stderr
