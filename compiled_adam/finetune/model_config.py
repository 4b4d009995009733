"""A model's config.json: read, checked, and built into mlx-lm's model, whose arrays are lazy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from ..base import InputError
from .places import near

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# The largest sizes under the names that most models have; a list has one size for each layer. A model with more layers
# would be built for hours before another error is found.
SIZES = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 1 << 26),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 26),
}
MOST = 1 << 48  # elements of one array; MLX counts bytes in 64 bits
# mlx-lm's classes do not check the config. Wrong values raise one of these errors: in arithmetic, as keys, as names and
# as shapes of arrays.
_OF_VALUES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError)


def read(name: str) -> dict[str, Any]:
    """The config of a model: a folder that has a config.json, that file, or a name in the cache of Hugging Face."""
    file = Path(name)
    if file.is_dir():
        file = file / "config.json"
    elif not file.exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        cached: object = None
        with suppress(HFValidationError):  # no name on Hugging Face, such as a path that begins with a slash
            cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            hint = near(name) or "; give a folder that has a config.json"
            raise InputError(f"{name} does not exist here, and is not in the cache of Hugging Face{hint}")
        file = Path(cached)
    if not file.is_file():
        raise InputError(f"{file} is no file; name a model's folder, or its config.json")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is not the config of a model; it must be an object, with a model_type")
    return config


def check(config: Mapping[str, Any]) -> None:
    """Raises InputError that names a size which is not a whole number in its range."""
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"the config's model_type is {config.get('model_type')!r}; it must be the name of a model")
    for part in ("text_config", "quantization"):
        if not isinstance(config.get(part) or {}, dict):
            raise InputError(f"the config's {part} is {config[part]!r}; it must be an object")
    for mapping in (config, config.get("text_config") or {}):
        for name, most in SIZES.items():
            value = mapping.get(name)
            for each in value if isinstance(value, list) else [] if value is None else [value]:
                if type(each) is not int or not 0 < each <= most:
                    raise InputError(f"the config's {name} is {value!r}; it must be a whole number from 1 to {most}")


def build(config: Mapping[str, Any]) -> tuple[nn.Module, int, str]:
    """The model of a ``config``, with its number of parameters before quantization, and their dtype.

    Raises InputError for a config that mlx-lm has no model for.
    """
    check(config)
    text = config.get("text_config") or {}
    dtype = str(config.get("torch_dtype") or config.get("dtype") or text.get("torch_dtype") or "bfloat16")
    if dtype not in DTYPES:
        raise InputError(f"the config's torch_dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    try:
        model_class, args_class = _get_classes(dict(config))
        model = model_class(args_class.from_dict(dict(config)))
    except _OF_VALUES as error:
        raise InputError(f"the config is not one that mlx-lm can build a model of: {_told(error)}") from error
    found: Any = tree_flatten(model.parameters())
    for path, array in found:
        if math.prod(array.shape) > MOST:
            raise InputError(f"the config makes {path} of shape {array.shape}; no array can be as large as that")
    model.set_dtype(DTYPES[dtype])
    if quantization := config.get("quantization"):
        try:
            _quantize(model, quantization)
        except _OF_VALUES as error:
            raise InputError(
                f"the config's quantization is {quantization!r}, which MLX refuses: {_told(error)}"
            ) from error
    return model, sum(array.size for _, array in found), dtype


def _told(error: Exception) -> str:
    """The first line: MLX adds every signature of a function that was called with something else."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _quantize(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """As mlx-lm's converted models are: all alike, or with exceptions by path."""

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        own = quantization.get(path, True)
        return own if isinstance(own, (bool, dict)) else True

    shared = {name: value for name, value in quantization.items() if name in ("group_size", "bits", "mode")}
    nn.quantize(model, **shared, class_predicate=chosen)
