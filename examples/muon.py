"""Two optimizers in one compiled step: MLX's Muon for the matrices, AdamW for everything else.

`MultiOptimizer` sends each parameter to the first optimizer whose filter takes it; the last one takes the rest.
"""

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

STEPS = 150


class Net(nn.Module):
    """Learns a table: the answer to each pair of symbols."""

    def __init__(self, symbols: int = 16, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.layers = [nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, 2 * width)]
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, symbols)

    def __call__(self, pairs: mx.array) -> mx.array:
        x = self.embedding(pairs).flatten(1)
        for layer in self.layers:
            x = x + nn.gelu(layer(x))
        return self.head(self.norm(x))


def hidden_matrix(path: str, parameter: mx.array) -> bool:
    return path.startswith("layers.") and parameter.ndim == 2


def loss_fn(model: nn.Module, pairs: mx.array) -> mx.array:
    answer = mx.maximum(pairs[:, 0], pairs[:, 1])  # what is to be learnt
    return nn.losses.cross_entropy(model(pairs), answer, reduction="mean")


def train(optimizer: optim.Optimizer) -> float:
    mx.random.seed(0)
    step = ca.make_step(Net(), loss_fn, optimizer)
    for i in range(STEPS):
        loss = step(mx.random.randint(0, 16, (64, 2), key=mx.random.key(i))).loss
    assert step.traces["update"] == 1  # both optimizers are one graph
    return loss.item()


both = optim.MultiOptimizer(
    [optim.Muon(ca.schedulers.linear(2e-2, STEPS)), ca.AdamW(3e-3, bias_correction=True)], [hidden_matrix]
)
print(f"AdamW alone     loss {train(ca.AdamW(3e-3, bias_correction=True)):.4f}")
print(f"Muon and AdamW  loss {train(both):.4f}")
