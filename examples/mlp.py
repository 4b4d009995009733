"""A multilayer perceptron on synthetic data: `make_step` instead of a hand-written compiled step.

Shows the loss, the held-out accuracy, and that a second batch shape traces the gradient only, never the update.
"""

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn

STEPS = 300


def spirals(count: int, key: mx.array) -> tuple[mx.array, mx.array]:
    """Points on two spirals, and which of the two each is on."""
    first, second = mx.random.split(key)
    label = mx.arange(count) % 2
    radius = mx.random.uniform(0.2, 1.0, (count,), key=first)
    angle = 6.0 * radius + mx.pi * label
    points = mx.stack([radius * mx.cos(angle), radius * mx.sin(angle)], axis=1)
    return points + 0.03 * mx.random.normal(points.shape, key=second), label


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


mx.random.seed(0)
model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
schedule = ca.schedulers.cosine(1e-2, STEPS, warmup=30)
optimizer = ca.AdamW(schedule, weight_decay=0.01, bias_correction=True, max_grad_norm=1.0, skip_nonfinite=True)
step = ca.make_step(model, loss_fn, optimizer)

for i in range(STEPS):
    rows = 64 if i % 10 else 128  # two batch shapes: two gradient traces, one update trace
    result = step(*spirals(rows, mx.random.key(i)))
    if i % 50 == 49:
        print(f"update {i + 1:>4}  loss {result.loss.item():.4f}  gradient norm {result.grad_norm.item():.3f}")

x, y = spirals(1000, mx.random.key(STEPS))
accuracy = (model(x).argmax(axis=1) == y).astype(mx.float32).mean().item()
print(f"accuracy {accuracy:.3f}  traces {step.traces}  updates skipped {optimizer.skipped.item()}")
