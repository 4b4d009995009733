"""The data sets of a job: files of JSON lines, checked before anything is trained, or sets on Hugging Face."""

from __future__ import annotations

import importlib
import json
import os
import types
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tuner.datasets import create_dataset, load_dataset

from ..base import InputError
from .console import TrainingProgress
from .options import called
from .places import near
from .rows import Located, example

NAMES = {"train": "train set", "valid": "validation set", "test": "test set"}
_MANY = 1000  # examples, whose tokenizing takes a second


def load(args: types.SimpleNamespace, tokenizer: Any) -> tuple[Any, Any, Any]:
    """The train, validation and test set of a job, each a `Located`; a set that the job does not use is empty.

    Raises:
        ValueError: a file, line or row cannot be used, or a set is missing. The message says where it is.
    """
    needed = [*(["train", "valid"] if args.train else []), *(["test"] if args.test else [])]
    folder = Path(args.data)
    if getattr(args, "hf_dataset", None):
        found = _from_hub(args, tokenizer)
    elif folder.exists():
        if not folder.is_dir():
            raise InputError(f"data is {args.data!r}, which is a file; give the folder of train.jsonl")
        found = {name: read(folder / f"{name}.jsonl", tokenizer, args) for name in needed}
    else:
        print(f"Loading Hugging Face dataset {args.data}.")
        found = _from_hub(args, tokenizer)
    for name, title, why in (
        ("train", "Training", "Must provide training set for fine-tuning"),
        ("test", "Test", "Must provide test set for evaluation"),
    ):
        if name in needed and not len(found[name]):
            has = ""
            if folder.is_dir():
                here = sorted(path.name for path in folder.iterdir())[:5]
                has = f": {folder} has no {name}.jsonl" + (f", but {', '.join(here)}" if here else ": it is empty")
            raise InputError(f"{title} set not found or empty{has}. {why}.")
    if "valid" in needed and not len(found["valid"]):
        print("Warning: Validation set not found or empty. Training will proceed without validation.")
    return found.get("train", []), found.get("valid", []), found.get("test", [])


def read(file: Path, tokenizer: Any, config: Any) -> Any:
    """The examples in a file of JSON lines; none if there is no such file.

    Blank lines and a byte order mark are skipped.

    Raises ValueError, with the number of the line, for what is no UTF-8, no JSON, or no example.
    """
    if file.is_symlink() and not file.exists():
        raise InputError(f"{file} is a link to {os.readlink(file)}, which does not exist; mend the link, or remove it")
    if not file.exists():
        return []
    if not file.is_file():  # a pipe would be waited for
        kind = "a folder" if file.is_dir() else "no regular file"
        raise InputError(f"{file} is {kind}; it must be a file of JSON lines. Move it away, or name another folder")
    rows, lines = [], []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            rows.append(_parsed(line, f"{file} line {number}"))
            lines.append(number)
    if not rows:
        raise InputError(f"{file} has no examples; give it some, or remove it")
    found = _format(rows, tokenizer, config, f"{file} line {lines[0]}")
    made = Located(found, lambda i: f"{file} line {lines[i]}", getattr(config, "assistant_only_loss", False))
    made.check()
    return made


def _parsed(line: bytes, place: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = f"byte {line[error.start]:#04x} at position {error.start}"
        raise InputError(f"{place} is not UTF-8 ({at}); save the file in this encoding") from None
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        text = line.decode("utf-8")
        start = text if len(text) < 60 else f"{text[:60]}..."
        raise InputError(f"{place} is not JSON ({error}): {start!r}; each line must be one object") from None
    if not isinstance(row, dict):
        raise InputError(f"{place} is not an object such as {{'text': '...'}}: {json.dumps(row)[:60]}")
    if b"\\ud" in line.lower():  # JSON can write one half of a character alone, wherever it has text
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise InputError(
                f"{place} has half of a character ({half!a}), which cannot be tokenized; remove it"
            ) from None
    return row


def _format(rows: Any, tokenizer: Any, config: Any, place: str) -> Any:
    """mlx-lm's data set of ``rows``, whose first one has the keys of a format."""
    text, chat, prompt, completion = (
        getattr(config, f"{key}_feature", None) or default
        for key, default in (("text", "text"), ("chat", "messages"), ("prompt", "prompt"), ("completion", "completion"))
    )
    first = rows[0]
    has_prompt = (prompt in first and completion in first) or chat in first
    if not (has_prompt or text in first):
        raise InputError(
            f"{place} has the keys {', '.join(map(repr, first)) or 'of nothing'}; an example has {text!r}, or {chat!r},"
            f" or {prompt!r} and {completion!r}. Rename them, or name yours in YAML, as in text_feature: ..."
        )
    if getattr(config, "mask_prompt", False) and not has_prompt:
        raise InputError(
            f"{place} has only a text; {called('mask_prompt')} needs a prompt and a completion, or messages"
        )
    return create_dataset(rows, tokenizer, config)


def _from_hub(args: types.SimpleNamespace, tokenizer: Any) -> dict[str, Any]:
    """The data sets as mlx-lm loads them. Rows are checked when they are tokenized, because there may be many."""
    sets = getattr(args, "hf_dataset", None) or []
    sets = [sets] if isinstance(sets, dict) else sets
    what = " and ".join(each["path"] for each in sets) or args.data
    subject = (
        f"hf_dataset {what}"
        if sets
        else f"data is {what!r}, which is no folder{near(what)}; as a data set on Hugging Face it"
    )
    try:
        exceptions = importlib.import_module("datasets.exceptions")
    except ImportError:
        raise InputError(f"{subject} needs a package: pip install datasets") from None
    try:
        found = load_dataset(args, tokenizer)
    except IndexError as error:  # mlx-lm looks at the first row
        raise InputError(f"{subject} has a split without examples") from error
    except (exceptions.DatasetsError, ValueError, OSError) as error:  # no such name, split, configuration or format
        raise InputError(f"{subject} cannot be used: {error}") from error
    turns_only = getattr(args, "assistant_only_loss", False)
    return {
        name: Located(data, partial(example, name=title), turns_only) if len(data) else []
        for (name, title), data in zip(NAMES.items(), found, strict=True)
    }


def tokenize(dataset: Any, quiet: bool = False) -> None:
    """Tokenizes the examples of a `CacheDataset` that are not tokenized yet; says so unless they are few.

    Checkpoints need it, to notice that a resumed run has other data, and batches of similar length.
    """
    missing = [i for i, item in enumerate(getattr(dataset, "_proc_data", ())) if item is None]
    if len(missing) <= _MANY:
        return  # whoever needs the examples tokenizes them
    what = f"tokenizing {len(missing):,} examples"
    with TrainingProgress(len(missing), quiet, "tokenize") as progress, progress.stage(what):
        for index in missing:
            dataset[index]
            progress.advance()
