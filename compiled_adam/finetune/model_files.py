"""Loading a model. Its files are checked first, so that the message names the one that is missing or damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import utils

from ..base import InputError
from . import model_config, places

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tiktoken.model", "vocab.txt")


def load(model: str, trust_remote_code: bool | None) -> tuple[nn.Module, Any]:
    """The model and its tokenizer; ``trust_remote_code`` is None for an mlx-lm that has no such option.

    Raises ValueError or OSError for a model that is not there, or whose files are damaged.
    """
    if Path(model).exists():
        check(Path(model), bool(trust_remote_code))
    try:
        if trust_remote_code is None:  # mlx-lm before 0.32 always trusts the tokenizer's code
            loaded = utils.load(model, tokenizer_config={"trust_remote_code": True})
        else:
            loaded = utils.load(
                model, tokenizer_config={"trust_remote_code": trust_remote_code}, trust_remote_code=trust_remote_code
            )
    except (ValueError, OSError) as error:
        if Path(model).exists() or (told := places.unavailable(model, error)) is None:
            raise
        raise told from error
    return loaded[0], loaded[1]


def check(folder: Path, trust_remote_code: bool = False) -> None:
    """Raises ValueError or OSError that names the first file of a model that is missing or damaged."""
    if not folder.is_dir():
        raise InputError(f"model is {str(folder)!r}, a file; give the folder of a model")
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{folder / 'config.json'} has no model_type, as the configuration of a model has")
    if "model_file" in config:
        if not trust_remote_code:
            raise InputError(
                f"the model in {folder} runs Python code of its own ({config['model_file']}); if you trust it, give"
                " --trust-remote-code"
            )
    else:
        try:
            utils._get_classes(config)
        except (ValueError, AttributeError):  # the latter of its modules that are no model
            raise InputError(
                f"{folder / 'config.json'} has the model_type {kind!r}, which this mlx-lm does not have; update mlx-lm"
            ) from None
    model_config.check(config)
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        parts = _json(index).get("weight_map", {})
        for name in sorted(set(parts.values())) if isinstance(parts, dict) else []:
            if not (folder / name).exists():
                raise InputError(f"{folder / name} is missing, but {index} lists it; download the model again")
    if not files:
        raise InputError(f"No safetensors found in {folder}: a model has its weights in model*.safetensors")
    for file in files:
        check_safetensors(file)
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise InputError(f"{folder} has no tokenizer.json, nor another file of a tokenizer; download the model again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _json(folder / name)


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise InputError(f"{file} is missing; give the folder of a whole model")
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged: it is no JSON object")
    return found


def check_safetensors(file: Path) -> None:
    """The header, and whether the file has the bytes that the header says: copies and downloads end in the middle."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise InputError(f"{file} is damaged: it is no safetensors file, or only the beginning of one")
        text = stream.read(length)
    try:
        header = json.loads(text)
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise InputError(f"{file} is damaged: its header is not that of a safetensors file") from None
    if whole != size:
        raise InputError(f"{file} is damaged: it has {size:,} bytes, and its header describes {whole:,}")
