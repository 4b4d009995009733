"""Loss functions for language models. They return the mean over the predicted tokens and the number of these tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cross_entropy import cross_entropy as cross_entropy
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy


def next_token(
    model: Any, tokens: mx.array, lengths: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The mean cross entropy of the target tokens, each predicted from the tokens before it.

    ``-sum log softmax(logits)[target] / targets`` in float32. It takes the arguments of
    ``mlx_lm.tuner.trainer.default_loss``. The only difference: mlx-lm's loss also trains the first token of the padding
    after each example.

    Args:
        model: ``model(tokens)`` returns logits of shape (batch, length, vocabulary).
        tokens: int32, (batch, length), padded at the end with any tokens.
        lengths: int32, (batch, 2): ``offset`` and ``end`` of each example. The targets are the tokens at ``offset``,
            ..., ``end - 1``, without the token at 0, because no token comes before it. There is no target if ``offset``
            is at least ``end``.
        mask: bool, (batch, length): which of these targets are trained. Default None: all.

    Returns:
        The loss and the number of targets, 0-d arrays. Without any target both are 0, and the gradient is 0.

    >>> uniform = lambda tokens: mx.zeros((*tokens.shape, 8))
    >>> loss, targets = next_token(uniform, mx.array([[5, 6, 7, 0, 0]]), mx.array([[0, 3]]))
    >>> targets.item(), round(loss.item(), 4)  # 6 and 7, and log(8)
    (2, 2.0794)
    """
    trained = trained_targets(tokens, lengths, mask)
    targets = trained.sum()
    # `where` and not a product: the loss of the padding must not count even if it is not a number.
    losses = mx.where(trained, cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]), 0.0)
    return losses.sum() / mx.maximum(targets, 1), targets


def like_mlx_lm(
    model: Any, tokens: mx.array, lengths: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """`next_token` as ``mlx_lm.tuner.trainer.default_loss`` computes it, for comparisons with mlx-lm.

    The first token of the padding after an example is a target, too, and the cross entropy has the dtype of the logits
    until it is summed. But a batch without any target has the loss 0, where mlx-lm divides 0 by 0.

    Args:
        model, tokens, lengths, mask: as in `next_token`. With a mask, which mlx-lm does not know, no padding is a
            target.

    Returns:
        The loss and the number of targets, 0-d arrays.

    >>> uniform = lambda tokens: mx.zeros((*tokens.shape, 8))
    >>> like_mlx_lm(uniform, mx.array([[5, 6, 7, 0, 0]]), mx.array([[0, 3]]))[1].item()  # 6, 7, and the 0 after them
    3
    """
    positions = mx.arange(1, tokens.shape[1])
    trained = (positions >= lengths[:, 0:1]) & (positions <= lengths[:, 1:])
    if mask is not None:
        trained = trained & mask[:, 1:]
    targets = trained.sum()
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * trained
    return losses.astype(mx.float32).sum() / mx.maximum(targets, 1), targets


def trained_targets(tokens: mx.array, lengths: mx.array, mask: mx.array | None = None) -> mx.array:
    """Which of ``tokens[:, 1:]`` are targets, by the arguments of `next_token`: bool, (batch, length - 1)."""
    positions = mx.arange(1, tokens.shape[1])
    trained = (positions >= lengths[:, 0:1]) & (positions < lengths[:, 1:])
    return trained if mask is None else trained & mask[:, 1:]
