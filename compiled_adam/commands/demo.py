"""``compiled-adam demo``: the main job from nothing, without a network.

A small language model is made and trained a little. Then it is fine-tuned on text that it has not seen, mlx-lm's own
manuals, which every install has: with LoRA, and in full in bfloat16, by stock AdamW and by ours.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import get_total_parameters, load
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .. import schedulers
from ..base import InputError
from ..finetune.console import TrainingProgress
from ..finetune.names import WEIGHTS
from ..finetune.trainer import train
from ..optimizers import AdamW
from ..step import losses, make_step

MARKER = ".compiled-adam-demo"
LAYERS, VOCABULARY, PIECE = 4, 512, 200  # a piece is one example, in characters
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
# One of the usual learning rates for full fine-tuning. In bfloat16 most of its updates are below half the spacing of
# the numbers at the weight, 2^-9 of it, and vanish when the sum is rounded.
FULL_RATE = 5e-5
CONTENDERS = {
    "float32   compiled_adam.AdamW": (mx.float32, AdamW),
    "bfloat16  mlx.optimizers.AdamW": (mx.bfloat16, optim.AdamW),
    "bfloat16  compiled_adam.AdamW": (mx.bfloat16, AdamW),
}


class Losses(NamedTuple):
    """Validation losses of one fine-tuning."""

    before: float
    after: float


def run(folder: Path, pretraining: int = 100, iterations: int = 100, seed: int = 0) -> Losses:
    """Writes ``folder``/model and ``folder``/adapters; returns the validation losses of the fine-tuning with LoRA.

    Raises ValueError for a folder that holds something else, and for too few iterations.
    """
    for name, value in (("pretraining", pretraining), ("iters", iterations)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must be in 0 to {2**32 - 1}")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise InputError(f"{folder} exists and is not a demo's folder; name another one with --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    console = Console(soft_wrap=True, highlight=False)
    mx.random.seed(seed)
    np.random.seed(seed)

    name, topic, general = texts()
    make_model(folder / "model", general + topic)
    model, tokenizer, *_ = load(str(folder / "model"))
    pieces = _pieces(topic)
    train_set = _dataset([piece for i, piece in enumerate(pieces) if i % 5], tokenizer)
    valid_set = _dataset(pieces[::5], tokenizer)
    console.print(
        f"1. a Llama of {get_total_parameters(model):,} parameters learns from {len(general):,} characters of manuals"
    )
    _pretrain(model, _dataset(_pieces(general), tokenizer), pretraining)
    _save_weights(model, folder / "model")
    console.print(f"2. LoRA fine-tuning on {len(train_set)} pieces of {name}, validated on the {len(valid_set)} others")
    found = _fine_tune(model, train_set, valid_set, iterations, folder)
    console.print(f"validation loss {found.before:.4f} -> {found.after:.4f}")
    console.print(
        f"3. full fine-tuning of the same model on the same pieces, in {iterations} updates at a learning rate of"
        f" {FULL_RATE:g}: in bfloat16, most updates of stock AdamW are too small for a weight to change"
    )
    compare(folder / "model", train_set, valid_set, iterations, seed)
    adapters = folder / "adapters"
    model_flags = f"--model {shlex.quote(str(folder / 'model'))} --adapter-path {shlex.quote(str(adapters))}"
    console.print(f"adapters in {adapters}; try them with", markup=False)
    console.print(f"  mlx_lm.generate {model_flags} --prompt 'To fine-tune' -m 40", markup=False)
    return found


def _fine_tune(model: nn.Module, train_set: Any, valid_set: Any, iterations: int, folder: Path) -> Losses:
    """Trains LoRA adapters, and writes them to ``folder``/adapters."""
    model.freeze()
    linear_to_lora_layers(model, LAYERS, LORA)
    before = _validation_loss(model, valid_set)
    train(
        model,
        AdamW(schedulers.cosine(1e-3, iterations, warmup=iterations // 10), bias_correction=True),
        train_set,
        args=TrainingArgs(
            batch_size=4,
            iters=iterations,
            steps_per_report=max(1, iterations // 10),
            steps_per_save=iterations + 1,
            adapter_file=str(folder / "adapters" / WEIGHTS),
        ),
        adapter_config={
            "fine_tune_type": "lora",
            "num_layers": LAYERS,
            "lora_parameters": LORA,
            "model": str(folder / "model"),
        },
    )
    return Losses(before, _validation_loss(model, valid_set))


def compare(model: Path, train_set: Any, valid_set: Any, updates: int, seed: int) -> dict[str, Losses]:
    """Fine-tunes all weights of the model in the folder ``model`` with each of the `CONTENDERS`, on the same batches.

    The one in float32 is the reference. Nothing is written.
    """
    results = {}
    with TrainingProgress(len(CONTENDERS) * updates) as progress:
        for name, (dtype, optimizer) in CONTENDERS.items():
            network, *_ = load(str(model))
            network.set_dtype(mx.bfloat16)  # all begin with the same weights
            network.set_dtype(dtype)
            before = _validation_loss(network, valid_set)
            network.train()
            np.random.seed(seed)  # the order of the batches
            step = make_step(network, losses.next_token, optimizer(FULL_RATE, bias_correction=True), weighted=True)
            batches = iterate_batches(train_set, batch_size=1, max_seq_length=256, loop=True)
            for _, batch in zip(range(updates), batches, strict=False):
                step(*batch)
                progress.advance()
            results[name] = Losses(before, _validation_loss(network, valid_set))
            progress.line(f"{name:<32}validation loss {before:.4f} -> {results[name].after:.4f}")
    return results


def texts(most: int = 15_000) -> tuple[str, str, str]:
    """The name and text of the largest of mlx-lm's manuals, and the text of the others, of ``most`` characters each.

    The wheel of mlx-lm 0.31, the last for Python 3.10, has no manuals; there its own source is the text.
    """
    folder = Path(mlx_lm.__file__).parent
    files = sorted(folder.glob("*.md")) or sorted(folder.glob("*.py"))
    topic = max(files, key=lambda file: file.stat().st_size)
    general = "".join(file.read_text(encoding="utf-8") for file in files if file != topic)
    return topic.name, topic.read_text(encoding="utf-8")[:most], general[:most]


def make_model(folder: Path, text: str) -> None:
    """A byte-level BPE tokenizer trained on ``text`` and a Llama with random weights, as files that mlx-lm loads."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _save_weights(llama.Model(llama.ModelArgs.from_dict(CONFIG)), folder)


def _save_weights(model: nn.Module, folder: Path) -> None:
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )


def _pieces(text: str) -> list[str]:
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def _dataset(texts: list[str], tokenizer: Any) -> CacheDataset:
    return CacheDataset(TextDataset([{"text": text} for text in texts], tokenizer))


def _pretrain(model: nn.Module, dataset: Any, iterations: int) -> None:
    learning_rate = schedulers.cosine(5e-3, iterations + 1, warmup=iterations // 10)
    step = make_step(model, losses.next_token, AdamW(learning_rate, bias_correction=True), weighted=True)
    batches = iterate_batches(dataset, batch_size=4, max_seq_length=256, loop=True)
    with TrainingProgress(iterations) as progress:
        for iteration, batch in zip(range(1, iterations + 1), batches, strict=False):
            result = step(*batch)
            progress.advance()
            if iteration == 1 or iteration % max(1, iterations // 4) == 0:
                progress.line(f"iter {iteration:>5}  loss {result.loss.item():.4f}")


def _validation_loss(model: nn.Module, dataset: Any) -> float:
    return evaluate(model, dataset, batch_size=4, num_batches=-1, loss=losses.next_token)
