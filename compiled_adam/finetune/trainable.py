"""The trained parameters of a model, adapters or the last layers themselves, and the dtype of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..base import InputError
from .options import called

_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
_DORA = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
_LORA = (*_DORA, SwitchLinear, QuantizedSwitchLinear)  # beside modules that have a `to_lora` of their own
DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}  # of weights that are cast


def is_adapter(path: str) -> bool:
    """Whether a parameter is one of LoRA or DoRA."""
    return path.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")


def cast(model: nn.Module, dtype: str | None) -> None:
    """Casts the weights of a model to one of `DTYPES`; None changes nothing.

    Adapters stay as they are, and so does what ``mlx_lm.convert --dtype`` leaves alone. ValueError if the model is
    quantized.
    """
    if dtype is None:
        return
    if bits := next((module.bits for module in model.modules() if isinstance(module, _QUANTIZED)), None):
        raise InputError(
            f"the model is quantized ({bits} bits), and {called('dtype')} is for weights that are not; leave it out, or"
            " use a model that is not quantized, such as mlx_lm.convert --dequantize makes of this one"
        )
    kept = getattr(model, "cast_predicate", lambda path: True)

    def as_asked(path: str, array: mx.array) -> mx.array:
        casts = mx.issubdtype(array.dtype, mx.floating) and kept(path) and not is_adapter(path)
        return array.astype(DTYPES[dtype]) if casts else array

    model.update(tree_map_with_path(as_asked, model.parameters()))


def check_layers(model: nn.Module, num_layers: int, *, given: bool = True) -> None:
    """Raises ValueError for more layers than the model has; ``given``: whether the user gave the number."""
    has = len(model.layers)
    if num_layers > has:
        by = "" if given else " by default"
        raise InputError(
            f"{called('num_layers')} is {num_layers}{by}, but the model has {has} layers; give --num-layers {has}, or"
            " fewer, or -1 for all"
        )


def unfreeze_last(model: nn.Module, num_layers: int) -> None:
    """Unfreezes the last ``num_layers`` layers, or all for -1. ValueError if they are quantized."""
    layers = _last(model, num_layers)
    quantized = [module for layer in layers for _, module in layer.named_modules() if isinstance(module, _QUANTIZED)]
    if quantized:
        raise InputError(
            f"the model is quantized ({quantized[0].bits} bits), and full fine-tuning trains the weights themselves;"
            f" use {called('fine_tune_type')} lora or dora, or a model that is not quantized, such as"
            " mlx_lm.convert --dequantize makes of this one"
        )
    for layer in layers:
        layer.unfreeze()


def add_adapters(model: nn.Module, num_layers: int, parameters: Mapping[str, Any], dora: bool) -> None:
    """Adds LoRA or DoRA adapters to the last ``num_layers`` layers, or to all for -1, as mlx-lm does.

    Raises:
        ValueError: one of ``parameters["keys"]`` fits no layer, or a layer that cannot have adapters. The message lists
            the possible keys.
    """
    inside = {path: module for layer in _last(model, num_layers) for path, module in layer.named_modules()}
    every = {**dict(model.named_modules()), **inside}
    given = parameters.get("keys")
    possible = [] if given is None else _possible(model, inside, dora)
    keys = [path for path in inside if _adaptable(inside[path], dora=False)] if given is None else given
    for key in keys:
        if key not in every:
            raise InputError(f"lora_parameters: {key!r} of keys fits no layer{_among(key, possible)}")
        if not _adaptable(every[key], dora):
            kind = "DoRA" if dora else "LoRA"
            raise InputError(
                f"{key!r} is a {type(every[key]).__name__}, which has no {kind} adapters{_among(key, possible)}"
            )
    if not keys:
        raise InputError("the model has no layer that adapters can be added to")
    linear_to_lora_layers(model, num_layers, dict(parameters), use_dora=dora)


def _last(model: nn.Module, num_layers: int) -> list[nn.Module]:
    return list(model.layers[-max(num_layers, 0) :])


def _adaptable(module: Any, dora: bool) -> bool:
    return isinstance(module, _DORA) if dora else hasattr(module, "to_lora") or isinstance(module, _LORA)


def _possible(model: nn.Module, inside: Mapping[str, nn.Module], dora: bool) -> list[str]:
    """The possible keys: paths inside the trained layers, and paths of modules outside of all layers."""
    layers = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    outside = {path: module for path, module in model.named_modules() if id(module) not in layers}
    return sorted(path for path, module in {**inside, **outside}.items() if _adaptable(module, dora))


def _among(key: str, possible: list[str]) -> str:
    """The end of a message with the possible keys, if there are any; those that end like ``key`` come first."""
    last = key.rsplit(".", 1)[-1]
    shown = sorted(possible, key=lambda path: not path.endswith(last))[:20]
    others = " and others" if len(possible) > len(shown) else ""
    return f"; possible are {', '.join(shown)}{others}" if shown else ""
