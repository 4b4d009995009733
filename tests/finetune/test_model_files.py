"""Files of a model that are missing or damaged are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.finetune import model_files


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def config(**changes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(whole | changes))

    return change


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "config.json is missing"),
        (put("config.json", b""), "config.json is damaged: it is not JSON"),
        (put("config.json", b"\xff\xfe{}"), "config.json is damaged: it is not JSON"),
        (put("config.json", b"[]"), "config.json is damaged: it is no JSON object"),
        (put("config.json", b"{}"), "config.json has no model_type"),
        (
            config(model_type="warp drive"),
            "config.json has the model_type 'warp drive', which this mlx-lm does not have",
        ),
        (
            config(model_file="evil.py"),
            r"runs Python code of its own \(evil.py\); if you trust it, give --trust-remote",
        ),
        (without("model.safetensors"), "No safetensors found in"),
        (cut("model.safetensors", 0), "model.safetensors is damaged: it is no safetensors file, or only the beginning"),
        (
            cut("model.safetensors", 100),
            "model.safetensors is damaged: it is no safetensors file, or only the beginning",
        ),
        (cut("model.safetensors", 500_000), "model.safetensors is damaged: it has 500,000 bytes, and its header"),
        (put("model.safetensors", b"\x02" + bytes(7) + b"[]"), "model.safetensors is damaged: its header is not that"),
        (put("model.safetensors", b"<!DOCTYPE html>"), "model.safetensors is damaged"),
        (put("model.safetensors.index.json", INDEX), "model-00002-of-00002.safetensors is missing, but"),
        (put("model.safetensors.index.json", b"{"), "model.safetensors.index.json is damaged"),
        (without("tokenizer.json"), "has no tokenizer.json, nor another file of a tokenizer"),
        (cut("tokenizer.json", 200), "tokenizer.json is damaged: it is not JSON"),
        (put("tokenizer_config.json", b"nonsense"), "tokenizer_config.json is damaged"),
    ],
)
def test_what_is_missing_or_damaged(damage: Callable[[Path], object], message: str, model: Path) -> None:
    model_files.check(model)
    damage(model)
    with pytest.raises(InputError, match=message):
        model_files.load(str(model), False)


def test_a_whole_model_is_loaded(model: Path) -> None:
    for trust in (None, False, True):
        loaded, tokenizer = model_files.load(str(model), trust)
        assert loaded.layers and tokenizer.encode("a")


def test_what_is_no_model(model: Path) -> None:
    with pytest.raises(InputError, match=r"model is '.*config.json', a file; give the folder of a model"):
        model_files.load(str(model / "config.json"), False)
    with pytest.raises(InputError, match="model is 'no such!', which is no folder here and no name on Hugging Face"):
        model_files.load("no such!", False)
