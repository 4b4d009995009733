"""The YAML file of a job: mlx-lm's keys and ours, with the values that the command line would accept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence, Set
from typing import Any

import yaml
from mlx_lm import lora as mlx_lm_lora

from ..base import InputError, did_you_mean
from ..finetune.lora_values import FEATURES, as_float

YAML_ONLY = {"hf_dataset", *FEATURES}  # keys without a flag


class _OnlyOnce(mlx_lm_lora.yaml_loader):
    """mlx-lm's loader, which would take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise yaml.YAMLError(f"the key {twice[0]!r} is there twice; remove one of them")
        return super().construct_mapping(node, deep)


def read(file: str, known: Set[str], actions: Sequence[argparse.Action]) -> dict[str, Any]:
    """The options in a YAML file, as the ``actions`` of the parser would have made them.

    Raises ValueError, naming it, for a key that is not ``known``, or a value that the command line would refuse.
    """
    try:
        with open(file) as stream:
            config = yaml.load(stream, _OnlyOnce) or {}
    except FileNotFoundError:
        raise InputError(f"there is no file {file}; `compiled-adam init {file}` writes one with every option") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a mapping of options to values")
    if unknown := sorted(str(key) for key in config.keys() - known):
        near = did_you_mean(unknown[0].replace("-", "_"), known) or "; `compiled-adam lora --help` lists the options"
        raise InputError(f"{file} has the unknown key {unknown[0]!r}{near}")
    given = {key: value for key, value in config.items() if value is not None}
    for key in FEATURES:
        if not isinstance(given.get(key, ""), str):
            raise InputError(f"{file}: {key} is {given[key]!r}; it must be text")
    for key in ("optimizer_config", "lora_parameters", "lr_schedule", "hf_dataset"):
        if not isinstance(given.get(key, {}), (dict, list) if key == "hf_dataset" else dict):
            raise InputError(f"{file}: {key} is {given[key]!r}; it must be a mapping")
    for action in actions:
        if action.dest in given:
            given[action.dest] = _parsed(file, action, given[action.dest])
    return given


def _parsed(file: str, action: argparse.Action, value: Any) -> Any:
    """A value of YAML as the parser would have made it. Raises InputError for one that it would refuse."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    found = value
    if action.dest == "resume" and isinstance(value, bool):
        return "auto" if value else None
    if action.dest == "allow_change":
        found = [value] if isinstance(value, str) else value
        fits, kind = isinstance(found, list), "a list of names"
    elif action.dest == "clear_cache_threshold":
        try:
            found, fits = size(str(value)), True
        except argparse.ArgumentTypeError:
            fits = False
        kind = "a size such as 500MB or 4GB"
    elif action.nargs == 0:
        fits, kind = isinstance(value, bool), "true or false"
    elif action.type is int:
        fits, kind = number and math.isfinite(as_float(value)) and value == int(value), "a whole number"
        found = int(value) if fits else value
    elif action.type is float:
        fits, kind = number, "a number, without quotes" if isinstance(value, str) and _is_float(value) else "a number"
    elif action.choices is not None:
        found = value.lower() if action.dest == "optimizer" and isinstance(value, str) else value  # as mlx-lm does
        choices = list(action.choices)
        fits, kind = found in choices, f"one of {', '.join(map(str, choices))}"
    else:
        fits, kind = isinstance(value, str), "text"
    if not fits:
        raise InputError(f"{file}: {action.dest} is {value!r}; it must be {kind}")
    return found


def size(text: str) -> int:
    """Bytes from a text such as 4GB, as mlx-lm reads it."""
    try:
        return int(mlx_lm_lora._parse_size(text))
    except (KeyError, ValueError, ArithmeticError):  # the last of text without a number
        raise argparse.ArgumentTypeError(f"it must be a size such as 500MB or 4GB, not {text!r}") from None


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
