"""The nearest of the known words to one that is not known, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], before: str = "", after: str = "") -> str:
    """The end of a sentence about a misspelled word; empty if nothing ``known`` is like it.

    ``before`` and ``after`` stand around the word, such as the folder before a name.

    >>> did_you_mean("--bach-size", ["--batch-size", "--batch-tokens"]), did_you_mean("--x", ["--batch-size"])
    ('; did you mean --batch-size?', '')
    """
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {before}{near[0]}{after}?" if near else ""
