"""``python -m tests.alone MODULE ...``: runs a worker's program in a group that is made up, of this process alone.

It does what each of several workers does, but for communication, so that MLX compiles and keeps the CPU kernels that
they will need: workers that compile the same kernel at once, while others spin and wait for them, take minutes.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import mlx.core as mx

SIZE = 2


class Group:
    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return SIZE


def all_sum(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    return mx.contiguous(x)  # like communication nothing that could be fused with what is around it


def all_gather(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    return mx.concatenate([x] * SIZE)


mx.distributed.init = lambda *_, **__: Group()
mx.distributed.all_sum, mx.distributed.all_gather = all_sum, all_gather
_, module, *arguments = sys.argv
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
