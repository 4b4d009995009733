"""Values as a person reads them in one line."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def shown(value: Any) -> str:
    """A short text for a ``__repr__``. It waits for an array of one number; of other arrays it has dtype and shape.

    A number that is being traced, or cannot be computed, is shown as "?".

    >>> shown({"loss": mx.array(0.25), "logits": mx.zeros((2, 3)), "norm": max, "rates": (1e-3, None)})
    "{'loss': 0.25, 'logits': float32[2, 3], 'norm': max, 'rates': (0.001, None)}"
    """
    if isinstance(value, mx.array):
        if value.ndim:
            return f"{str(value.dtype).removeprefix('mlx.core.')}{list(value.shape)}"
        try:
            return shown(value.item())
        except (RuntimeError, ValueError):
            return "?"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {shown(each)}' for key, each in value.items())}}}"
    if type(value) in (tuple, list):
        items = ", ".join(map(shown, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    return value.__name__ if type(value).__repr__ in _FUNCTIONS else repr(value)


_FUNCTIONS = {type(shown).__repr__, type(len).__repr__}  # their representations have an address
