"""``compiled-adam init``: a YAML file for ``compiled-adam lora`` in which every option stands, as a comment.

The defaults are comments because a key in the file is a choice of its user. It wins over what ``--like-mlx-lm`` sets,
and it is an error beside some other choices, such as ``moments`` beside ``optimizer: sgd``.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..base import InputError
from ..checkpoint import output
from ..finetune.lora_values import FEATURES
from .lora_options import GROUPS, effective_defaults, parser

# The keys without a flag, by the group of the flags that they are about.
YAML_KEYS: dict[str, dict[str, str]] = {
    "model": {
        "lora_parameters": "Of lora and dora: rank, scale and dropout of the adapters, and the layers that get them, as"
        " in keys: [self_attn.q_proj]. Default of keys: all layers.",
    },
    "data": {
        "hf_dataset": "A data set on Hugging Face in place of data: a mapping with path, train_split, valid_split,"
        " test_split, config and the names of features, or a list of such mappings. Default: none.",
        **{
            name: f"The key that has the {name.removesuffix('_feature')} of an example. Default: mlx-lm's name for it."
            for name in FEATURES
        },
    },
    "optimizer": {
        "optimizer_config": "Further arguments of each optimizer, such as {adamw: {betas: [0.9, 0.95]}}."
        " In {muon: {adamw_rate_factor: 0.015}}: the learning rate of the AdamW beside Muon, as a part of Muon's.",
        "lr_schedule": "A schedule in place of learning_rate, which counts updates, such as {name: cosine, arguments:"
        " [1.0e-4, 600], warmup: 50}. `compiled-adam schedule` draws it. Default: none.",
    },
}
_HEAD = """\
# Options of `compiled-adam lora`. Use this file with:
#     compiled-adam lora -c {file} --train
# Each line such as `#seed: 0` shows a default. Remove its # and change the
# value. An option on the command line wins over this file.
"""


def write(file: Path) -> None:
    """Writes the commented options to a new ``file``.

    Raises:
        InputError: there is something of this name already, or no folder for it.
    """
    if os.path.lexists(file):
        raise InputError(f"{file} exists, and is not replaced; give another name: compiled-adam init FILE")
    output.write(file, text(str(file)).encode())


def text(file: str) -> str:
    """The content of the file of this name."""
    return "\n".join([_HEAD.format(file=file), *_lines()])


def _lines() -> Iterator[str]:
    defaults = effective_defaults()
    for group in parser()._action_groups:
        title = str(group.title)
        helps = {action.dest: str(action.help) for action in group._group_actions}
        helps |= YAML_KEYS.get(title, {})
        if title not in GROUPS and not helps.keys() & defaults.keys():
            continue  # of argparse
        yield from _comment(f"-- {title} --")
        for name, help in helps.items():
            if name != "config":
                yield ""
                yield from _comment(help)
                yield f"#{_as_yaml(name, defaults.get(name))}"
        yield ""


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 78, break_on_hyphens=False)]


def _as_yaml(name: str, value: Any) -> str:
    text = yaml.safe_dump(value, width=10_000, default_flow_style=True, sort_keys=False)
    return f"{name}: {text.splitlines()[0]}"  # after a single value a line ends the document
