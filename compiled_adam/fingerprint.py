"""What tells whether two runs start from the same: short digests of arrays and files, and package versions."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def of_arrays(arrays: Mapping[str, mx.array]) -> str:
    """A digest of paths, shapes, dtypes and of a sum over the bits of each array; one pass over the arrays.

    >>> a = mx.array([1.0, 2.0])
    >>> of_arrays({"a": a}) == of_arrays({"a": a + 0}), of_arrays({"a": a}) == of_arrays({"a": a + 1})
    (True, False)
    """
    parts = [(path, *described) for path, described in sorted(_described(arrays).items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def of_each(arrays: Mapping[str, mx.array]) -> dict[str, str]:
    """The same for each array, as words: dtype, shape and sum.

    >>> of_each({"a": mx.array([1.0, 2.0])})
    {'a': 'float32 (2,) 7f800000'}
    """
    return {
        path: f"{dtype.removeprefix('mlx.core.')} {shape} {total:x}"
        for path, (shape, dtype, total) in _described(arrays).items()
    }


def _described(arrays: Mapping[str, mx.array]) -> dict[str, tuple[tuple[int, ...], str, int]]:
    # Modulo 2^32 or 2^64: integers add in any order to the same sum, on every device.
    sums = {path: a.view(_WORDS[a.dtype.size]).sum() for path, a in arrays.items()}
    mx.eval(sums)
    return {path: (a.shape, str(a.dtype), cast(int, sums[path].item())) for path, a in arrays.items()}


def of_file(file: Path) -> str:
    """A digest of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def of_numpy() -> str:
    """A digest of NumPy's global random state, from which the order of batches is drawn."""
    return hashlib.sha256(repr([np.asarray(part).tolist() for part in np.random.get_state()]).encode()).hexdigest()[:16]


def packages() -> dict[str, str]:
    """The versions of what results depend on."""
    found = {}
    for name in ("compiled-adam", "mlx", "mlx-lm"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
