"""Cross entropy of a language model's head, in chunks of rows: the logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..base import InputError, Places
from .cross_entropy import cross_entropy, kept_cross_entropy
from .held import trainable_of

Head = Callable[[mx.array], mx.array]
# Of the logits of a chunk, in float32. MLX allocates the results of operations some time before it runs them, so that
# about eleven such arrays exist at once on a CPU. Half of it would take 7 % more time, to read the head more often.
CHUNK_BYTES = 32 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """The rows of a chunk: as many as have 32 MiB of logits in float32, a multiple of 64 from 64 to 1024.

    >>> [chunk_rows(vocabulary) for vocabulary in (1_000, 32_000, 128_256, 262_144)]
    [1024, 256, 64, 64]
    """
    return max(64, min(1024, CHUNK_BYTES // (4 * vocabulary) // 64 * 64))


def linear_cross_entropy(
    hidden: mx.array,
    head: Head,
    targets: mx.array,
    mask: mx.array | None = None,
    *,
    rows: int | None = None,
    ahead: bool = True,
) -> tuple[mx.array, mx.array]:
    """The mean cross entropy of ``head(hidden)``, without the memory for all of its logits.

    ``-sum log softmax(head(hidden))[target] / targets`` in float32, where the mask is true. The head is applied to a
    chunk of rows at a time. The gradient of a chunk is computed right after its loss, and its logits are gone before
    the next chunk begins.

    Args:
        hidden: (..., width), what the head gets; float32, float16 or bfloat16.
        head: ``head(rows)`` returns the logits (rows, vocabulary) of (rows, width): an ``nn.Linear``, an
            ``nn.QuantizedLinear``, ``embedding.as_linear``, or a function that also scales or caps. It treats every row
            alike. The trainable parameters of modules that it is, or refers to, get their gradients; these are summed
            over the chunks in float32.
        targets: int32 or another integer, the shape of ``hidden`` without its last axis.
        mask: bool, the shape of ``targets``: the targets that count. Default None: all. Rows that do not count are
            computed too; leave them out of ``hidden`` to save their time.
        rows: the rows of a chunk. Default None: as many as have 32 MiB of logits in float32, from 64 to 1024.
        ahead: whether the gradient is computed with the loss. Default True. If False, the gradient computes the logits
            once more, and a loss without a gradient, as in a validation, takes half the time.

    Returns:
        The loss and the number of targets, 0-d arrays. Without any target both are 0, and the gradient is 0.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, ``rows`` below 1, or a head that refers to an array
            that is not evaluated and belongs to no module, and so would get no gradient.

    >>> hidden, head = mx.zeros((2, 3, 4)), lambda rows: mx.concatenate([rows, rows], axis=1)
    >>> loss, targets = linear_cross_entropy(hidden, head, mx.zeros((2, 3), mx.int32))
    >>> targets.item(), round(loss.item(), 4)  # log(8)
    (6, 2.0794)
    """
    _check(hidden, targets, mask, rows)
    width = hidden.shape[-1]
    parameters, sample = trainable_of(head, mx.zeros((1, width), hidden.dtype))
    chunks = _Chunks(
        head,
        parameters,
        targets.reshape(-1),
        mx.ones(targets.size, mx.bool_) if mask is None else mask.reshape(-1),
        chunk_rows(sample.shape[-1]) if rows is None else rows,
    )
    total = (chunks.with_gradient if ahead else chunks.without_gradient)(hidden.reshape(-1, width))
    count = chunks.counts.sum()
    return total / mx.maximum(count, 1), count


class _Chunks:
    """The sum of the losses of all rows, chunk after chunk."""

    def __init__(self, head: Head, parameters: Places, targets: mx.array, counts: mx.array, rows: int) -> None:
        self.counts = counts
        self._head, self._parameters, self._targets, self._rows = head, parameters, targets, rows

    def with_gradient(self, hidden: mx.array) -> mx.array:
        """The sum; its gradient is computed now, and only scaled in the backward pass."""

        @mx.custom_function
        def forward(arrays: list[mx.array]) -> list[mx.array]:
            return self._gradient(arrays)

        @forward.vjp
        def backward(arrays: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
            return _scaled(outputs[1:], cotangents[0], arrays)

        results: Any = forward([hidden, *self._parameters.read()])
        return results[0]

    def without_gradient(self, hidden: mx.array) -> mx.array:
        """The sum; a backward pass computes the logits once more."""

        @mx.custom_function
        def forward(arrays: list[mx.array]) -> mx.array:
            total = mx.array(0.0)
            for start in self._starts():
                rows = _after(arrays[0][start : start + self._rows], [total])
                total = total + self._loss([rows, *arrays[1:]], start, cross_entropy)
            return total

        @forward.vjp
        def backward(arrays: list[mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
            return _scaled(self._gradient(arrays)[1:], cotangent, arrays)

        result: Any = forward([hidden, *self._parameters.read()])
        return result

    def _gradient(self, arrays: list[mx.array]) -> list[mx.array]:
        """The sum of the losses, and its gradients with respect to ``arrays``: hidden states and parameters."""
        hidden, *parameters = arrays
        total, pieces = mx.array(0.0), list[mx.array]()
        sums = [mx.zeros(array.shape, mx.float32) for array in parameters]
        for start in self._starts():
            # Without this, MLX may compute the logits of all chunks before it uses those of the first.
            rows = _after(hidden[start : start + self._rows], [total, *sums, *pieces[-1:]])
            loss, (piece, *more) = mx.value_and_grad(self._loss)([rows, *parameters], start)
            total = total + loss
            pieces.append(piece)
            sums = [one + another.astype(mx.float32) for one, another in zip(sums, more, strict=True)]
        return [total, mx.concatenate(pieces), *sums]

    def _loss(self, arrays: list[mx.array], start: int, of: Callable[..., mx.array] = kept_cross_entropy) -> mx.array:
        """The sum of the losses of the chunk that begins at row ``start``."""
        rows, *parameters = arrays
        chunk = slice(start, start + self._rows)
        before = self._parameters.read()
        try:
            self._parameters.write(parameters)
            logits = self._head(rows)
        finally:
            self._parameters.write(before)
        return mx.where(self.counts[chunk], of(logits, self._targets[chunk]), 0.0).sum()

    def _starts(self) -> range:
        return range(0, self._targets.size, self._rows)


def _after(array: mx.array, others: Sequence[mx.array]) -> mx.array:
    """``array``, but its value is available only when the others are computed."""
    return mx.depends([array], list(others))[0]


def _scaled(gradients: Sequence[mx.array], factor: mx.array, like: Sequence[mx.array]) -> list[mx.array]:
    return [(gradient * factor).astype(array.dtype) for gradient, array in zip(gradients, like, strict=True)]


def _check(hidden: mx.array, targets: mx.array, mask: mx.array | None, rows: int | None) -> None:
    if hidden.ndim < 1 or hidden.shape[:-1] != targets.shape:
        raise InputError(
            f"targets have the shape {targets.shape}; hidden is {hidden.shape}, so give targets of shape"
            f" {hidden.shape[:-1]}"
        )
    if mask is not None and (mask.shape != targets.shape or mask.dtype != mx.bool_):
        raise InputError(
            f"mask is {mask.dtype} of shape {mask.shape}; give bool of the shape of targets, {targets.shape}, such as"
            " weights > 0"
        )
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise InputError(f"rows is {rows!r}; give the rows of a chunk, at least 1, or None")
    if not targets.size:
        raise InputError(f"hidden has the shape {hidden.shape}, no rows; leave out a batch without tokens")
