"""LoRA on a tiny Llama made on the spot: mlx-lm's model and data sets, our `train`; see `compiled-adam lora`."""

import tempfile
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import numpy as np
from compiled_adam.commands.small_model import make_model, texts
from mlx.utils import tree_flatten
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

ITERATIONS = 40


class Losses(TrainingCallback):
    """Keeps what mlx-lm's trainer reports, and so does ours."""

    def __init__(self) -> None:
        self.validation: list[float] = []

    def on_val_loss_report(self, val_info: dict) -> None:
        self.validation.append(val_info["val_loss"])


losses = Losses()
mx.random.seed(0)
np.random.seed(0)  # mlx-lm shuffles the batches with it
name, text, _ = texts()
with tempfile.TemporaryDirectory() as folder:
    make_model(Path(folder) / "model", text)
    model, tokenizer, *_ = load(f"{folder}/model")
    pieces = [{"text": text[i : i + 100]} for i in range(0, 8000, 100)]
    train_set, valid_set = (CacheDataset(TextDataset(part, tokenizer)) for part in (pieces[8:], pieces[:8]))

    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 8, "dropout": 0.0, "scale": 20.0})
    count = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    print(f"LoRA on {name}: {count:,} trainable parameters")
    ca.train(
        model,
        ca.AdamW(ca.schedulers.cosine(3e-3, ITERATIONS, warmup=4), bias_correction=True, max_grad_norm=1.0),
        train_set,
        valid_set,
        TrainingArgs(
            batch_size=2,
            iters=ITERATIONS,
            val_batches=-1,
            steps_per_report=20,
            adapter_file=f"{folder}/adapters/adapters.safetensors",
        ),
        training_callback=losses,
    )
print(f"validation loss {losses.validation[0]:.4f} -> {losses.validation[-1]:.4f}")
