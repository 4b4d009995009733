"""The parameter trees of a user's language model: mlx-lm's model classes, the sizes in its config.json, no weights.

MLX makes arrays when they are needed. Here nobody needs them: only shapes are read, so a model of any size costs
nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from compiled_adam.base import random_state
from compiled_adam.base.errors import InputError
from mlx.utils import tree_flatten

from .workloads import Shapes, Workloads


def of_model(name: str, config: dict[str, Any]) -> Workloads:
    """The two workloads of a user's own model."""
    return {f"{name} LoRA r=8": lambda: lora(config, 8), name: lambda: full(config)}


def full(config: dict[str, Any]) -> Shapes:
    """Every parameter, as ``--fine-tune-type full`` trains them."""
    return _shapes(_model(config).parameters())


def lora(config: dict[str, Any], rank: int) -> Shapes:
    """The adapters of all linear layers of all blocks, as mlx-lm makes them when it is told no keys."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = _model(config)
    model.freeze()
    with _random_state_kept():
        linear_to_lora_layers(model, len(model.layers), {"rank": rank, "dropout": 0.0, "scale": 20.0})
    return _shapes(model.trainable_parameters())


def config_of(path_or_id: str) -> dict[str, Any]:
    """The config.json of a folder, or of a model on the Hugging Face Hub, of which nothing else is downloaded.

    Raises ValueError that says why there is none.
    """
    if Path(path_or_id).is_dir():
        file = Path(path_or_id) / "config.json"
        if not file.is_file():
            raise InputError(f"{path_or_id} is not a folder with a model; it has no config.json")
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path_or_id, "config.json"))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path_or_id} is neither a folder nor a model on the Hugging Face Hub: {reason}"
            ) from None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{file} has no model_type; it is not the configuration of a language model")
    return config


def _model(config: dict[str, Any]) -> Any:
    from mlx_lm.utils import load_model

    with tempfile.TemporaryDirectory() as folder, _random_state_kept():
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            return load_model(Path(folder), lazy=True, strict=False)[0]
        except Exception as error:  # whatever a model class makes of a field that is missing or wrong
            raise InputError(f"mlx-lm makes no model of this config.json: {error}") from error


def _shapes(tree: Any) -> Shapes:
    leaves = dict(tree_flatten(tree))
    return {path: array.shape for path, array in leaves.items() if mx.issubdtype(array.dtype, mx.floating)}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Initial weights that nobody looks at must not change the random numbers of what comes after."""
    key = random_state.get()
    try:
        yield
    finally:
        random_state.assign(key)
