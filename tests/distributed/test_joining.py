"""Workers that cannot start, and those that wait for them."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.distributed import joining, ring

from tests import launch

HERE = "127.0.0.1:5000"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*joining.LAUNCHERS, "MLX_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joining, "_joined", None)


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, hosts: object, rank: str = "0") -> Path:
    """The environment of a worker."""
    file = folder / "hosts.json"
    file.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    monkeypatch.setenv("MLX_RANK", rank)
    return file


def test_one_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(joining.faulthandler, "dump_traceback_later", lambda *_, **__: pytest.fail("a clock runs"))
    assert joining.join(1.0).size() == 1


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none(timeout: float) -> None:
    with pytest.raises(InputError, match=r"worker_timeout .*is .*; it must be a number of seconds above 0"):
        joining.join(timeout)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("", "which is empty; start a single worker without mlx.launch"),
        ("null", "which is empty"),
        ("{", "which is not JSON"),
        ("[" * 100_000, "which is not JSON"),
        ("\ufffe", "which is not JSON"),
        ([[HERE]], "with one host; start a single worker without mlx.launch"),
        ([], "is not a list with the addresses of each rank, such as"),
        ({"hosts": [[HERE]]}, "is not a list with the addresses"),
        ([{"ssh": "a", "ips": ["127.0.0.1"]}] * 2, "mlx.launch makes it of --hostfile"),
        ([[], []], "is not a list with the addresses"),
        ([[5000], [5001]], "is not a list with the addresses"),
        ([["127.0.0.1"], [HERE]], "is not a list with the addresses"),
        ([["127.0.0.1:65536"], [HERE]], "is not a list with the addresses"),
        ([["127.0.0.1:http"], [HERE]], "is not a list with the addresses"),
        ([[HERE, "127.0.0.1:5001"], ["127.0.0.1:5002"]], "must have equally many addresses"),
        ([[HERE], ["127.0.0.1:5001"], [HERE]], f"where {HERE} is of rank 0 and of rank 2; give each a port of its own"),
    ],
)
def test_host_files_that_are_none(hosts: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = start(monkeypatch, tmp_path, hosts)
    with pytest.raises(InputError) as raised:
        joining.join(1.0)
    assert str(raised.value).startswith(f"MLX_HOSTFILE is {str(file)!r}")
    assert message in str(raised.value)


@pytest.mark.parametrize("rank", ["2", "-1", "one", "", "1e0", "9" * 5000])
def test_ranks_that_are_none(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, tmp_path, [[HERE], ["127.0.0.1:5001"]], rank)
    with pytest.raises(InputError, match=r"MLX_RANK is '.*'; with the 2 hosts of .* it must be from 0 to 1"):
        joining.join(1.0)


def test_half_of_what_a_launcher_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, tmp_path, [[HERE], ["127.0.0.1:5001"]])
    monkeypatch.delenv("MLX_RANK")
    with pytest.raises(InputError, match="MLX_HOSTFILE is set, but MLX_RANK is not"):
        joining.join(1.0)
    for missing in (tmp_path, tmp_path / "none"):
        monkeypatch.setenv("MLX_HOSTFILE", str(missing))
        monkeypatch.setenv("MLX_RANK", "0")
        with pytest.raises(InputError, match="which is no file"):
            joining.join(1.0)
    # Without a host file MLX would make each worker a group of its own, all in one folder.
    monkeypatch.delenv("MLX_HOSTFILE")
    assert joining.join(1.0).size() == 1  # mlx.launch gives rank 0 to one that is alone
    monkeypatch.setattr(joining, "_joined", None)
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(InputError, match="rank 1 was started as one of several workers, but MLX has found 1"):
        joining.join(1.0)
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="rank 0 was started as one of 3 workers, but MLX has found 1"):
        joining.join(1.0)


@pytest.mark.parametrize("shared", [False, True])  # as MLX opens a port: a second one of the same rank may have it too
def test_a_port_in_use(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        if shared:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        start(monkeypatch, tmp_path, [[address], ["127.0.0.1:1"]])
        with pytest.raises(InputError) as raised:
            joining.join(1.0)
    assert f"rank 0 of 2 ({address}) cannot start: {address} is in use by another process" in str(raised.value)
    assert not ring.in_use(address)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nobody.invalid:5000", "Can't parse address nobody.invalid:5000"),
        ("192.0.2.1:5000", "Couldn't bind socket (error: 99), Cannot assign requested address"),  # of documentation
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the numbers of errors are each system's own")
def test_what_mlx_says_becomes_a_sentence(
    address: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, tmp_path, [[address], [HERE]])
    with pytest.raises(InputError) as raised:
        joining.join(10.0)
    assert f"rank 0 of 2 ({address}) cannot start: " in str(raised.value) and said in str(raised.value)
    assert joining.CHECK in str(raised.value)


def test_an_unknown_error_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise RuntimeError("something of its own")

    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setattr(mx.distributed, "init", failing)
    with pytest.raises(RuntimeError, match="something of its own"):
        joining.join(1.0)


def test_a_worker_that_was_never_started(run, tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in launch.free_ports(2)]))
    program = "from compiled_adam.distributed import join; join(0.05); print('joined')"
    ended = run("-c", program, MLX_HOSTFILE="hosts.json", MLX_RANK="0")
    assert ended.returncode == 1 and ended.stdout == ""
    assert "rank 0 of 2 (127.0.0.1:" in ended.stderr and "has waited 0.5 s for the other workers" in ended.stderr
    assert ended.stderr.count("\n") == 1 and joining.CHECK in ended.stderr


def test_they_join_and_their_clocks_are_stopped(tmp_path: Path) -> None:
    program = """
import faulthandler
from compiled_adam.distributed import joining
stopped = []
cancel = faulthandler.cancel_dump_traceback_later
faulthandler.cancel_dump_traceback_later = lambda: stopped.append(cancel())
group = joining.join(60.0)
assert joining.join(60.0) is group and len(stopped) == 1
print("rank", group.rank(), "of", group.size())
"""
    printed = launch.run(2, tmp_path, "-c", program)
    assert [text.splitlines()[-1] for text in printed] == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.slow
def test_one_that_cannot_start_ends_the_other(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The command itself: one port is a stranger's, who takes what the other worker says and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        hosts = [[f"127.0.0.1:{port}"] for port in (stranger.getsockname()[1], *launch.free_ports(1))]
        file = tmp_path / "taken.json"
        file.write_text(json.dumps(hosts))
        job = ["-m", "compiled_adam.cli", "lora", "--model", str(tiny_model), "--data", str(data), "--train"]
        with launch.workers(
            2, tmp_path, *job, "--batch-size", "2", "--worker-timeout", "0.5", MLX_HOSTFILE=str(file)
        ) as processes:
            (code, out), (other_code, other) = launch.outputs(processes)
    assert code == 2 and f"{hosts[0][0]} is in use by another process" in out, out
    assert other_code == 1 and f"rank 1 of 2 ({hosts[1][0]}) has waited 5 s for the other workers" in other, other
    assert "Traceback" not in out + other
