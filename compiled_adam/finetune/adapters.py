"""Loading trained weights into a model. Arrays that do not fit are reported or refused; mlx-lm ignores them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base import InputError, differences, table
from ..checkpoint import check_finite
from .lora_values import lora_parameters
from .model_files import check_safetensors
from .names import CONFIG, WEIGHTS
from .options import called
from .trainable import DTYPES, add_adapters, is_adapter


def load_weights(model: nn.Module, file: str | Path, wanted: Collection[str]) -> str:
    """Puts the arrays of a file into a model without a change of dtype; returns a line that says how many.

    Args:
        model: gets the arrays, by the paths of its parameters.
        file: a .safetensors or .npz file.
        wanted: the paths that the file should have, such as those of all trained parameters. Some may be missing, and
            paths that the model does not have are ignored, as in mlx-lm, if the file has at least one wanted path. None
            wanted: any path of the model will do.

    Raises:
        ValueError: the file cannot be read, nothing of it fits, or an array has another shape or kind of dtype, or
            values that are not finite. The model is unchanged then.
    """
    arrays = read_arrays(Path(file))
    parameters = dict(tree_flatten(model.parameters()))
    used = {name: array for name, array in arrays.items() if name in parameters}
    if not used.keys() & set(wanted or parameters):
        raise InputError(
            f"nothing that is trained is in {file}: it has {_some(arrays)}; the model has"
            f" {_some(wanted or parameters)}{_peft(arrays)}"
        )
    others = {name: array for name, array in used.items() if not _fits(array, parameters[name])}
    if others:
        rows = differences({name: parameters[name] for name in others}, others)
        raise InputError(
            f"{file} does not fit the model; was it made with another rank (lora_parameters), or for another model?\n"
            + table(("array", "here", "file"), rows, most=8)
        )
    try:
        check_finite(used)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    model.load_weights(list(used.items()), strict=False)
    return f"{file}: {_counted(arrays, used, wanted)}"


def load_adapters(model: nn.Module, folder: str | Path) -> str:
    """Adds the adapters of a folder that mlx-lm or `compiled_adam.train` wrote; returns a line that says how many.

    Raises:
        ValueError: the folder, its configuration or its weights cannot be used, as for `load_weights`.
    """
    file = Path(folder) / WEIGHTS
    kind, num_layers, parameters = _read_config(Path(folder) / CONFIG)
    if kind == "full":
        return load_weights(model, file, wanted=())
    add_adapters(model, num_layers, parameters, dora=kind == "dora")
    adapters = list(filter(is_adapter, dict(tree_flatten(model.parameters()))))
    if left := sorted(set(read_arrays(file)) - set(adapters)):
        # mlx-lm refuses them, too: with other layers than the configuration says a test would be of something else.
        raise InputError(
            f"{file} has {len(left)} arrays that the model does not have: {_some(left)}; the model has"
            f" {_some(adapters)}{_peft(left)}"
        )
    return load_weights(model, file, wanted=adapters)


def trained_dtype(folder: str | Path) -> str | None:
    """The ``dtype`` that a run was given, whose adapters are in a folder. Raises ValueError for one of no run."""
    file = Path(folder) / CONFIG
    dtype = _mapping(file).get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"{file}: dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or null")
    return dtype


def other_scale(file: str | Path, parameters: Mapping[str, Any] | None) -> str | None:
    """A sentence if the configuration beside a file says that its adapters were trained with another scale."""
    try:
        kind, _, its = _read_config(Path(file).parent / CONFIG)
    except InputError:
        return None  # weights need no configuration
    if kind == "full" or not parameters or its["scale"] == parameters["scale"]:
        return None
    return (
        f"{file} was trained with scale {its['scale']:g}, and this run has scale {parameters['scale']:g}"
        " (lora_parameters)"
    )


def check_folder(folder: str | Path) -> None:
    """Raises ValueError if a folder of adapters cannot be used with any model."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{called('adapter_path')} is {str(folder)!r}, which is not a folder; give the folder of a run,"
            " or '' to test the model without adapters"
        )
    _read_config(Path(folder) / CONFIG)
    read_arrays(Path(folder) / WEIGHTS)


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays in a file of weights. Raises ValueError that names what is wrong with the file."""
    if file.is_dir():
        raise InputError(f"{file} is a folder; give the file in it, such as {file / WEIGHTS}")
    if not file.exists():
        raise InputError(f"{file} does not exist; it should have the trained weights")
    if file.suffix not in (".safetensors", ".npz"):
        raise InputError(f"{file} is not a .safetensors file; give weights in this format")
    if file.suffix == ".safetensors":
        check_safetensors(file)
    try:
        arrays: Any = mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not arrays:
        raise InputError(f"{file} has no arrays; give a file of weights")
    return arrays


def _mapping(file: Path) -> Mapping[str, Any]:
    """An adapter_config.json. Raises ValueError if it is missing or damaged."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; it has the rank and layers of the adapters beside it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}") from None
    if not isinstance(config, Mapping):
        raise InputError(f"{file} is damaged: it is not a mapping")
    return config


def _read_config(file: Path) -> tuple[str, int, dict[str, Any]]:
    """The fine-tuning type, the number of layers and the LoRA parameters of an adapter_config.json."""
    config = _mapping(file)
    kind = config.get("fine_tune_type", "lora")
    if "peft_type" in config:
        raise InputError(f"{file} is of Hugging Face's PEFT; mlx-lm cannot read PEFT adapters")
    if kind not in ("lora", "dora", "full"):
        raise InputError(f"{file}: fine_tune_type is {kind!r}; it must be one of lora, dora, full")
    if kind == "full":
        return kind, -1, {}
    num_layers, parameters = config.get("num_layers"), config.get("lora_parameters")
    if type(num_layers) is not int:
        raise InputError(f"{file}: num_layers is {num_layers!r}; it must be a whole number")
    if not isinstance(parameters, Mapping):
        raise InputError(f"{file}: lora_parameters is {parameters!r}; it must be a mapping")
    known = {key: value for key, value in parameters.items() if key in ("rank", "scale", "dropout", "keys")}
    try:
        return kind, num_layers, lora_parameters(known)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _counted(arrays: Collection[str], used: Collection[str], wanted: Collection[str]) -> str:
    found = f"used {len(used)} of {len(arrays)} arrays" if len(used) < len(arrays) else f"used all {len(used)} arrays"
    left = [name for name in arrays if name not in used]
    missing = [name for name in wanted if name not in used]
    notes = [f"not in the model: {_some(left)}"] if left else []
    notes += [f"not in the file: {_some(missing)} ({len(missing)} of {len(wanted)})"] if missing else []
    return "; ".join([found, *notes])


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join([*shown, "..."] if len(names) > len(shown) else shown)


def _peft(names: Collection[str]) -> str:
    """The end of a sentence about names that do not fit, if they are those of PEFT."""
    theirs = any("lora_A" in name or name.startswith("base_model.") for name in names)
    return "; the file has the names of Hugging Face's PEFT, and mlx-lm cannot read PEFT adapters" if theirs else ""


def _fits(array: mx.array, parameter: mx.array) -> bool:
    both_floats = all(mx.issubdtype(each.dtype, mx.floating) for each in (array, parameter))
    return array.shape == parameter.shape and (both_floats or array.dtype == parameter.dtype)
