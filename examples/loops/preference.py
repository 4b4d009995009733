"""Preference training (DPO): a frozen reference model, and a loss function that returns four values.

5 lines differ from the plain MLX loop. Each says after "MLX:" what stands there instead.
"""

import compiled_adam as ca  # MLX:
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

STEPS, WORDS, LENGTH, BETA = 40, 12, 8, 0.1


class Model(nn.Module):
    """A small language model: the next word follows from the mean of the words so far and the last one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.hidden, self.head = nn.Linear(2 * width, width), nn.Linear(width, WORDS)

    def __call__(self, words: mx.array) -> mx.array:
        x = self.embedding(words)
        mean = x.cumsum(axis=1) / mx.arange(1, words.shape[1] + 1)[:, None]
        return self.head(nn.gelu(self.hidden(mx.concatenate([x, mean], axis=-1))))

    def log_probability(self, words: mx.array) -> mx.array:
        return -nn.losses.cross_entropy(self(words[:, :-1]), words[:, 1:], reduction="none").sum(axis=1)


def pairs(key: mx.array, rows: int = 16) -> tuple[mx.array, mx.array]:
    """People prefer texts with even words only."""
    words = mx.random.randint(0, WORDS, (rows, LENGTH), key=key)
    return words // 2 * 2, words


def loss_fn(model: Model, chosen: mx.array, rejected: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    better, worse = (
        BETA * (model.log_probability(words) - reference.log_probability(words)) for words in (chosen, rejected)
    )
    return -nn.log_sigmoid(better - worse).mean(), better.mean(), worse.mean(), (better > worse).mean()


mx.random.seed(0)
model, reference = Model(), Model()
reference.update(model.parameters())  # the same weights; training replaces those of the model only
reference.freeze()
optimizer = optim.Adam(1e-3)
step = ca.make_step(model, loss_fn, optimizer)  # MLX: step = nn.value_and_grad(model, loss_fn)
for i in range(STEPS):
    batch = pairs(mx.random.key(i))
    loss, *rewards, accuracy = step(*batch)  # MLX: (loss, *rewards, accuracy), gradients = step(model, *batch)
    # MLX: optimizer.update(model, gradients)
    # MLX: mx.eval(model.parameters(), optimizer.state)
    if i % 10 == 9:
        margin = (rewards[0] - rewards[1]).item()
        print(f"update {i + 1:>3}  loss {loss.item():.4f}  margin {margin:.3f}  accuracy {accuracy.item():.3f}")
