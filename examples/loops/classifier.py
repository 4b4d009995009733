"""A classifier with batches in dictionaries of NumPy arrays, as data loaders give them, and results in a dictionary.

6 lines differ from the plain MLX loop. Each says after "MLX:" what stands there instead.
"""

from collections.abc import Iterator

import compiled_adam as ca  # MLX:
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

STEPS, CLASSES = 60, 5


def batches(seed: int, rows: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Points around the corners of a pentagon; the last batch of ten has fewer rows, as at the end of an epoch."""
    random = np.random.default_rng(seed)
    for i in range(STEPS):
        label = random.integers(CLASSES, size=rows if i % 10 != 9 else rows // 2)
        angle = 2 * np.pi * label / CLASSES
        centres = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        yield {"points": centres + 0.2 * random.normal(size=centres.shape), "label": label}


def loss_fn(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
    logits = model(batch["points"])
    loss = nn.losses.cross_entropy(logits, batch["label"], reduction="mean")
    right = logits.argmax(axis=1) == batch["label"]
    return loss, {"accuracy": right.mean(), "confidence": mx.softmax(logits, axis=1).max(axis=1).mean()}


mx.random.seed(0)
model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, CLASSES))
optimizer = optim.SGD(optim.cosine_decay(0.3, STEPS), momentum=0.9)
step = ca.make_step(model, loss_fn, optimizer)  # MLX: step = nn.value_and_grad(model, loss_fn)
for i, batch in enumerate(batches(seed=0)):
    # MLX: batch = {name: mx.array(array) for name, array in batch.items()}
    loss, metrics = step(batch)  # MLX: (loss, metrics), gradients = step(model, batch)
    # MLX: optimizer.update(model, gradients)
    # MLX: mx.eval(model.parameters(), optimizer.state)
    if i % 20 == 19:
        print(f"update {i + 1:>3}  loss {loss.item():.4f}  accuracy {metrics['accuracy'].item():.3f}")
