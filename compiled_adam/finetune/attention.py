"""Causal attention on the CPU without the half that nobody sees.

GPUs have fused kernels of attention. The CPU computes the score of every query with every key, forgets the half above
the diagonal, and keeps the rest for the backward pass. A block of queries needs the keys up to its last one only. So
blocks compute little more than half, and each row of scores has the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import mlx.core as mx

LEAST = 64  # queries in a block; with fewer, the time to start kernels is longer than what is saved
MOST = 8  # blocks, so that graphs stay small

Attention = Callable[..., mx.array]
# Of this thread. Threads enter and leave contexts in any order, so the last one to leave gives MLX its function back.
_wanted: ContextVar[bool] = ContextVar("wanted", default=False)
_mlxs: list[Attention] = []  # one for each context that is open; the first is the one to give back
_changing = Lock()


@contextmanager
def in_blocks(wanted: bool = True) -> Iterator[None]:
    """Inside the block, ``mx.fast.scaled_dot_product_attention`` computes causal attention in blocks on the CPU.

    Masks that are arrays, keys of a cache, attention on a GPU and in other threads are left to MLX. Not ``wanted``:
    everything is.
    """
    before = _wanted.set(wanted)
    with _changing:
        _mlxs.append(mx.fast.scaled_dot_product_attention)
        if len(_mlxs) == 1:
            mx.fast.scaled_dot_product_attention = _blocks_of(_mlxs[0])
    try:
        yield
    finally:
        with _changing:
            whole = _mlxs.pop()
            if not _mlxs:
                mx.fast.scaled_dot_product_attention = whole
        _wanted.reset(before)


def _blocks_of(whole: Attention) -> Attention:
    # `options` are those of MLX's function, whatever they are in the version that is installed.
    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any) -> mx.array:
        length = q.shape[-2]
        step = max(LEAST, -(-length // MOST))
        causal = _wanted.get() and mask == "causal" and k.shape[-2] == length > step
        if not causal or mx.default_device().type != mx.DeviceType.cpu:
            return whole(q, k, v, mask=mask, **options)
        ends = [(start, start + step) for start in range(0, length, step)]
        # MLX lets the last query see the last key, and so all queries see what they saw.
        blocks = [whole(q[..., a:b, :], k[..., :b, :], v[..., :b, :], mask=mask, **options) for a, b in ends]
        return mx.concatenate(blocks, axis=-2)

    return attention
