"""Where the assistant's turns are among the tokens of a conversation, so that all of them can be trained.

A chat template writes the whole conversation. It also writes the first k messages alone. If that text is the beginning
of the whole text, the turn of message k begins where it ends: ``text(messages[:k])``, with the prompt for an answer, up
to ``text(messages[:k + 1])``. Some templates write a message differently when others follow it. Such a turn has no
place that is certain, and is refused. A template may also mark the turns itself, with ``{% generation %}``.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from ..base import InputError
from .options import called
from .targets import Span

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_OPTION = called("assistant_only_loss")
_REMEDY = (
    f"make an example of each turn, which ends with it, and use {called('mask_prompt')}, or use a chat template that"
    " marks turns with {% generation %}"
)


def is_turn(message: Mapping[str, Any]) -> bool:
    """Whether a message is the assistant's."""
    return message["role"] == "assistant"


def tokenized(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, place: str
) -> tuple[list[int], list[Span]]:
    """The tokens of a conversation, as mlx-lm makes them, and the span of each of the assistant's turns.

    A turn has all tokens after the prompt for an answer, with the token that ends the turn. A token is part of it if
    all characters of the token are. The last turn of a conversation has the tokens that ``mask_prompt`` trains.

    Args:
        tokenizer: mlx-lm's, or one of transformers.
        messages, tools: what the chat template gets.
        place: the beginning of error messages: where the conversation is.

    Raises:
        InputError: the template does not say for certain which tokens are a turn's. The message names ``place``.
    """
    tokens = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    _check_calls(tokenizer, messages, tools, place)
    if _marks_turns(tokenizer, tools):
        spans = _marked(tokenizer, messages, tools, tokens, place)
    else:
        whole = _text(tokenizer, messages, tools)
        numbers = [k for k, message in enumerate(messages) if is_turn(message)]
        found = [_turn(tokenizer, messages, tools, k, whole, place) for k in numbers]
        spans = _tokens_of(tokenizer, whole, tokens, found, place)
    if not spans:
        raise InputError(f"{place}: the chat template marks no token as the assistant's; {_REMEDY}")
    return tokens, spans


def _text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)


def _check_calls(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, place: str) -> None:
    """Raises an error if the template does not write the calls of tools: answers without them would be trained."""
    calling = [k for k, message in enumerate(messages) if message.get("tool_calls")]
    whole = _text(tokenizer, messages, tools) if calling else ""
    for k in calling:
        without = {key: value for key, value in messages[k].items() if key != "tool_calls"}
        try:
            written = _text(tokenizer, [*messages[:k], without, *messages[k + 1 :]], tools) != whole
        except Exception:
            written = True  # a template that fails without them knows them
        if not written:
            raise InputError(
                f"{place}: the chat template leaves out the tool_calls of message {k + 1}, so {_OPTION} would train an"
                " answer without them; use a model whose chat template writes them, or remove the example"
            )


def _turn(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, k: int, whole: str, place: str
) -> tuple[int, int]:
    """The characters of ``whole`` that are the turn of message ``k``."""
    if k == 0:
        raise InputError(
            f"{place}: message 1 is the assistant's; with {_OPTION} a message of the user or the system must come first"
        )
    try:
        before = _text(tokenizer, messages[:k], tools, prompt=True)
        # The last turn ends the conversation, whose text is there already: templates are slow.
        through = whole if k + 1 == len(messages) else _text(tokenizer, messages[: k + 1], tools)
    except TemplateError as error:
        raise InputError(
            f"{place}: the chat template refuses the messages up to number {k + 1} alone ({error}), so {_OPTION} cannot"
            f" find that turn; {_REMEDY}"
        ) from error
    if not (through.startswith(before) and whole.startswith(through)):
        raise InputError(
            f"{place}: the chat template writes messages 1 to {k + 1} differently when it writes them alone (it may"
            f" leave out earlier reasoning, or move text), so {_OPTION} cannot find the turn of message {k + 1};"
            f" {_REMEDY}"
        )
    return len(before), len(through)


def _tokens_of(tokenizer: Any, whole: str, tokens: list[int], found: list[Span], place: str) -> list[Span]:
    """The tokens of each turn; ``found`` has the characters of ``whole``, the text of all ``tokens``."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if getattr(inner, "is_fast", False):
        encoded = inner(whole, add_special_tokens=False, return_offsets_mapping=True)
        same, offsets = encoded["input_ids"] == tokens, encoded["offset_mapping"]
        begins, ends = ([each[side] for each in offsets] for side in (0, 1))
        spans = [(bisect_left(begins, begin), bisect_right(ends, end)) for begin, end in found]
    else:  # these do not say which characters a token has
        parts = [[tokenizer.encode(whole[:at], add_special_tokens=False) for at in turn] for turn in found]
        same = all(tokens[: len(part)] == part for turn in parts for part in turn)
        spans = [(len(before), len(through)) for before, through in parts]
    if not same:
        raise InputError(
            f"{place}: the tokens of a part of the conversation are not a part of its tokens, so {_OPTION} cannot find"
            f" the assistant's turns; {_REMEDY}"
        )
    return spans


def _marks_turns(tokenizer: Any, tools: Any) -> bool:
    if getattr(tokenizer, "_chat_template", None) is not None:  # a function of mlx-lm
        return False
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    return _MARK.search(inner.get_chat_template(tools=tools)) is not None


def _marked(tokenizer: Any, messages: Any, tools: Any, tokens: list[int], place: str) -> list[Span]:
    """The spans that the template marks, as transformers finds them."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    # What mlx-lm adds to each call of a template.
    more = {getattr(tokenizer, "_thinking_kwarg", "enable_thinking"): getattr(tokenizer, "has_thinking", False)}
    found = inner.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    if found["input_ids"] != tokens:
        raise InputError(
            f"{place}: the tokens that the chat template marks for {_OPTION} are not those that are trained; {_REMEDY}"
        )
    spans, at = [], 0
    for trained, run in groupby(found["assistant_masks"]):
        count = len(list(run))
        spans += [(at, at + count)] if trained else []
        at += count
    return spans
