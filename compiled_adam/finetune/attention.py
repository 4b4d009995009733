"""Causal attention on the CPU without the half that nobody sees.

GPUs have fused kernels of attention. The CPU computes the score of every query with every key, forgets the half above
the diagonal, and keeps the rest for the backward pass. A block of queries needs the keys up to its last one only. So
blocks compute little more than half, and each row of scores has the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

LEAST = 64  # queries in a block; with fewer, the time to start kernels is longer than what is saved
MOST = 8  # blocks, so that graphs stay small


@contextmanager
def in_blocks(wanted: bool = True) -> Iterator[None]:
    """Inside the block, ``mx.fast.scaled_dot_product_attention`` computes causal attention in blocks on the CPU.

    Masks that are arrays, keys of a cache, and attention on a GPU are left to MLX. Not ``wanted``: everything is.
    """
    whole = mx.fast.scaled_dot_product_attention

    # `options` are those of MLX's function, whatever they are in the version that is installed.
    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any) -> mx.array:
        length = q.shape[-2]
        step = max(LEAST, -(-length // MOST))
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        if not (on_cpu and mask == "causal" and k.shape[-2] == length > step):
            return whole(q, k, v, mask=mask, **options)
        ends = [(start, start + step) for start in range(0, length, step)]
        # MLX lets the last query see the last key, and so all queries see what they saw.
        blocks = [whole(q[..., a:b, :], k[..., :b, :], v[..., :b, :], mask=mask, **options) for a, b in ends]
        return mx.concatenate(blocks, axis=-2)

    if not wanted:
        yield
        return
    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = whole
