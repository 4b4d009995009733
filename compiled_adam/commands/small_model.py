"""A small language model and its tokenizer, made on the spot: for the demo, the examples, tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def texts(most: int = 15_000) -> tuple[str, str, str]:
    """The name and text of the largest of mlx-lm's manuals, and the text of the others, of ``most`` characters each.

    The wheel of mlx-lm 0.31, the last for Python 3.10, has no manuals; there its own source is the text.
    """
    folder = Path(mlx_lm.__file__).parent
    files = sorted(folder.glob("*.md")) or sorted(folder.glob("*.py"))
    topic = max(files, key=lambda file: file.stat().st_size)
    general = "".join(file.read_text(encoding="utf-8") for file in files if file != topic)
    return topic.name, topic.read_text(encoding="utf-8")[:most], general[:most]


def make_model(folder: Path, text: str, config: Mapping[str, Any] = CONFIG) -> None:
    """A byte-level BPE tokenizer trained on ``text`` and a model with random weights, as files that mlx-lm loads.

    ``config`` is the model's config.json. Default: `CONFIG`.
    """
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=config["vocab_size"],
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "config.json").write_text(json.dumps(dict(config)))
    model_class, args_class = _get_classes(dict(config))
    save_weights(model_class(args_class.from_dict(dict(config))), folder)


def save_weights(model: nn.Module, folder: Path) -> None:
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
