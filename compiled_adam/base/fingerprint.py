"""Short digests of arrays and data, and package versions. They show whether two runs start from the same input."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import cast

import mlx.core as mx

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def of_arrays(arrays: Mapping[str, mx.array]) -> str:
    """A digest of paths, shapes, dtypes and of sums over the bits of each array, weighted by position.

    >>> a = mx.array([1.0, 2.0])
    >>> of_arrays({"a": a}) == of_arrays({"a": a + 0}), of_arrays({"a": a}) == of_arrays({"a": a + 1})
    (True, False)
    """
    parts = [(path, *described) for path, described in sorted(_described(arrays).items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def of_each(arrays: Mapping[str, mx.array]) -> dict[str, str]:
    """A digest for each array, as words: dtype, shape and sums of the bits.

    >>> of_each({"a": mx.array([1.0, 2.0])})
    {'a': 'float32 (2,) bf800000 7f800000'}
    """
    return {
        path: " ".join([dtype.removeprefix("mlx.core."), str(shape), *(f"{total:x}" for total in totals)])
        for path, (shape, dtype, totals) in _described(arrays).items()
    }


def _described(arrays: Mapping[str, mx.array]) -> dict[str, tuple[tuple[int, ...], str, list[int]]]:
    # Modulo 2^32: sums of integers are the same in every order, on every device.
    sums = {path: _sums(a) if a.size else [] for path, a in arrays.items()}
    mx.eval(sums)
    return {path: (a.shape, str(a.dtype), [cast(int, s.item()) for s in sums[path]]) for path, a in arrays.items()}


def _sums(array: mx.array) -> list[mx.array]:
    """Two sums over the bits, weighted by row and by column. They need no temporary of the array's size."""
    words = array.view(_WORDS[array.dtype.size]).reshape(-1, array.shape[-1] if array.ndim else 1)
    sums = [words.sum(axis=axis).astype(mx.uint32) for axis in (0, 1)]
    return [(each * mx.arange(1, each.size + 1, dtype=mx.uint32)).sum() for each in sums]


def of_rows(rows: Iterable[tuple[Sequence[int], int | Sequence[tuple[int, int]]]]) -> str:
    """A digest of tokenized examples in order. A row has the tokens, and the offset or the spans that the loss is on.

    >>> of_rows([([1, 2], 0), ([3], 0)]) == of_rows([([1], 0), ([2, 3], 0)])
    False
    >>> of_rows([([1, 2, 3], [(1, 2)])]) == of_rows([([1, 2, 3], [(1, 3)])])
    False
    """
    import numpy as np  # here, because NumPy is installed only with mlx-lm

    digest = hashlib.sha256()
    for tokens, targets in rows:
        # The number of spans below 0, where no offset is.
        where = [-1 - len(targets), *chain(*targets)] if isinstance(targets, Sequence) else [targets]
        digest.update(np.array([len(tokens), *where], np.int64).tobytes())
        digest.update(np.asarray(tokens, np.int64).tobytes())
    return f"rows {digest.hexdigest()[:16]}"  # "rows": version 0.1 had a digest of the file here


def of_numpy() -> str:
    """A digest of NumPy's global random state, from which the order of batches is drawn."""
    import numpy as np  # here, because NumPy is installed only with mlx-lm

    return hashlib.sha256(repr([np.asarray(part).tolist() for part in np.random.get_state()]).encode()).hexdigest()[:16]


def packages() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    found = {}
    for name in ("compiled-adam", "mlx", "mlx-lm"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
