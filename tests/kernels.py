"""The CPU kernels that MLX compiles, kept from one run of the tests to the next: a second of g++ each.

MLX writes them to the temporary folder without a lock, so that a process can load half of what another one writes.
Hence each of several processes of pytest has a temporary folder of its own, and a common store, in which files appear
whole, is copied from at the begin and added to at the end.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

HOME = Path(tempfile.gettempdir()) / f"compiled_adam_tests_{os.getuid()}"  # the same in all processes of pytest
STORE = HOME / "store"
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # None in a run by one process, which has MLX's own folder


def separate() -> None:
    """Gives this process, and those that it starts, its own temporary folder; called before MLX is imported."""
    if WORKER is not None:
        own = HOME / WORKER
        own.mkdir(parents=True, exist_ok=True)
        _add(STORE, own)
        os.environ["TMPDIR"] = str(own)
        tempfile.tempdir = None  # it is found anew


def keep() -> None:
    """Adds this process's kernels to the store, at the end, when none is being written."""
    if WORKER is not None:
        _add(HOME / WORKER, STORE)


def _add(source: Path, target: Path) -> None:
    """Links what ``target`` does not have; a link is made at once, and to a file that is never written to again."""
    for file in source.glob("mlx/*/cpu/*.so"):
        other = target / file.relative_to(source)
        other.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(file, other)
