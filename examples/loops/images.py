"""Images that a thread loads and changes at random, while the step trains on earlier ones.

5 lines differ from the plain MLX loop. Each says after "MLX:" what stands there instead.
"""

import threading
from collections.abc import Iterable, Iterator
from queue import Queue

import compiled_adam as ca  # MLX:
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

STEPS, SIZE, CLASSES = 40, 10, 4
Batch = tuple[np.ndarray, np.ndarray]


def load(count: int, rows: int = 32) -> Iterator[Batch]:
    """Stripes in one of four directions, shifted and with noise: what would be read from files and augmented."""
    random = np.random.default_rng(0)  # of this thread alone
    y, x = np.mgrid[:SIZE, :SIZE]
    for _ in range(count):
        label = random.integers(CLASSES, size=rows)
        angle = np.pi / CLASSES * label[:, None, None]
        shift = random.uniform(0, 2 * np.pi, (rows, 1, 1))
        stripes = np.sin(1.5 * (y * np.sin(angle) + x * np.cos(angle)) + shift)
        yield (stripes + 0.5 * random.normal(size=stripes.shape))[..., None].astype(np.float32), label


def prefetched(batches: Iterable[Batch], ahead: int = 4) -> Iterator[Batch]:
    """The same batches, made by a thread that is at most so many batches ahead. Raises its errors."""
    queue: Queue[Batch | BaseException | None] = Queue(ahead)

    def work() -> None:
        try:
            for batch in batches:
                queue.put(batch)
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (batch := queue.get()) is not None:
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def loss_fn(model: nn.Module, images: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    logits = model(images).mean(axis=(1, 2))
    return nn.losses.cross_entropy(logits, labels, reduction="mean"), (logits.argmax(axis=1) == labels).mean()


mx.random.seed(0)
model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 4, 1))
optimizer = optim.AdamW(3e-3)
step = ca.make_step(model, loss_fn, optimizer)  # MLX: step = nn.value_and_grad(model, loss_fn)
for i, batch in enumerate(prefetched(load(STEPS))):
    loss, accuracy = step(*batch)  # MLX: (loss, accuracy), gradients = step(model, *map(mx.array, batch))
    # MLX: optimizer.update(model, gradients)
    # MLX: mx.eval(model.parameters(), optimizer.state)
    if i % 10 == 9:
        print(f"update {i + 1:>2}  loss {loss.item():.4f}  accuracy {accuracy.item():.3f}")
