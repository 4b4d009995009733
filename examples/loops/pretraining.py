"""Pretraining in bfloat16: Muon for the matrices and AdamW for the rest, accumulation, learning rates set by Python.

8 lines differ from the plain MLX loop. Each says after "MLX:" what stands there instead.
"""

import compiled_adam as ca  # MLX: import mlx.utils
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

STEPS, MICRO, WORDS, LENGTH = 30, 2, 16, 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiHeadAttention(width, 2), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        y = self.norm(x)
        x = x + self.attention(y, y, y, mask)
        return x + self.down(mx.square(nn.relu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = [Block(width), Block(width)]
        self.head = nn.Linear(width, WORDS, bias=False)

    def __call__(self, words: mx.array) -> mx.array:
        x = self.words(words) + self.places(mx.arange(words.shape[1]))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(words.shape[1], x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def texts(key: mx.array, rows: int = 8) -> mx.array:
    """Counting in steps of 1 to 3: the next word follows from the two before."""
    first, size = mx.random.split(key)
    start, by = mx.random.randint(0, WORDS, (rows, 1), key=first), mx.random.randint(1, 4, (rows, 1), key=size)
    return (start + by * mx.arange(LENGTH + 1)) % WORDS


def loss_fn(model: nn.Module, words: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(words[:, :-1]).astype(mx.float32), words[:, 1:], reduction="mean")


mx.random.seed(0)
model = Model()
model.set_dtype(mx.bfloat16)
muon = optim.Muon(0.02)  # in bfloat16 it rounds small updates away: ca.Compensated(optim.Muon(0.02)) does not
adamw = ca.AdamW(3e-3)  # MLX: adamw = optim.AdamW(3e-3)
optimizer = optim.MultiOptimizer([muon, adamw], [lambda path, p: path.startswith("blocks.") and p.ndim == 2])
step = ca.make_step(model, loss_fn, optimizer, accumulate=MICRO)  # MLX: step = nn.value_and_grad(model, loss_fn)
for i in range(STEPS):
    for part, peak in ((muon, 0.02), (adamw, 3e-3)):
        part.learning_rate = peak * min(1.0, (i + 1) / 10, 2 * (STEPS - i) / STEPS)
    # MLX: total = None
    for j in range(MICRO):
        words = texts(mx.random.key(MICRO * i + j))
        (loss,) = step(words)  # MLX: loss, gradients = step(model, words)
        # MLX: total = gradients if total is None else mlx.utils.tree_map(mx.add, total, gradients)
    # MLX: optimizer.update(model, mlx.utils.tree_map(lambda g: g / MICRO, total))
    # MLX: mx.eval(model.parameters(), optimizer.state)
    if i % 10 == 9:
        print(f"update {i + 1:>2}  loss {loss.item():.4f}")
