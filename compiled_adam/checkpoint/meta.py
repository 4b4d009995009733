"""``meta.json`` of a checkpoint: JSON that ends with a SHA-256 of the text before. Reading checks every field."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..base import InputError

META = "meta.json"
FILES = {"model": "weights.safetensors", "optimizer": "optimizer.safetensors", "window": "window.safetensors"}
FORMAT = 1
LARGEST = 1 << 26  # bytes; larger files are neither written nor read
DEEPEST = 100  # levels of nested lists and mappings; Python's recursion limit depends on the depth of the caller
_SEAL = ',\n "sha256": "'


def as_json(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as JSON will give it back: with text keys, and with lists instead of tuples.

    Raises TypeError or ValueError if JSON cannot store it. The message calls the value ``what``.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is {type(value).__name__}; pass a dict")
    try:
        text = json.dumps(dict(value))
        found: dict[str, Any] = json.loads(text, object_pairs_hook=_distinct)
    except TypeError as error:
        raise TypeError(f"{what} is stored as JSON, but {error}; use numbers, strings, lists") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is stored as JSON, which it cannot be: {error}") from None
    if _too_deep(found):
        raise InputError(f"{what} has more than {DEEPEST} lists or mappings in each other; store a flatter one")
    return found


def sealed(meta: Mapping[str, Any]) -> str:
    """``meta`` as JSON text. The last entry is the SHA-256 of the text before it.

    Raises ValueError if the text has more than `LARGEST` bytes.
    """
    text = _seal(json.dumps(meta, indent=1).removesuffix("\n}"))
    if len(text) > LARGEST:
        raise InputError(
            f"extra and settings are {len(text)} bytes as JSON, more than {LARGEST}; store what is large in a file"
        )
    return text


def parsed(file: Path, content: bytes) -> dict[str, Any]:
    """The checked content of a ``meta.json``: the SHA-256 matches, and every field has the right form.

    Raises ValueError otherwise. The message names ``file``.
    """
    if len(content) > LARGEST:
        raise InputError(f"{file} is damaged: it has more than {LARGEST} bytes")
    try:
        text = content.decode()
        meta = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}") from None
    if not isinstance(meta, dict) or text != _seal(text.rpartition(_SEAL)[0]):
        raise InputError(f"{file} is damaged: it was changed after it was written")
    version: Any = meta.get("format")
    if _is_count(version) and version > FORMAT:
        raise InputError(f"{file} has format {version}; this version reads {FORMAT}, so update compiled_adam")
    for name, (is_right, expected) in _FIELDS.items():
        if not is_right(meta.get(name)):
            raise InputError(
                f"{file} is not one that compiled_adam wrote: {name} is {reprlib.repr(meta.get(name))},"
                f" and must be {expected}"
            )
    if _too_deep(meta):
        raise InputError(f"{file} is not one that compiled_adam wrote: it nests more than {DEEPEST} lists or mappings")
    files = meta["files"]
    if unknown := files.keys() - set(FILES.values()):
        raise InputError(f"{file} names the file {min(unknown)[:100]!r}, which no checkpoint has")
    if missing := {FILES["model"], FILES["optimizer"]} - files.keys():
        raise InputError(f"{file} does not name {min(missing)}")
    for name, record in files.items():
        if not _is_record(record):
            raise InputError(
                f"{file} is not one that compiled_adam wrote: the size or SHA-256 of {name} is missing or wrong"
            )
    if bool(meta["accumulated"]) != (FILES["window"] in files):
        raise InputError(f"{file} is damaged: it has a window without batches, or batches without a window")
    return meta


def _seal(text: str) -> str:
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return found


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, (dict, list)):
                below.extend(each.values() if isinstance(each, dict) else each)
        level = below
    return bool(level)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int to Python


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and _is_count(value["bytes"])
        and isinstance(value["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None
    )


def _is_key(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(word) and word < 1 << 32 for word in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


# For each field: a check, and the description for the error message.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: _is_count(value) and value == FORMAT, str(FORMAT)),
    "packages": (_is_texts, "a mapping of names to versions"),
    "updates": (_is_count, "a whole number of at least 0"),
    "accumulated": (_is_count, "a whole number of at least 0"),
    "random": (_is_key, "two whole numbers of at least 0 and below 2^32"),
    "settings": (_is_mapping, "a mapping"),
    "extra": (_is_mapping, "a mapping"),
    "files": (_is_mapping, "a mapping"),
}
