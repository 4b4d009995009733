"""Parameter trees of real language models: mlx-lm's model classes, the published sizes, and no weights.

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
from mlx.utils import tree_flatten

from compiled_adam.base import random_state
from compiled_adam.base.errors import InputError

Shapes = dict[str, tuple[int, ...]]

# What the config.json of each on the Hugging Face Hub says about shapes (and a few fields that must be there).
CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "rope_theta": 100000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "rope_theta": 1000000,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "rope_theta": 500000,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}


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
