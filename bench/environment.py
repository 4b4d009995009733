"""The record of where figures were measured; what to do about a busy machine and about a slow BLAS."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
from compiled_adam.base import blas

SCHEMA = 3  # of the records: goes up when a field changes its meaning or goes away
ROOT = Path(__file__).parent.parent
OTHERS = ("mlx-lm", "numpy", "torch")
BUSY = 0.5  # load for each core above which other programs take part in every time


def environment() -> dict[str, Any]:
    """Device, versions, commit, date and load: what a figure depends on."""
    load = os.getloadavg()[0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(mx.default_device()),
        "device_info": {key: str(value) for key, value in mx.device_info().items()},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "load_average": load,
        "busy": load > BUSY * cores(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "compiled_adam": version("compiled-adam"),
        "versions": {name: found for name in OTHERS if (found := _version(name))},
        "blas": blas.used(),
        "commit": _commit(),
    }


def load_line(found: dict[str, Any]) -> str:
    """The first line of a run: the load of an `environment`, whether that is too much, and the remedy."""
    load = f"load {found['load_average']:.1f} on {found['cores']} cores"
    if not found["busy"]:
        return f"{load}: quiet enough to measure"
    most = BUSY * found["cores"]
    return (
        f"{load}: too busy to measure, times will be wrong; end other programs, wait a minute until the load is"
        f" below {most:g}, and run this again"
    )


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def blas_hint() -> str | None:
    """One sentence for whoever times matrix products on MLX's own BLAS; None where there is nothing to say."""
    if not blas.is_slow() or mx.default_device() != mx.Device(mx.cpu):
        return None
    return (
        "MLX multiplies matrices with the reference BLAS here, which hides what an optimizer costs; `compiled-adam"
        " doctor` says how to get a fast one"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
