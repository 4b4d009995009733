"""The Adam and AdamW update as pure functions of arrays.

With gradient ``g``, moments ``m`` and ``v``, learning rate ``a``, decay ``w`` and step ``t`` (1 at the first update)::

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - a (m / c1) / (sqrt(v / c2) + eps) - a w p        c1 = 1 - b1^t,  c2 = 1 - b2^t

or ``c1 = c2 = 1`` without bias correction. Sources: Kingma and Ba, ICLR 2015 (arXiv 1412.6980); Loshchilov and Hutter,
ICLR 2019 (arXiv 1711.05101). All arithmetic is float32, for every stored dtype. In bfloat16 ``b2 = 0.999`` and
``1 - a w`` would both be 1, so neither the second moment nor the weights would decay. In float16 ``eps`` would be 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx


class Coefficients(NamedTuple):
    """The scalars of a step for the elementwise update: 0-d float32 arrays, the same for all leaves of a group."""

    step_size: mx.array  # a sqrt(c2) / c1
    eps: mx.array  # eps sqrt(c2)
    decay: mx.array | None  # a w; None without weight decay
    clip: mx.array | None  # the factor of the gradient; None without clipping
    clip_v: mx.array | None  # (1 - b2) clip
    counts: mx.array | None = None  # whether the gradient counts (False: it counts as 0); None: it counts


def coefficients(
    step: mx.array,
    learning_rate: mx.array,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    weight_decay: float = 0.0,
    clip: mx.array | None = None,
    counts: mx.array | None = None,
) -> Coefficients:
    """The scalar part of the update for ``step`` (1 at the first update, any integer dtype).

    The bias correction is folded into the step size and eps by ``(m / c1) / (sqrt(v / c2) + eps) =
    (sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2))``, which keeps it out of the elementwise kernel.

    >>> c = coefficients(mx.array(1), mx.array(0.1), (0.9, 0.999), 1e-8, True, 0.01)
    >>> [f"{x.item():.4g}" for x in c[:3]]
    ['0.03162', '3.162e-10', '0.001']
    """
    learning_rate = learning_rate.astype(mx.float32)
    step_size, denominator = learning_rate, mx.array(eps, mx.float32)
    if bias_correction:
        c1, c2 = (_one_minus_power(beta, step) for beta in betas)
        root = mx.sqrt(c2)
        step_size, denominator = learning_rate * root / c1, eps * root
    return Coefficients(
        step_size,
        denominator,
        learning_rate * weight_decay if weight_decay else None,
        clip,
        None if clip is None else (1 - betas[1]) * clip,
        counts,
    )


def _one_minus_power(beta: float, step: mx.array) -> mx.array:
    """``1 - beta^step`` without cancellation, which in float32 would leave 4 digits of ``1 - 0.999^1``."""
    if beta == 0.0:
        return mx.array(1.0, mx.float32)
    return -mx.expm1(step.astype(mx.float32) * math.log(beta))


def next_moments(
    gradient: mx.array, m: mx.array, v: mx.array, c: Coefficients, betas: tuple[float, float]
) -> tuple[mx.array, mx.array]:
    """The new ``m`` and ``v``, float32. The gradient may have any float dtype, and has the shape of the moments."""
    b1, b2 = betas
    g = gradient.astype(mx.float32)
    if c.counts is not None:
        g = mx.where(c.counts, g, 0.0)  # not a product with 0: the gradient may be NaN
    if c.clip is None or c.clip_v is None:
        return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * mx.square(g)
    clipped = c.clip * g
    # Not (1 - b2) clipped^2: that is one level deeper. Not (1 - b2) clip^2 g^2: g^2 overflows for large gradients.
    return b1 * m + (1 - b1) * clipped, b2 * v + clipped * (c.clip_v * g)


def next_weight(p: mx.array, m: mx.array, root: mx.array, c: Coefficients, coarse: bool = False) -> mx.array:
    """The new value of one parameter, float32, from its new first moment and the ``root`` of the second.

    The decay is added to the change, not multiplied into the parameter as ``p (1 - a w)``: the factor ``1 - a w`` has
    the same rounding error at every step, and the errors would add up. MLX fuses at most eleven levels of a graph.
    Clipping, a cast in, a select and a cast out use all of them. ``coarse`` saves one level and costs a second float32
    rounding. It is for weights that are rounded to half precision right after.
    """
    change = c.step_size * m / (root + c.eps)
    if c.decay is None:
        return p - change
    return (p - c.decay * p) - change if coarse else p - (change + c.decay * p)
