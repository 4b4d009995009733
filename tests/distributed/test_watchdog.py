"""What notices that other workers are gone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from compiled_adam import losses
from compiled_adam.distributed import ring, watchdog, workers

from tests.tiny_runs import train


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("unread", [False, True])  # data that was not read makes a reset of the end
def test_a_closed_connection_is_seen(side: str, unread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ring.Connections().is_cut()
    with socket.create_server(("127.0.0.1", 0)) as server:
        hosts = tmp_path / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{server.getsockname()[1]}"], ["127.0.0.1:1"]]))
        monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
        monkeypatch.setenv("MLX_RANK", "0")
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
    for seconds in (41.0, 44.0, 47.0):
        now = seconds
        dog.beat()
    assert dog.limit() == 15.0
    with dog.patient():
        assert dog.limit() == 100.0
        now = 50.0
    dog.beat()
    assert dog.limit() == 15.0


@pytest.mark.parametrize("cut", [False, True])
def test_when_it_ends_the_process(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    monkeypatch.setattr(ring.Connections, "is_cut", lambda self: cut)
    dog = watchdog.Watchdog(60.0, lambda: "nothing was saved")
    dog._connections = ring.Connections()  # without its thread, which would act on what is asked here
    with dog.busy():
        now = 1e6
        assert dog.why_end() is None
    assert dog.why_end() is None
    dog.beat()
    # MLX has some seconds to say itself that a connection is closed.
    now += watchdog.GRACE
    assert dog.why_end() is None
    now += 1.0
    assert dog.why_end() == ("another worker has ended (its connection is closed)" if cut else None)
    now += 60.0
    assert dog.why_end() == "no answer from the other workers for 76 s"
    dog.beat()
    assert dog.why_end() is None
    monkeypatch.setattr(ring.Connections, "is_cut", lambda self: False)
    now += 50.0  # what was before and in a context does not count in it or after it
    with dog.patient():
        now += 590.0
        assert dog.why_end() is None
    assert dog.why_end() is None


def test_time_in_which_it_stood_still_itself_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-Z, which stops all workers of a machine."""
    now, ended = 7.0, []
    looks = iter([1.0, 1.0, 300.0, *[1.0] * 100])

    def wait(seconds: float) -> bool:
        nonlocal now
        now += next(looks)
        return bool(ended)

    def end(why: str) -> None:
        ended.append((now, why))

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    dog = watchdog.Watchdog(60.0, lambda: "nothing was saved")
    dog.beat()
    dog._connections = ring.Connections()
    monkeypatch.setattr(dog._ended, "wait", wait)
    monkeypatch.setattr(dog, "_end", end)
    dog._watch()
    assert ended == [(368.0, "no answer from the other workers for 61 s")]


def test_the_first_step_may_take_ten_times_as_long(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """It compiles kernels, also at the other workers. A validation before it has told that they are alive."""
    dogs, limits = [], []

    class Dog(watchdog.Watchdog):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            dogs.append(self)

    def loss(model, tokens, lengths):
        limits.append((model.training, dogs[-1].limit()))
        return losses.next_token(model, tokens, lengths)

    monkeypatch.setattr(workers, "Watchdog", Dog)
    train(tiny_model, tmp_path, val=True, loss=loss, iters=1, val_batches=2)
    assert limits == [(False, 60.0), (False, 60.0), (True, 600.0)]


def test_it_ends_the_process(run: Callable) -> None:
    program = """
import threading
from compiled_adam.distributed import watchdog
watchdog.Watchdog.why_end = lambda self: "another worker has ended"
with watchdog.Watchdog(0.1, lambda: "the checkpoint is there"):
    threading.Event().wait()
"""
    ended = run("-c", program)
    assert ended.returncode == 1
    assert ended.stderr == "compiled-adam: another worker has ended; the checkpoint is there\n"


def test_nothing_of_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[ring.Connections] = []
    monkeypatch.setattr(ring.Connections, "close", lambda self: closed.append(self))
    dog = watchdog.Watchdog(60.0, lambda: "nothing was saved")
    dog._last -= 1e6  # what was before the context does not count
    with dog:
        assert dog._thread.is_alive() and dog.why_end() is None
    assert closed == [dog._connections] and not dog._thread.is_alive()
