"""A small convolutional network with batch normalisation: running statistics and `model.eval()` in a compiled step.

The forward pass assigns the running mean and variance; a step carries them along, as it does parameters.
"""

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn

STEPS, SIZE, CLASSES = 60, 10, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # No bias before a normalisation, which takes the mean off.
        self.convolutions = [nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 16, 3, stride=2, bias=False)]
        self.norms = [nn.BatchNorm(8), nn.BatchNorm(16)]
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, CLASSES)

    def __call__(self, x: mx.array) -> mx.array:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.relu(norm(convolution(x)))
        return self.head(self.dropout(x.mean(axis=(1, 2))))


def images(count: int, key: mx.array) -> tuple[mx.array, mx.array]:
    """Waves in one of four directions, with a random phase and noise."""
    first, second = mx.random.split(key)
    label = mx.arange(count) % CLASSES
    angle = label[:, None, None] * (mx.pi / CLASSES)
    rows, columns = mx.arange(SIZE)[None, :, None], mx.arange(SIZE)[None, None, :]
    phase = mx.random.uniform(0, 2 * mx.pi, (count, 1, 1), key=first)
    waves = mx.sin(1.5 * (rows * mx.sin(angle) + columns * mx.cos(angle)) + phase)
    return (waves + 0.5 * mx.random.normal(waves.shape, key=second))[..., None], label


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


mx.random.seed(0)
model = Net()
step = ca.make_step(model, loss_fn, ca.AdamW(1e-2, bias_correction=True, decay_filter=ca.decay_matrices))
for i in range(STEPS):
    result = step(*images(32, mx.random.key(i)))
    if i % 20 == 19:
        print(f"update {i + 1:>3}  loss {result.loss.item():.4f}")

model.eval()  # dropout off, running statistics in use
x, y = images(400, mx.random.key(STEPS))
accuracy = (model(x).argmax(axis=1) == y).astype(mx.float32).mean().item()
variance = model.norms[0].running_var.mean().item()
print(f"accuracy {accuracy:.3f}  running variance 1.000 -> {variance:.3f}")
