"""The lengths to which batches are padded: long enough for the longest example, and few, because each is a trace."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import mlx.core as mx

from ..base import InputError
from .options import called

Padding = Callable[[int], int]


def multiple_of(step: int) -> Padding:
    """The next multiple of ``step``, and one, because the last token is only a target.

    >>> [multiple_of(128)(length) for length in (1, 128, 129)]
    [129, 129, 257]
    """
    return lambda length: 1 + step * -(-length // step)


multiple_of_32 = multiple_of(32)  # mlx-lm's padded length


def spaced(step: int = 8) -> Padding:
    """The next multiple of ``step``, which doubles wherever a length has more than 16 of them; and one, as above.

    So padding adds at most ``step``, or an eighth of the length. Up to 128 tokens there are 16 lengths, and eight more
    for each doubling.

    >>> sorted({spaced()(length) for length in range(100, 300)})
    [105, 113, 121, 129, 145, 161, 177, 193, 209, 225, 241, 257, 289, 321]
    """

    def padded(length: int) -> int:
        wide = step
        while length > 16 * wide:
            wide *= 2
        return multiple_of(wide)(length)

    return padded


def geometric(ratio: float, step: int = 32) -> Padding:
    """The lengths of ``multiple_of(step)`` that are next to a geometric series: a run sees few shapes.

    The series is 32, 32 ratio, 32 ratio^2, ...; padding adds at most ``ratio - 1`` of a length to mlx-lm's.

    Raises:
        ValueError: the ratio is not from 1.01 to 1000.

    >>> sorted({geometric(1.5)(length) for length in range(1, 1000)})
    [33, 65, 97, 129, 193, 257, 385, 577, 833, 1249]
    """
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 1.01 <= ratio <= 1000:
        raise InputError(
            f"{called('bucket')} is {ratio!r}; the ratio of the lengths must be from 1.01 to 1000, such as 1.25"
        )
    nearest = multiple_of(step)

    def padded(length: int) -> int:
        size = 32.0
        while nearest(math.ceil(size)) <= length:
            size *= ratio
        return nearest(math.ceil(size))

    return padded


def chosen(bucket: float | None, group_by_length: bool, cuda: bool) -> Padding:
    """The padding of a job.

    Args:
        bucket: the ratio for `geometric`, or None.
        group_by_length: `spaced`, which pads least; without it mlx-lm's multiples of 32.
        cuda: whether lengths are multiples of 128, as cuDNN's fused attention needs them in the backward pass. It was
            not measured.
    """
    if bucket is not None:
        return geometric(bucket, 128 if cuda else 32)
    if group_by_length:
        return spaced(128 if cuda else 8)
    return multiple_of(128) if cuda else multiple_of_32


def on_cuda() -> bool:
    """Whether arrays are computed by a GPU, and not by Metal."""
    return mx.default_device() == mx.gpu and not mx.metal.is_available()
