"""The YAML file of a job: mlx-lm's keys and ours, with the values that the command line would accept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence, Set
from typing import Any

import yaml
from mlx_lm import lora as mlx_lm_lora

from ..base import InputError, did_you_mean
from ..finetune.lora_values import FEATURES, OPTIMIZERS

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
            value = given[action.dest]
            try:
                given[action.dest] = _parsed(action, value)
            except _WrongValue as wrong:
                raise InputError(f"{file}: {action.dest} is {value!r}; it must be {wrong}") from None
    return {key: value for key, value in given.items() if value is not None}


class _WrongValue(Exception):
    """A value that the command line would refuse; the message says what it must be."""


def _parsed(action: argparse.Action, value: Any) -> Any:
    """A value of YAML as the parser would have made it. Raises `_WrongValue`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if action.dest == "resume" and isinstance(value, bool):
        return "auto" if value else None
    if action.dest == "allow_change":
        return [value] if isinstance(value, str) else _kept(value, isinstance(value, list), "a list of names")
    if action.dest == "clear_cache_threshold":
        try:
            return size(str(value))
        except argparse.ArgumentTypeError:
            raise _WrongValue("a size such as 500MB or 4GB") from None
    if action.nargs == 0:
        return _kept(value, isinstance(value, bool), "true or false")
    if action.type is int:
        return int(_kept(value, number and math.isfinite(value) and value == int(value), "a whole number"))
    if action.type is float:
        quoted = isinstance(value, str) and _is_float(value)
        return _kept(value, number, "a number, without quotes" if quoted else "a number")
    if action.dest == "optimizer" and isinstance(value, str) and value.lower() in OPTIMIZERS:
        return value.lower()  # as mlx-lm does
    if action.choices is not None:
        choices = list(action.choices)
        return _kept(value, value in choices, f"one of {', '.join(map(str, choices))}")
    return _kept(value, isinstance(value, str), "text")


def _kept(value: Any, fits: bool, kind: str) -> Any:
    if not fits:
        raise _WrongValue(kind)
    return value


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
