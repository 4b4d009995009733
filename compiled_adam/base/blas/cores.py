"""How many cores this process may use for itself: those of the machine, divided by the workers that it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds in each period, of a container


def cores() -> int:
    """At least 1."""
    return max(1, min(_allowed(), _quota()) // workers_here())


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> int:
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # ValueError: "max", which is no limit
        return _allowed()


def workers_here() -> int:
    """The workers on this machine that mlx.launch or mpirun has started, by their environment variables.

    1 if they make no sense: what joins the workers says what is wrong with them.
    """
    environment = os.environ
    try:
        if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
            return max(1, int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]))
        if "MLX_HOSTFILE" not in environment:
            return 1
        addresses = json.loads(Path(environment["MLX_HOSTFILE"]).read_text())
        first = [of_rank if isinstance(of_rank, str) else str(of_rank[0]) for of_rank in addresses]
        hosts = [address.rpartition(":")[0] for address in first]
        return hosts.count(hosts[int(environment["MLX_RANK"])])
    except (OSError, ValueError, LookupError, TypeError):
        return 1
