"""Parameter groups: which parameters decay and which learn faster or slower. A path decides the group, once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..base import InputError


class Group(NamedTuple):
    """The settings that a group of parameters has in common."""

    learning_rate_multiplier: float
    decays: bool


ALL_ALIKE = Group(1.0, True)  # the group of every parameter without a filter and multipliers
DecayFilter = Callable[[str, mx.array], bool]


def group(
    path: str, parameter: mx.array, decay_filter: DecayFilter | None, multipliers: Mapping[str, float] | None
) -> Group:
    """The group of the parameter at ``path``. Raises ValueError if two patterns of ``multipliers`` match the path."""
    matching = [pattern for pattern in multipliers or {} if re.search(pattern, path)]
    if len(matching) > 1:
        raise InputError(
            f"learning_rate_multipliers: {path!r} is matched by {' and '.join(map(repr, matching))};"
            " change the patterns so that one of them matches it"
        )
    multiplier = multipliers[matching[0]] if multipliers and matching else 1.0
    return Group(multiplier, decay_filter is None or bool(decay_filter(path, parameter)))


def check_patterns(paths: Sequence[str], multipliers: Mapping[str, float] | None) -> None:
    """Raises ValueError if a pattern matches none of ``paths``: it is probably misspelled."""
    for pattern in multipliers or {}:
        if not any(re.search(pattern, path) for path in paths):
            raise InputError(
                f"learning_rate_multipliers: {pattern!r} matches no parameter; paths look like {paths[0]!r}"
                if paths
                else f"learning_rate_multipliers: {pattern!r} matches nothing, there are no parameters"
            )


def decay_matrices(path: str, parameter: mx.array) -> bool:
    """A ``decay_filter`` that gives weight decay to weights of two or more dimensions, except embeddings.

    Biases, norms and other vectors do not decay. A parameter counts as an embedding if the path contains ``embed``, or
    has a part ``wte`` or ``wpe``.

    >>> w = mx.zeros((4, 4))
    >>> decay_matrices("layers.0.up.weight", w), decay_matrices("layers.0.norm.weight", w[0])
    (True, False)
    >>> decay_matrices("model.embed_tokens.weight", w), decay_matrices("transformer.wte.weight", w)
    (False, False)
    """
    return parameter.ndim >= 2 and re.search(r"embed|(^|\.)w[tp]e(\.|$)", path) is None
