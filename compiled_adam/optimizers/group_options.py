"""Checks of ``groups`` and ``learning_rate_multipliers``. Both become one mapping, from patterns to numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..base import InputError, did_you_mean
from ..update import Patterns
from .options import check_betas, check_number

GROUPS, MULTIPLIERS = "groups", "learning_rate_multipliers"
Groups = Mapping[str, Mapping[str, Any]]


def patterns(groups: Groups | None, multipliers: Mapping[str, float] | None, keys: Sequence[str]) -> Patterns:
    """The numbers for each pattern of each option. A group may have the given ``keys``.

    Raises ValueError if a pattern is no regular expression, or if a key or a number is wrong. The message names it.
    """
    _check_patterns(GROUPS, groups, "settings")
    _check_patterns(MULTIPLIERS, multipliers, "factors")
    return {
        GROUPS: {pattern: _group(f"groups[{pattern!r}]", its, keys) for pattern, its in (groups or {}).items()},
        MULTIPLIERS: {
            pattern: {"learning_rate": _number(f"{MULTIPLIERS}[{pattern!r}]", factor)}
            for pattern, factor in (multipliers or {}).items()
        },
    }


def as_given(patterns: Patterns) -> dict[str, dict[str, Any]]:
    """The two options again. ``groups`` is left out if there are none, because checkpoints of version 0.1 lack it."""
    factors = {pattern: its["learning_rate"] for pattern, its in patterns[MULTIPLIERS].items()}
    groups: dict[str, Any] = {pattern: dict(its) for pattern, its in patterns[GROUPS].items()}
    return {MULTIPLIERS: factors} | ({GROUPS: groups} if groups else {})


def _check_patterns(option: str, given: Any, what: str) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{option} is {given!r}; it must be a mapping of patterns to {what}")
    for pattern in given or {}:
        if not isinstance(pattern, str):
            raise InputError(f"{option} has the pattern {pattern!r}; it must be a regular expression, as text")
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{option} has the pattern {pattern!r}: {error}") from None


def _group(name: str, given: Any, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"{name} is {given!r}; it must be a mapping with one or more of {', '.join(keys)}")
    for key in given:
        if key not in keys:
            hint = "; weight decay is in AdamW" if key == "weight_decay" else did_you_mean(str(key), keys)
            raise InputError(f"{name} has the key {key!r}; the keys are {', '.join(keys)}{hint}")
    numbers: dict[str, Any] = {}
    for key in (key for key in keys if key in given):  # in one order, in which checkpoints are compared
        what = f"{name}[{key!r}]{' (a factor)' if key == 'learning_rate' else ''}"
        if key == "betas":
            check_betas(what, given[key])
            numbers[key] = tuple(map(float, given[key]))
        else:
            numbers[key] = _number(what, given[key])
    return numbers


def _number(name: str, value: Any) -> float:
    check_number(name, value)
    return float(value)
