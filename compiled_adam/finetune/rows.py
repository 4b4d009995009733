"""The rows of a data set: the checks of mlx-lm's formats, and the place of each row in its file.

mlx-lm looks at the first row only, to choose the format. A wrong row later in the file becomes an IndexError, a
KeyError or worse when it is tokenized. `Located` says which row is wrong, and why.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset, CompletionsDataset, ConcatenatedDataset, TextDataset

from ..base import InputError
from . import turns
from .options import called
from .targets import Example

_FORMATS = (ChatDataset, CompletionsDataset, ConcatenatedDataset, TextDataset)


class Row(dict[str, Any]):
    """A row that knows its ``place``, in words, and mlx-lm's ``data`` set that tokenizes it, one of several maybe."""

    place: str
    data: Any


class Located:
    """One of mlx-lm's data sets, ``data``, whose errors begin with ``place(index)``.

    With ``turns_only`` the loss is on every turn of the assistant, and on nothing else.
    """

    def __init__(self, data: Any, place: Callable[[int], str], turns_only: bool = False) -> None:
        self.data, self._place, self._turns_only = data, place, turns_only

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        item = self.data[index]
        if not isinstance(item, Mapping):
            raise InputError(f"{self._place(index)} is {_kind(item)}; it must be an object such as {{'text': '...'}}")
        row = Row(item)
        row.place = self._place(index)
        row.data = self.data._data[row["_dataset"]] if isinstance(self.data, ConcatenatedDataset) else self.data
        return row

    def check(self) -> None:
        """Raises ValueError for the first row that cannot be used, as far as that shows without a tokenizer."""
        for index in range(len(self)):
            self._check(self[index])

    def _check(self, row: Row) -> None:
        _check_format(row)
        if self._turns_only:
            _check_turns(row)

    def process(self, row: Row) -> Example:
        """The tokens of a row, and where its prompt ends, or where the assistant's turns are."""
        self._check(row)
        try:
            if self._turns_only:
                return turns.tokenized(row.data.tokenizer, conversation(row), row.get("tools"))
            return row.data.process(row)
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from error
        except Exception as error:
            if isinstance(error, TemplateError) or _in_a_template(error):
                raise InputError(f"{row.place}: the model's chat template refuses it: {error}") from error
            if isinstance(row.data, TextDataset) and not row.data.tokenizer.encode(row[row.data.text_key]):
                raise InputError(f"{row.place}: the tokenizer makes no token of it; remove the row") from error
            raise


def located(dataset: Any, name: str) -> Any:
    """mlx-lm's data set of rows, as a `CacheDataset` whose errors say "example 3 of the <name>"; others as they are."""
    if not isinstance(dataset, CacheDataset) or not isinstance(dataset._data, _FORMATS):
        return dataset
    found = CacheDataset(Located(dataset._data, lambda index: example(index, name)))
    found._proc_data = dataset._proc_data  # what was tokenized already, for both
    return found


def example(index: int, name: str) -> str:
    """
    >>> example(0, "train set")
    'example 0 (counted from 0) of the train set'
    """
    return f"example {index} (counted from 0) of the {name}"


def _in_a_template(error: BaseException) -> bool:
    """Whether an error comes from what a template does, as adding text to a null; jinja2 compiles it as a file."""
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return "<template>" in frames


def conversation(row: Row) -> list[dict[str, Any]]:
    """The messages of a row; none of a text."""
    if isinstance(row.data, CompletionsDataset):
        texts = (("user", row[row.data.prompt_key]), ("assistant", row[row.data.completion_key]))
        return [{"role": role, "content": text} for role, text in texts]
    return row[row.data.chat_key] if isinstance(row.data, ChatDataset) else []


def _check_format(row: Row) -> None:
    data = row.data
    if isinstance(data, TextDataset):
        _check_text(_value(row, data.text_key), repr(data.text_key), row.place)
        return
    if isinstance(data, CompletionsDataset):
        for key in (data.prompt_key, data.completion_key):
            _check_text(_value(row, key), repr(key), row.place, empty=True)
    else:
        _check_conversation(_value(row, data.chat_key), repr(data.chat_key), data.mask_prompt, row.place)
    if not getattr(data.tokenizer, "has_chat_template", True):
        raise InputError(
            f"{row.place} is a conversation, but the tokenizer of the model has no chat template; use a model that has"
            " one (an -Instruct or -it model), or data with 'text'"
        )
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{row.place}: 'tools' is {_kind(tools)}; it must be a list of objects")
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise InputError(f"{row.place}: 'tools' has {_kind(tool)} in it; it must be a list of objects")


def _check_turns(row: Row) -> None:
    option = called("assistant_only_loss")
    if isinstance(row.data, TextDataset):
        raise InputError(f"{row.place} has only a text; {option} needs messages, or a prompt and a completion")
    messages = conversation(row)
    if not any(map(turns.is_turn, messages)):
        roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in messages))
        raise InputError(
            f"{row.place}: no message has the role 'assistant', but {option} trains only these; the roles are {roles}"
        )


def _value(row: Row, key: str) -> Any:
    if key not in row:
        keys = ", ".join(repr(name) for name in row if name != "_dataset") or "nothing"
        raise InputError(f"{row.place} has no {key!r}, which the first row of its data set has; it has {keys}")
    return row[key]


def _check_text(value: Any, what: str, place: str, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} is {_kind(value)}; it must be text")
    if not value and not empty:
        raise InputError(f"{place}: {what} is empty; remove the row, or give it a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: {what} has half of a character ({error.object[error.start]!a}), which cannot be tokenized;"
            " remove it"
        ) from None


def _check_conversation(messages: Any, what: str, mask_prompt: bool, place: str) -> None:
    if not isinstance(messages, list):
        raise InputError(f"{place}: {what} is {_kind(messages)}; it must be a list of messages")
    if not messages:
        raise InputError(f"{place}: {what} is empty; remove the row, or give it messages")
    if mask_prompt and len(messages) < 2:
        raise InputError(f"{place}: {what} has only one message, but {called('mask_prompt')} needs a prompt before it")
    for number, message in enumerate(messages, 1):
        its = f"message {number}"
        if not isinstance(message, Mapping):
            raise InputError(f"{place}: {its} is {_kind(message)}; it must be an object with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            wrong = f"its 'role' is {_kind(message['role'])}" if "role" in message else "it has no 'role'"
            raise InputError(f"{place}: {its}: {wrong}; it must be text such as 'user' or 'assistant'")
        content = message.get("content")
        if isinstance(content, str):
            _check_text(content, f"{its}: 'content'", place, empty=True)
        elif content is None:
            # A call of a tool, or what else a template knows, may stand in its place.
            if not any(value for key, value in message.items() if key not in ("role", "content", "name")):
                wrong = "'content' is null" if "content" in message else "there is no 'content'"
                raise InputError(f"{place}: {its}: {wrong}; it must be text")
        elif not isinstance(content, list):  # of parts, for templates that know them
            raise InputError(f"{place}: {its}: 'content' is {_kind(content)}; it must be text")


def _kind(value: Any) -> str:
    kinds = (
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (Mapping, "an object"),
    )
    return "null" if value is None else next((word for kind, word in kinds if isinstance(value, kind)), repr(value))
