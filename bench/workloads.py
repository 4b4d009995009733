"""Parameter trees to update: many small tensors, LoRA trees, whole language models, and sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from . import models
from .models import Shapes


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


def _lora(model: str, rank: int) -> Callable[[], Shapes]:
    return lambda: models.lora(models.CONFIGS[model], rank)


# Those with the name of a model need mlx-lm.
WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "1000 x 64": _same(1000, (64,)),
    "224 x (8x1024)": _same(224, (8, 1024)),
    "448 x (8x1024)": _same(448, (8, 1024)),
    "95 M GPT-2": _gpt2_like,
    "SmolLM2-135M": lambda: models.full(models.CONFIGS["SmolLM2-135M"]),
    "SmolLM2-135M LoRA r=8": _lora("SmolLM2-135M", 8),
    "Qwen3-0.6B LoRA r=8": _lora("Qwen3-0.6B", 8),
    "Qwen3-0.6B LoRA r=16": _lora("Qwen3-0.6B", 16),
    "Llama-3.2-1B LoRA r=8": _lora("Llama-3.2-1B", 8),
}
QUICK = ("1000 x 64", "224 x (8x1024)", "448 x (8x1024)", "95 M GPT-2", "Qwen3-0.6B LoRA r=8")
DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def of_model(name: str, config: dict[str, Any]) -> dict[str, Callable[[], Shapes]]:
    """The two workloads of a user's own model."""
    return {f"{name} LoRA r=8": lambda: models.lora(config, 8), name: lambda: models.full(config)}


def over_parameters(count: int = 100) -> dict[int, Shapes]:
    """Trees of ``count`` equal tensors, by their number of parameters."""
    return {total: _same(count, (total // count,))() for total in (10**4, 10**5, 10**6, 10**7, 10**8)}


def over_tensors(size: int = 64) -> dict[int, Shapes]:
    """Trees of tensors of ``size`` elements, by their number of tensors."""
    return {count: _same(count, (size,))() for count in (10, 100, 1000, 10_000)}


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


def hollow(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Arrays of the same shapes and dtypes that are one number in memory; what is no array stays."""
    made = {
        key: mx.broadcast_to(mx.zeros((), array.dtype), array.shape) if isinstance(array, mx.array) else array
        for key, array in tree.items()
    }
    mx.eval([array for array in made.values() if isinstance(array, mx.array)])
    return made


def parameter_count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
