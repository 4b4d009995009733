"""Muon for the inner matrices and AdamW for the rest, in bfloat16: MLX alone, and one line more: `ca.Compensated`.

MLX's optimizers round to bfloat16, so updates below half its spacing vanish. `ca.Compensated` keeps them in 2 bytes a
weight. Both optimizers are one compiled graph.
"""

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

STEPS, RATE, WIDTH = 500, 2e-3, 48


def inner_matrix(path: str, parameter: mx.array) -> bool:
    return parameter.shape == (WIDTH, WIDTH)


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x).astype(mx.float32), mx.sin(2 * x).sum(axis=1, keepdims=True))


def train(compensated: bool) -> float:
    mx.random.seed(0)
    sizes = [(4, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    model = nn.Sequential(*[layer for size in sizes for layer in (nn.Linear(*size), nn.GELU())][:-1])
    model.set_dtype(mx.bfloat16)
    schedule = ca.schedulers.linear(RATE, STEPS)
    optimizer: optim.Optimizer = optim.MultiOptimizer([optim.Muon(schedule), optim.AdamW(schedule)], [inner_matrix])
    if compensated:
        optimizer = ca.Compensated(optimizer)
    step = ca.make_step(model, loss_fn, optimizer)
    for i in range(STEPS):
        loss = step(mx.random.normal((64, 4), key=mx.random.key(i)).astype(mx.bfloat16)).loss
    assert step.traces["update"] == 1
    return loss.item()


print(f"MLX alone       loss {train(compensated=False):.4f}")
print(f"ca.Compensated  loss {train(compensated=True):.4f}")
