"""Starts the workers of a group by hand, as ``mlx.launch`` does for the ring backend: addresses and a rank."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from tests.conftest import ROOT

# MLX writes compiled CPU kernels to the temporary folder without a lock: processes that share it would read halves of
# each other's. So each rank has its own, which stay for the next test.
CACHES = Path(tempfile.gettempdir()) / f"compiled_adam_ranks_{os.getuid()}"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def workers(count: int, folder: Path, *arguments: str, **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """``python arguments`` as so many workers in ``folder``; whatever still runs at the end is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    for rank in range(count):
        (CACHES / str(rank)).mkdir(parents=True, exist_ok=True)
        own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TMPDIR": str(CACHES / str(rank))}
        own |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the same bits for any number of workers
        if count > 1:
            own |= {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def warm(name: str, folder: Path, *arguments: str, **environment: str) -> None:
    """Lets one process compile the kernels of ``python -m arguments``, and gives them to all ranks.

    Not again, until something changes that decides which they are, because it takes as long as a run of a worker.
    """
    sources = hashlib.sha256(f"{mx.__version__} {environment}".encode())
    for file in sorted([*(ROOT / "compiled_adam").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        sources.update(file.read_bytes())
    done = CACHES / f"{name}-{sources.hexdigest()[:16]}"
    if done.exists():
        return
    run(1, folder, "-m", "tests.alone", *arguments, **environment)
    for rank in range(1, 4):
        for file in (CACHES / "0" / "mlx").rglob("*.so"):
            copy = CACHES / str(rank) / file.relative_to(CACHES / "0")
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    done.touch()


def outputs(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """Exit code and output of each, when all have ended."""
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=timeout)
        found.append((process.returncode, out))
    return found


def run(count: int, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Runs workers that are to succeed; what each printed."""
    with workers(count, folder, *arguments, **environment) as processes:
        ended = outputs(processes)
    assert not any(code for code, _ in ended), "\n".join(f"[rank {r}: {code}] {o}" for r, (code, o) in enumerate(ended))
    return [out for _, out in ended]
