"""Saving and resuming: a run that stops half-way and goes on in new objects ends with the same bits.

A checkpoint has the weights, the optimizer's state, the running statistics, a partly filled window and the random
state, which dropout needs. It appears whole or not at all, and a damaged one is refused.
"""

import tempfile
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

STEPS = 60


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), mx.sin(x).sum(axis=1, keepdims=True))


def fresh() -> ca.TrainStep:
    """What a script makes at its start, whether it begins or goes on."""
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1))
    schedule = ca.schedulers.cosine(1e-2, STEPS, warmup=6)
    # Micro-batches of two, of which a stop may see one.
    return ca.make_step(model, loss_fn, ca.AdamW(schedule, moments="bfloat16"), accumulate=2)


def train(step: ca.TrainStep, first: int, last: int) -> float:
    for i in range(first, last):
        loss = step(mx.random.normal((16, 4), key=mx.random.key(i))).loss
    return loss.item()


mx.random.seed(0)
whole = fresh()
with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "checkpoint"
    train(whole, 0, STEPS + 1)  # an odd number of micro-batches: the window is half full
    ca.save_checkpoint(checkpoint, whole, extra={"position": STEPS + 1})
    expected = train(whole, STEPS + 1, 2 * STEPS)
    print(f"without a stop  loss {expected:.6f}")

    mx.random.seed(12345)  # another process would have another random state
    again = fresh()
    position = ca.load_checkpoint(checkpoint, again)["position"]
    print(f"resumed         loss {train(again, position, 2 * STEPS):.6f}, from micro-batch {position}")

pairs = zip(tree_flatten(whole.state_dict()), tree_flatten(again.state_dict()), strict=True)
same = all(name == other and mx.array_equal(a, b).item() for (name, a), (other, b) in pairs)
print(f"every array of model, optimizer, window and random state is the same: {same}")
