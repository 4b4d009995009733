"""Parameter trees to update: many small tensors, a LoRA's adapters, and a whole language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mlx.core as mx

Shapes = dict[str, tuple[int, ...]]
Workloads = dict[str, Callable[[], Shapes]]


def _gpt2_like() -> Shapes:
    """The shapes of a 12-layer GPT-2 with a vocabulary of 12 500: 97 tensors, 94.6 M parameters."""
    width = 768
    layer = {
        "ln_1.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.out.weight": (width, width),
        "ln_2.weight": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
    }
    shapes: Shapes = {"embedding": (12_500, width)}
    for i in range(12):
        shapes |= {f"layer{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _same(count: int, shape: tuple[int, ...]) -> Callable[[], Shapes]:
    return lambda: {f"tensor{i}": shape for i in range(count)}


WORKLOADS: Workloads = {
    "1000 x 64": _same(1000, (64,)),
    "448 x (8x1024)": _same(448, (8, 1024)),  # the adapters of a LoRA of rank 8
    "95 M GPT-2": _gpt2_like,
}
QUICK = ("1000 x 64", "448 x (8x1024)")
DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def arrays(shapes: Shapes, dtype: mx.Dtype, scale: float, seed: int) -> dict[str, mx.array]:
    """Normally distributed arrays, evaluated."""

    def draw() -> Iterator[tuple[str, mx.array]]:
        key = mx.random.key(seed)
        for name, shape in shapes.items():
            key, subkey = mx.random.split(key)
            yield name, (mx.random.normal(shape, key=subkey) * scale).astype(dtype)

    result = dict(draw())
    mx.eval(result)
    return result


def parameter_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def needed(parameters: int, dtype: mx.Dtype, contenders: int) -> int:
    """Bytes: weights, gradients, two float32 moments and a residual each, and three arrays during an update."""
    return parameters * (contenders * (2 * dtype.size + 8 + 2) + 3 * dtype.size)
