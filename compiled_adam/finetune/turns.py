"""Where the assistant's turns are among the tokens of a conversation, so that all of them can be trained.

A chat template writes the whole conversation. It also writes the first k messages alone. If that text is the beginning
of the whole text, the turn of message k begins where it ends: ``text(messages[:k])``, with the prompt for an answer, up
to ``text(messages[:k + 1])``. Some templates write a message differently when others follow it. Such a turn has no
place that is certain, and is refused. A template may also mark the turns itself, with ``{% generation %}``.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from ..base import InputError
from .options import called
from .targets import Span

Text = Callable[..., str]  # what the chat template writes of messages
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_OPTION = called("assistant_only_loss")
_REMEDY = (
    f"make an example of each turn, which ends with it, and use {called('mask_prompt')}, or use a chat template that"
    " marks turns with {% generation %}"
)


def is_turn(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's."""
    return message["role"] == "assistant"


def tokenized(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[int], list[Span]]:
    """The tokens of a conversation, as mlx-lm makes them, and the span of each of the assistant's turns.

    A turn has all tokens after the prompt for an answer, with the token that ends the turn. A token is part of it if
    all characters of the token are. The last turn of a conversation has the tokens that ``mask_prompt`` trains.

    Args:
        tokenizer: mlx-lm's, which wraps one of transformers.
        messages, tools: what the chat template gets.

    Raises:
        InputError: the template does not say for certain which tokens are a turn's.
    """
    tokens = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    text = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False, add_generation_prompt=False)
    _check_calls(text, messages)
    if _marks_turns(tokenizer, tools):
        spans = _marked(tokenizer, messages, tools, tokens)
    else:
        whole = text(messages)
        found = [_turn(text, messages, k, whole) for k, message in enumerate(messages) if is_turn(message)]
        spans = _tokens_of(tokenizer._tokenizer, whole, tokens, found)
    if not spans:
        raise InputError(f"the chat template marks no token as the assistant's; {_REMEDY}")
    return tokens, spans


def _check_calls(text: Text, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises an error if the template does not write the calls of tools: answers without them would be trained."""
    calling = [k for k, message in enumerate(messages) if message.get("tool_calls")]
    whole = text(messages) if calling else ""
    for k in calling:
        without = {key: value for key, value in messages[k].items() if key != "tool_calls"}
        try:
            written = text([*messages[:k], without, *messages[k + 1 :]]) != whole
        except Exception:
            written = True  # a template that fails without them knows them
        if not written:
            raise InputError(
                f"the chat template leaves out the tool_calls of message {k + 1}, so {_OPTION} would train an answer"
                " without them; use a model whose chat template writes them, or remove the example"
            )


def _turn(text: Text, messages: Sequence[Mapping[str, Any]], k: int, whole: str) -> Span:
    """The characters of ``whole`` that are the turn of message ``k``."""
    if k == 0:
        raise InputError(
            f"message 1 is the assistant's; with {_OPTION} a message of the user or the system must come first"
        )
    try:
        before = text(messages[:k], add_generation_prompt=True)
        # The last turn ends the conversation, whose text is there already: templates are slow.
        through = whole if k + 1 == len(messages) else text(messages[: k + 1])
    except TemplateError as error:
        raise InputError(
            f"the chat template refuses the messages up to number {k + 1} alone ({error}), so {_OPTION} cannot find"
            f" that turn; {_REMEDY}"
        ) from error
    if not (through.startswith(before) and whole.startswith(through)):
        raise InputError(
            f"the chat template writes messages 1 to {k + 1} differently when it writes them alone (it may leave out"
            f" earlier reasoning, or move text), so {_OPTION} cannot find the turn of message {k + 1}; {_REMEDY}"
        )
    return len(before), len(through)


def _tokens_of(tokenizer: Any, whole: str, tokens: list[int], found: list[Span]) -> list[Span]:
    """The tokens of each turn; ``found`` has the characters of ``whole``, the text of all ``tokens``."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        same, offsets = encoded["input_ids"] == tokens, encoded["offset_mapping"]
        begins, ends = ([each[side] for each in offsets] for side in (0, 1))
        spans = [(bisect_left(begins, begin), bisect_right(ends, end)) for begin, end in found]
    else:  # these do not say which characters a token has
        parts = [[tokenizer.encode(whole[:at], add_special_tokens=False) for at in turn] for turn in found]
        same = all(tokens[: len(part)] == part for turn in parts for part in turn)
        spans = [(len(before), len(through)) for before, through in parts]
    if not same:
        raise InputError(
            f"the tokens of a part of the conversation are not a part of its tokens, so {_OPTION} cannot find the"
            f" assistant's turns; {_REMEDY}"
        )
    return spans


def _marks_turns(tokenizer: Any, tools: Any) -> bool:
    if tokenizer._chat_template is not None:  # a function of mlx-lm
        return False
    return _MARK.search(tokenizer._tokenizer.get_chat_template(tools=tools)) is not None


def _marked(tokenizer: Any, messages: Any, tools: Any, tokens: list[int]) -> list[Span]:
    """The spans that the template marks, as transformers finds them."""
    # What mlx-lm adds to each call of a template.
    more = {getattr(tokenizer, "_thinking_kwarg", "enable_thinking"): tokenizer.has_thinking}
    found = tokenizer._tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    if found["input_ids"] != tokens:
        raise InputError(
            f"the tokens that the chat template marks for {_OPTION} are not those that are trained; {_REMEDY}"
        )
    spans, at = [], 0
    for trained, run in groupby(found["assistant_masks"]):
        count = len(list(run))
        spans += [(at, at + count)] if trained else []
        at += count
    return spans
