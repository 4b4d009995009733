"""The Adam and AdamW update as pure functions of arrays.

With gradient ``g``, moments ``m`` and ``v``, learning rate ``a``, decay ``w`` and step ``t`` (1 at the first update)::

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - a (m / c1) / (sqrt(v / c2) + eps) - a w p        c1 = 1 - b1^t,  c2 = 1 - b2^t

or ``c1 = c2 = 1`` without bias correction. Kingma and Ba, ICLR 2015 (arXiv 1412.6980); Loshchilov and Hutter,
ICLR 2019 (arXiv 1711.05101). Everything is computed in float32, whatever is stored: in bfloat16 ``b2 = 0.999``
and ``1 - a w`` are both 1, so the second moment never decays and the weights never do; in float16 ``eps`` is 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx


class Coefficients(NamedTuple):
    """What the elementwise update needs to know of a step: three 0-d float32 arrays, the same for all parameters."""

    step_size: mx.array  # a sqrt(c2) / c1
    eps: mx.array  # eps sqrt(c2)
    decay: mx.array  # a w


def coefficients(
    step: mx.array,
    learning_rate: mx.array,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
) -> Coefficients:
    """The scalar part of the update for ``step`` (1 at the first update; any integer dtype).

    The bias correction is folded into the step size and eps by ``(m / c1) / (sqrt(v / c2) + eps) =
    (sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2))``, which keeps it out of the elementwise kernel.

    >>> c = coefficients(mx.array(1), mx.array(0.1), (0.9, 0.999), 1e-8, 0.01, bias_correction=True)
    >>> [f"{x.item():.4g}" for x in c]
    ['0.03162', '3.162e-10', '0.001']
    """
    learning_rate = learning_rate.astype(mx.float32)
    if bias_correction:
        c1, c2 = (_one_minus_power(beta, step) for beta in betas)
        root = mx.sqrt(c2)
        scalars = [learning_rate * root / c1, eps * root, learning_rate * weight_decay]
    else:
        scalars = [learning_rate, mx.array(eps, mx.float32), learning_rate * weight_decay]
    # A chain of scalars with a single consumer would be fused into that consumer's kernel and be computed once
    # per element (two expm1 calls each). `depends` is not fusable, so the chain ends here.
    return Coefficients(*mx.depends(scalars, [step]))


def _one_minus_power(beta: float, step: mx.array) -> mx.array:
    """``1 - beta^step`` without the cancellation that leaves 4 digits of ``1 - 0.999^1`` in float32."""
    if beta == 0.0:
        return mx.array(1.0, mx.float32)
    return -mx.expm1(step.astype(mx.float32) * math.log(beta))


def adam(
    parameter: mx.array,
    gradient: mx.array,
    m: mx.array,
    v: mx.array,
    c: Coefficients,
    betas: tuple[float, float],
) -> tuple[mx.array, mx.array, mx.array]:
    """One update of one parameter: the new parameter (same dtype) and the new moments (float32).

    All four arrays have the parameter's shape; ``parameter`` and ``gradient`` may be of any float dtype. The
    decay is added to the update rather than multiplied into the parameter as ``p (1 - a w)``: ``1 - a w``
    rounds the same way at every step, and that error would accumulate.
    """
    b1, b2 = betas
    g = gradient.astype(mx.float32)
    p = parameter.astype(mx.float32)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * mx.square(g)
    p = p - (c.step_size * m / (mx.sqrt(v) + c.eps) + c.decay * p)
    return p.astype(parameter.dtype), m, v


def global_norm(gradients: list[mx.array]) -> mx.array:
    """The Euclidean norm over all gradients together, in float32: a 0-d array, 0 for an empty list.

    >>> global_norm([mx.array([3.0]), mx.array(4.0, mx.float16)]).item()
    5.0
    """
    squares = [mx.square(g.astype(mx.float32)).sum() for g in gradients]
    return mx.sqrt(mx.stack(squares).sum()) if squares else mx.array(0.0)
