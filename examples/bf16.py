"""A bfloat16 fine-tune with a small learning rate: stock AdamW, ours, and float32 for reference, side by side.

A network is trained in float32, converted, and fine-tuned on a function that differs a little. An update below half
the spacing of bfloat16, 2^-9 of a weight, vanishes when the weight is rounded; ours keeps it in a residual.
"""

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

STEPS, LEARNING_RATE = 1000, 3e-5


def batch(i: int, shift: float) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((64, 8), key=mx.random.key(i))
    return x, mx.sin(x[:, :4] + shift).sum(axis=1, keepdims=True)


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x.astype(model.layers[0].weight.dtype)).astype(mx.float32), y)


def fine_tune(weights: dict, dtype: mx.Dtype, optimizer: optim.Optimizer) -> tuple[float, float]:
    """The loss after fine-tuning, and how far the weights of the middle layer moved on average."""
    model.update(tree_map(lambda w: w.astype(dtype), weights))
    before = model.layers[2].weight.astype(mx.float32)
    step = ca.make_step(model, loss_fn, optimizer)
    for i in range(STEPS):
        step(*batch(i, shift=0.3))
    moved = mx.abs(model.layers[2].weight.astype(mx.float32) - before).mean().item()
    return loss_fn(model, *batch(10**6, shift=0.3)).item(), moved


mx.random.seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
pretraining = ca.make_step(model, loss_fn, ca.AdamW(ca.schedulers.cosine(1e-2, 400), bias_correction=True))
for i in range(400):
    pretraining(*batch(i, shift=0.0))
weights = tree_map(lambda w: w.astype(mx.bfloat16), model.parameters())  # all three begin with the same
model.update(weights)
print(f"before fine-tuning         loss {loss_fn(model, *batch(10**6, shift=0.3)).item():.4f}")
for name, dtype, kind in (
    ("float32, ours", mx.float32, ca.AdamW),
    ("bfloat16, mlx.optimizers", mx.bfloat16, optim.AdamW),
    ("bfloat16, ours", mx.bfloat16, ca.AdamW),
):
    loss, moved = fine_tune(weights, dtype, kind(LEARNING_RATE, bias_correction=True))
    print(f"{name:<25}  loss {loss:.4f}  weights moved by {moved:.6f}")
