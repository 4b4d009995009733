"""Data parallel training by hand: every process takes its part of a batch, gradients are averaged, ours updates.

Run it with `mlx.launch -n 2 python examples/two_processes.py`, or without mlx.launch: the weights are the same.
"""

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn

STEPS, ROWS = 50, 32


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), y)


def train(steps: int, rank: int, size: int) -> tuple[nn.Module, float]:
    mx.random.seed(0)  # the same weights everywhere
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    # Clipping sees the averaged gradients, so it is the same everywhere too.
    optimizer = ca.AdamW(ca.schedulers.linear(1e-2, STEPS), bias_correction=True, max_grad_norm=1.0)
    loss_and_gradients = nn.value_and_grad(model, loss_fn)
    for i in range(steps):
        x = mx.random.normal((ROWS, 8), key=mx.random.key(i))
        part = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
        loss, gradients = loss_and_gradients(model, x[part], x[part].sum(axis=1, keepdims=True))
        if size > 1:
            gradients = nn.average_gradients(gradients)
            loss = mx.distributed.all_sum(loss) / size
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
    return model, loss.item()


group = mx.distributed.init()
rank, size = group.rank(), group.size()
if rank == 0:
    train(1, 0, 1)  # one process builds the kernels, for MLX does not lock the folder that all processes take them from
mx.eval(mx.distributed.all_sum(mx.array(1)))  # and the others wait
model, loss = train(STEPS, rank, size)
total = sum(mx.abs(layer.weight).sum().item() for layer in (model.layers[0], model.layers[2]))
print(f"process {rank} of {size}: loss {loss:.6f}, sum of the weights' sizes {total:.4f}", flush=True)
