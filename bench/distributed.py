"""The time of an update by 1, 2 and 4 processes on this machine, with MLX's ring backend over loopback.

The processes share the cores and the memory of one machine, and MLX's ring waits by spinning: this tells what
communication costs in calls and bytes, and whether something is wrong, not how fast several machines are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from rich.console import Console
from rich.table import Table

import compiled_adam as ca
from compiled_adam.distributed import reduce

from .workloads import WORKLOADS, arrays

WORKLOAD = "224 x (8x1024)"  # the adapters of a LoRA
PROCESSES = (1, 2, 4)
SETUP = 240.0  # seconds for starting and compiling


class Arrays(nn.Module):
    """Arrays to train, and those that will be their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.arrays = list(arrays(WORKLOADS[WORKLOAD](), mx.float32, 0.02, seed=0).values())
        self.gradients = list(arrays(WORKLOADS[WORKLOAD](), mx.float32, 1e-3, seed=1).values())
        self.freeze(recurse=False, keys=["gradients"])


def loss(model: nn.Module) -> tuple[mx.array, mx.array]:
    """Its gradient is cheap: what remains is the update."""
    products = [(a * g).sum() for a, g in zip(model.arrays, model.gradients, strict=True)]
    return sum(products, mx.array(0.0)), mx.array(1.0)


def ours(group: mx.distributed.Group, shard_state: bool = False) -> Callable[[], None]:
    optimizer = ca.AdamW(1e-3, max_grad_norm=1.0)
    step = ca.make_step(Arrays(), loss, optimizer, weighted=True, group=group, shard_state=shard_state)
    return lambda: mx.eval(step().loss, step.model.parameters())


def stock(group: mx.distributed.Group) -> Callable[[], None]:
    """What a user of MLX writes: one compiled function with ``average_gradients`` in it."""
    model, optimizer = Arrays(), optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    gradient = nn.value_and_grad(model, lambda: loss(model)[0])
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step() -> mx.array:
        value, gradients = gradient()
        gradients, _ = optim.clip_grad_norm(nn.average_gradients(gradients, group), 1.0)
        optimizer.update(model, gradients)
        return value

    return lambda: mx.eval(step(), state)


CONTENDERS: dict[str, Callable[[mx.distributed.Group], Callable[[], None]]] = {
    "mlx, average_gradients": stock,
    "compiled_adam": ours,
    "sharded": partial(ours, shard_state=True),
}


def work(seconds: float) -> dict[str, Any]:
    """What each process does: all updates in turn, until the first one says that the time is over."""
    group = mx.distributed.init()
    calls: list[int] = []  # bytes that each all_sum and all_gather returns that is traced
    originals = {name: getattr(mx.distributed, name) for name in ("all_sum", "all_gather")}

    def counted(original: Callable[..., mx.array], x: mx.array, **options: Any) -> mx.array:
        made = original(x, **options)
        calls.append(made.nbytes if group.size() > 1 else 0)
        return made

    updates: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in CONTENDERS.items():
        updates[name] = make(group)
        for function, original in originals.items():
            setattr(mx.distributed, function, partial(counted, original))
        updates[name]()
        for function, original in originals.items():
            setattr(mx.distributed, function, original)
        found[name] = {"calls": sum(size > 0 for size in calls), "bytes": sum(calls), "ms": []}
        calls.clear()
        updates[name]()
    end = time.perf_counter() + seconds
    running = True
    while running:
        for name, update in updates.items():
            start = time.perf_counter()
            update()
            found[name]["ms"].append(1e3 * (time.perf_counter() - start))
        mine = mx.array(group.rank() == 0 and time.perf_counter() < end).astype(mx.int32)
        running = bool(mx.distributed.all_sum(mine, group=group).item())
    return found


def measure(processes: int, seconds: float) -> dict[str, Any]:
    """For each contender ``ms`` (median of the slowest process), ``p10_ms``, ``p90_ms``, ``calls`` and ``bytes``.

    Raises:
        RuntimeError: a process failed, with its last words.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(processes)]))
        started = []
        for rank in range(processes):
            # Each has its own kernels: MLX writes those of the CPU without a lock.
            cache = Path(tempfile.gettempdir()) / f"compiled_adam_bench_{os.getuid()}" / str(rank)
            _share_kernels(cache)
            own = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if processes > 1 else {}
            command = [sys.executable, "-m", "bench.distributed", "--work", "--seconds", str(seconds)]
            process = subprocess.Popen(
                command,
                env={**os.environ, "TMPDIR": str(cache), **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            started.append(process)
        outputs = []
        for process in started:
            out, error = process.communicate(timeout=SETUP + seconds)
            if process.returncode:
                raise RuntimeError(f"a process of the benchmark failed: {error[-2000:]}")
            outputs.append(json.loads(out))
    result: dict[str, Any] = {}
    for name in CONTENDERS:
        # An update is over when the last process has it.
        times = sorted(map(max, zip(*(output[name]["ms"] for output in outputs), strict=True)))
        result[name] = {key: outputs[0][name][key] for key in ("calls", "bytes")} | {
            "ms": statistics.median(times),
            "p10_ms": times[len(times) // 10],
            "p90_ms": times[len(times) * 9 // 10],
            "rounds": len(times),
        }
    return {"processes": processes, "workload": WORKLOAD, "contenders": result}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _share_kernels(cache: Path) -> None:
    """Gives a rank the kernels that the first one has compiled: while the others spin, compiling takes long."""
    first = cache.parent / "0"
    if cache != first and first.exists():
        shutil.copytree(first, cache, dirs_exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)


def table(record: list[dict[str, Any]]) -> Table:
    made = Table(title=f"One AdamW update of {WORKLOAD} float32 by several processes on this machine")
    for column in ("processes", "contender", "ms", "p10-p90", "calls", "MB"):
        made.add_column(column, justify="left" if column == "contender" else "right")
    for row in record:
        for name, found in row["contenders"].items():
            spread = f"{found['p10_ms']:.1f}-{found['p90_ms']:.1f}"
            size = f"{found['bytes'] / 1e6:.2f}"
            made.add_row(str(row["processes"]), name, f"{found['ms']:.1f}", spread, str(found["calls"]), size)
    return made


def compare(seconds: float) -> tuple[list[dict[str, Any]], Table]:
    """`measure` for 1, 2 and 4 processes: the record and its table."""
    record = []
    for count in PROCESSES:
        print(f"measuring {count} process{'es' if count > 1 else ''}", file=sys.stderr)
        record.append(measure(count, seconds))
    return record, table(record)


def expected_bytes() -> list[int]:
    """What the calls of an update communicate, from the packing alone."""
    sizes = [a.size for a in Arrays().arrays]
    return [buffer.nbytes for buffer in reduce.buffers(sizes, [mx.float32] * len(sizes))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of processes (default: 10)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.seconds)))
    else:
        Console().print(compare(arguments.seconds)[1])


if __name__ == "__main__":
    main()
