"""What to type if a checkpoint was saved with other options: those options, or what permits the change."""

from __future__ import annotations

import argparse
import math
import shlex
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..base import InputError, table
from ..checkpoint import COLUMNS, OtherRun
from .lora_options import parser, settings

_OPTIONS = {"accumulate": "grad_accumulation_steps"}  # options that have another name in a checkpoint
_FOLLOW = ("decays", "weighted")  # from other settings
_DIGESTS = ("model", "data")  # options whose settings are not what a user types


def message(error: OtherRun, argv: Sequence[str]) -> str:
    """What to tell the user of the command line ``argv``: the flags that differ, and the commands that work."""
    flags = {action.dest: action.option_strings[0] for action in parser()._actions if action.dest not in _DIGESTS}
    rows = [(flags.get(_OPTIONS.get(name, name), name), here, there) for name, here, there in error.settings]
    lines = [f"{error.folder} was saved by another run:", table(COLUMNS, rows)]
    if error.arrays:
        first = error.arrays[0][0]
        lines.append(f"  so {len(error.arrays)} arrays of the model or the optimizer differ, such as {first}")
    names = [name for name, *_ in error.settings]
    old = with_values(argv, {name: error.there.get(name) for name in names if name not in _FOLLOW})
    if old is not None:
        lines += ["to go on with the options of the checkpoint:", f"  {_command(old)}"]
    if not error.arrays:
        allowed = [word for name in names for word in ("--allow-change", name)]
        lines += [
            "to go on with those of this run:" if old else "to go on all the same:",
            f"  {_command([*argv, *allowed])}",
        ]
    elif old is None:
        lines += ["give the options of that run, or begin a new one without --resume"]
    return "\n".join(lines)


def _command(argv: Sequence[str]) -> str:
    return f"compiled-adam lora {shlex.join(argv)}"


def with_values(argv: Sequence[str], wanted: Mapping[str, Any]) -> list[str] | None:
    """The command line ``argv`` with other values of some settings; None if flags cannot say them."""
    actions = {action.dest: action for action in parser()._actions if action.dest not in _DIGESTS}
    values = {_OPTIONS.get(name, name): value for name, value in wanted.items()}
    if isinstance(values.get("optimizer"), str):
        values["optimizer"] = values["optimizer"].lower()
        if values["optimizer"] != "adamw":
            values.pop("weight_decay", None)  # a checkpoint of adam has 0, and the flag is for adamw only
    if not values.keys() <= actions.keys():
        return None
    words = list(argv)
    for name, value in values.items():
        words = [*_without(words, actions[name]), *_typed(actions[name], value)]
    try:
        found = settings(words)
    except InputError:
        return None
    return words if all(_has(found, name, value) for name, value in values.items()) else None


def _without(words: Sequence[str], action: argparse.Action) -> list[str]:
    """The ``words`` of a command line without an option and its value."""
    kept, skips = [], False
    for word in words:
        if skips and not word.startswith("--"):
            skips = False
            continue
        flag, has_value, _ = word.partition("=")
        skips = flag in action.option_strings and not has_value and action.nargs != 0
        if flag not in action.option_strings:
            kept.append(word)
    return kept


def _typed(action: argparse.Action, value: Any) -> list[str]:
    """An option with a ``value`` as a user types it; nothing for None, and for a switch of mlx-lm that is off."""
    flag = action.option_strings[-1 if action.nargs == 0 and not value else 0]
    if action.nargs == 0:
        return [flag] if value or len(action.option_strings) > 1 else []
    if value is None:
        return []
    # A checkpoint has the learning rate as float32, whose shortest text is what was typed.
    return [flag, str(np.float32(value)) if action.dest == "learning_rate" else str(value)]


def _has(found: types.SimpleNamespace, name: str, value: Any) -> bool:
    given = getattr(found, name)
    if isinstance(given, float) and isinstance(value, (int, float)):
        return math.isclose(given, value, rel_tol=1e-6)  # float32
    return given == value or not (given or value)
