"""Time, memory and kernels of an update, and the record of where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from compiled_adam.graph import kernels

from .contenders import Contender, Tree


def compare(
    contenders: Mapping[str, Callable[[Tree], Contender]],
    parameters: Callable[[], Tree],
    gradients: Tree,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Measures one update of each contender: for each, a dictionary of figures by name.

    The contenders take turns, in an order that shifts by one each round, until ``seconds`` have passed and at least
    five rounds: whatever slows the machine meets all of them. The first two updates of each (tracing, compiling,
    warming up) do not count. Figures: ``median_ms``, ``p10_ms``, ``p90_ms``, ``rounds``, ``ratio`` to the first
    contender (median of the ratios within a round), ``peak_extra_bytes`` allocated during an update beyond what
    exists before it, ``kernels`` in the graph of one update.
    """
    running = {name: make(parameters()) for name, make in contenders.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, contender in running.items():
        mx.eval(contender.build(gradients))
        outputs = contender.build(gradients)
        figures[name] = {"kernels": sum(kernels(outputs).values())}
        mx.eval(outputs)
        del outputs  # or the old arrays would count as extra memory
        figures[name]["peak_extra_bytes"] = _peak_extra(contender, gradients)

    times: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    start = clock()
    while clock() - start < seconds or len(times[names[0]]) < 5:
        names = names[1:] + names[:1]
        for name in names:
            begin = clock()
            mx.eval(running[name].build(gradients))
            times[name].append(clock() - begin)
    first = times[next(iter(running))]
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        figures[name] |= {
            "median_ms": 1e3 * statistics.median(values),
            "p10_ms": 1e3 * deciles[0],
            "p90_ms": 1e3 * deciles[-1],
            "rounds": len(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
        }
    return figures


def _peak_extra(contender: Contender, gradients: Tree) -> int:
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(contender.build(gradients))
    return max(0, mx.get_peak_memory() - before)


def environment() -> dict[str, Any]:
    """Device, versions, commit, date and load: what a figure depends on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(mx.default_device()),
        "device_info": {key: str(value) for key, value in mx.device_info().items()},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "compiled_adam": version("compiled-adam"),
        "blas": blas(),
        "commit": commit.stdout.strip() or None,
    }


def blas() -> str:
    """Which library multiplies matrices on the CPU of Linux: as a preloaded one tells, or "as MLX was built"."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "as MLX was built"
    libraries = {Path(line.split()[-1]).name for line in maps.splitlines() if "blas" in line.lower()}
    return ", ".join(sorted(libraries)) or "as MLX was built"
