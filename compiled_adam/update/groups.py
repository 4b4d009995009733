"""Parameter groups: which parameters decay and which learn faster or slower, resolved once from their paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..base import InputError


class Group(NamedTuple):
    """What is the same for some leaves of a tree: a group of parameters, in the words of other libraries."""

    learning_rate_multiplier: float
    decays: bool


ALL_ALIKE = Group(1.0, True)  # of every parameter, without a filter and multipliers
DecayFilter = Callable[[str, mx.array], bool]


def group(
    path: str, parameter: mx.array, decay_filter: DecayFilter | None, multipliers: Mapping[str, float] | None
) -> Group:
    """The group of one parameter. Raises ValueError if two of the ``multipliers``' patterns match its path."""
    matching = [pattern for pattern in multipliers or {} if re.search(pattern, path)]
    if len(matching) > 1:
        raise InputError(
            f"learning_rate_multipliers: {path!r} is matched by {' and '.join(map(repr, matching))};"
            " change the patterns so that one of them matches it"
        )
    multiplier = multipliers[matching[0]] if multipliers and matching else 1.0
    return Group(multiplier, decay_filter is None or bool(decay_filter(path, parameter)))


def check_patterns(paths: Sequence[str], multipliers: Mapping[str, float] | None) -> None:
    """Raises ValueError for a pattern that matches none of ``paths``, which is a typing error."""
    for pattern in multipliers or {}:
        if not any(re.search(pattern, path) for path in paths):
            raise InputError(
                f"learning_rate_multipliers: {pattern!r} matches no parameter; paths look like {paths[0]!r}"
                if paths
                else f"learning_rate_multipliers: {pattern!r} matches nothing, there are no parameters"
            )


def decay_matrices(path: str, parameter: mx.array) -> bool:
    """A ``decay_filter``: decay for weights of two and more dimensions that are no embeddings.

    Biases, norms and other vectors do not decay, nor does what is in a module named like an embedding (``embed``
    in its name, ``wte``, ``wpe``).

    >>> w = mx.zeros((4, 4))
    >>> decay_matrices("layers.0.up.weight", w), decay_matrices("layers.0.norm.weight", w[0])
    (True, False)
    >>> decay_matrices("model.embed_tokens.weight", w), decay_matrices("transformer.wte.weight", w)
    (False, False)
    """
    return parameter.ndim >= 2 and re.search(r"embed|(^|\.)w[tp]e(\.|$)", path) is None
