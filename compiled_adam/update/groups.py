"""Parameter groups: parameters with numbers of their own. A path decides the group, once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..base import InputError


class Group(NamedTuple):
    """The numbers that a group of parameters has in common. None: the present number of the optimizer."""

    learning_rate: float = 1.0  # a factor
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None


ALL_ALIKE = Group()  # the group of every parameter without a number of its own
DecayFilter = Callable[[str, mx.array], bool]
Patterns = Mapping[str, Mapping[str, Mapping[str, Any]]]  # option -> pattern -> fields of `Group`


def group(path: str, parameter: mx.array, decay_filter: DecayFilter | None, patterns: Patterns) -> Group:
    """The group of the parameter at ``path``. The filter is not asked about a parameter with a decay of its own.

    Raises ValueError if two patterns of an option match the path, or if two options set the same number.
    """
    own: dict[str, Any] = {}
    by: dict[str, str] = {}  # the option that set each number
    for option, settings in patterns.items():
        matching = [pattern for pattern in settings if re.search(pattern, path)]
        if len(matching) > 1:
            raise InputError(
                f"{option}: {path!r} is matched by {' and '.join(map(repr, matching))};"
                " change the patterns so that one of them matches it"
            )
        for name, number in settings[matching[0]].items() if matching else ():
            place = f"{option}[{matching[0]!r}]"
            if name in own:
                raise InputError(f"{path!r} gets its {name} from {by[name]} and from {place}; leave one of them out")
            own[name], by[name] = number, place
    if decay_filter is not None and "weight_decay" not in own and not decay_filter(path, parameter):
        own["weight_decay"] = 0.0
    return Group(**own)


def check_patterns(paths: Sequence[str], patterns: Patterns) -> None:
    """Raises ValueError if a pattern matches none of ``paths``: it is probably misspelled."""
    for option, pattern in ((option, pattern) for option, settings in patterns.items() for pattern in settings):
        if not any(re.search(pattern, path) for path in paths):
            raise InputError(
                f"{option}: {pattern!r} matches no parameter; paths look like {paths[0]!r}"
                if paths
                else f"{option}: {pattern!r} matches nothing, there are no parameters"
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
