"""``compiled-adam --print-completion``: a script with which a shell completes commands, options, choices and files."""

from __future__ import annotations

import argparse

from ..finetune.packages import needed
from . import schedule
from .parsing import commands_of

with needed("completion of lora's options", "mlx-lm", "lm"):
    from . import lora_options
with needed("completion", "shtab", "completion"):
    import shtab

_FILES = ("config", "resume_adapter_file", "file")
_FOLDERS = ("model", "planned", "data", "adapter_path", "resume", "folders")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a ``shell``; ``parser`` is that of the whole command."""
    commands = commands_of(parser)
    commands["lora"], commands["plan"] = lora_options.parser(), lora_options.plan_parser()
    names = commands["schedule"] = schedule.parser()
    chosen = names.add_subparsers()
    for name in schedule.SCHEDULES:
        chosen.add_parser(name, help="")  # shtab leaves out those without help
        chosen.choices[name] = schedule.parser(name)
    for command in commands.values():
        for action in command._actions:
            if action.dest in (*_FILES, *_FOLDERS, "out"):
                action.complete = shtab.DIR if action.dest in _FOLDERS else shtab.FILE
    return str(shtab.complete(parser, shell))
