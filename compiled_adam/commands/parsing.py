"""A parser of command lines whose errors are one sentence, with the nearest option for a misspelled one."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ..base import InputError, did_you_mean

PROGRAM = "compiled-adam"
_KINDS = {"int": "a whole number", "float": "a number"}


class Help(argparse.RawDescriptionHelpFormatter):
    """Texts of options are wrapped, but not inside the names of others, such as ``--batch-size``."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a command line that it refuses raises InputError, without the page of usage."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.exit_on_error = False  # else argparse turns its errors into text, which is another in each of its versions
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            action = next((each for each in self._actions if _argparse_name(each) == error.argument_name), None)
            if action is None:
                self.error(error.message)
            raise InputError(self._sentence(action, error.message)) from None

    def error(self, message: str) -> NoReturn:
        """Raises InputError. argparse comes here with what is missing, and with a prefix that several options have."""
        _, missing, names = message.partition("the following arguments are required: ")
        if not missing:
            raise InputError(f"{self._subject()}: {message}")
        action = next(each for each in self._actions if _argparse_name(each) == names.split(", ")[0])
        what = (action.help or "").rstrip(".")
        raise InputError(f"{self._subject()} needs {names}{': ' if what else ''}{what[:1].lower()}{what[1:]}")

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """Raises InputError about words that this parser does not know."""
        word = next((each for each in rest if each.startswith("-")), rest[0]).partition("=")[0]
        subject = self._subject()
        if not word.startswith("-"):
            raise InputError(f"{subject} does not know what {word!r} is for; `{self.prog} --help` lists its options")
        near = did_you_mean(word.replace("_", "-"), self._option_string_actions)
        there = f"{subject} has" if subject != PROGRAM else "there is"
        raise InputError(f"{there} no option {word}{near or f'; `{self.prog} --help` lists them'}")

    def _subject(self) -> str:
        return self.prog.removeprefix(f"{PROGRAM} ")

    def _sentence(self, action: argparse.Action, message: str) -> str:
        name, choices = _name(action), ", ".join(map(str, action.choices or ()))
        if found := re.match(r"invalid choice: (.*?) \(", message):
            if isinstance(action, argparse._SubParsersAction):
                near = did_you_mean(found[1].strip("'"), action.choices)
                return f"there is no command {found[1]}{near or f'; the commands are {choices}'}"
            return f"{name} is {found[1]}; it must be one of {choices}"
        if found := re.match(r"invalid (\w+) value: (.*)", message):
            return f"{name} is {found[2]}; it must be {_KINDS.get(found[1], found[1])}"
        if message.startswith("expected"):
            what = choices or _KINDS.get(getattr(action.type, "__name__", ""))
            return f"{name} needs a value{f': {what}' if what else ''}"
        if message.startswith("ignored explicit argument"):
            return f"{name} is a switch; give it without a value"
        return f"{name}: {message}"


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The parsers of the commands that a parser chooses from; a new one takes the place of an old one."""
    (found,) = (each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return found


def _name(action: argparse.Action) -> str:
    """What a user types for an option, or reads for an argument: the long one of its names."""
    long = [each for each in action.option_strings if each.startswith("--")]
    return long[0] if long else _argparse_name(action)


def _argparse_name(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)
