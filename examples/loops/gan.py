"""A GAN: a generator and a discriminator that train each other, each with an optimizer of its own.

A step uses the present weights of the other model, although it is compiled. 8 lines differ from the plain MLX loop.
Each says after "MLX:" what stands there instead.
"""

import compiled_adam as ca  # MLX:
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

STEPS, ROWS, NOISE = 200, 32, 4


def network(inputs: int, outputs: int, width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )


def real_points(key: mx.array) -> mx.array:
    """Points on a ring of radius 1."""
    angle = mx.random.uniform(0, 2 * mx.pi, (ROWS,), key=key)
    return mx.stack([mx.cos(angle), mx.sin(angle)], axis=1)


def error(model: nn.Module, points: mx.array, label: float) -> mx.array:
    logits = model(points).squeeze(1)
    return nn.losses.binary_cross_entropy(logits, mx.full((ROWS,), label))


def judge_loss(model: nn.Module, points: mx.array, noise: mx.array) -> mx.array:
    return error(model, points, 1.0) + error(model, generator(noise), 0.0)


def fool_loss(model: nn.Module, noise: mx.array) -> mx.array:
    return error(discriminator, model(noise), 1.0)


mx.random.seed(0)
generator, discriminator = network(NOISE, 2), network(2, 1)
slow, fast = optim.Adam(1e-3, betas=[0.5, 0.9]), optim.Adam(2e-3, betas=[0.5, 0.9])
generate = ca.make_step(generator, fool_loss, slow)  # MLX: generate = nn.value_and_grad(generator, fool_loss)
judge = ca.make_step(discriminator, judge_loss, fast)  # MLX: judge = nn.value_and_grad(discriminator, judge_loss)
for i in range(STEPS):
    noise, again = (mx.random.normal((ROWS, NOISE)) for _ in range(2))
    points = real_points(mx.random.key(i))
    (judged,) = judge(points, noise)  # MLX: judged, gradients = judge(discriminator, points, noise)
    # MLX: fast.update(discriminator, gradients)
    (fooled,) = generate(again)  # MLX: fooled, gradients = generate(generator, again)
    # MLX: slow.update(generator, gradients)
    # MLX: mx.eval(generator.parameters(), discriminator.parameters(), slow.state, fast.state)
    if i % 50 == 49:
        points = generator(mx.random.normal((500, NOISE), key=mx.random.key(1)))
        radius = mx.linalg.norm(points, axis=1).mean().item()
        print(f"update {i + 1:>3}  loss {judged.item():.3f}  fooled {fooled.item():.3f}  radius {radius:.3f}")
