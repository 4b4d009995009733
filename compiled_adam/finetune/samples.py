"""What a model says to a few prompts of the validation set, before and after the training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm import stream_generate

from ..base import InputError, random_state
from ..distributed import Workers
from .options import called
from .record import Record
from .rows import Located, conversation
from .turns import is_turn

MOST = 64  # tokens of an answer, and of the beginning of a text that is a prompt

Answers = list[dict[str, str]]
Sample = Callable[[nn.Module, Callable[[], bool]], Answers]


class Prompt(NamedTuple):
    """A prompt as tokens and as text, and what the example says after it."""

    data: Any
    tokens: list[int]
    text: str
    expected: str


def prompts(dataset: Located, count: int, max_seq_length: int) -> list[Prompt]:
    """The prompts of ``count`` examples from everywhere in a data set, each of ``max_seq_length`` tokens at most.

    The prompt of a conversation ends before the last turn of the assistant, the prompt of a text in the middle or
    after `MOST` tokens.

    Raises ValueError if the chat template refuses an example.
    """
    count = min(count, len(dataset))
    return [_prompt(dataset, i * len(dataset) // count, max_seq_length) for i in range(count)]


def _prompt(dataset: Located, index: int, max_seq_length: int) -> Prompt:
    row = dataset[index]
    data, messages = row.data, conversation(row)
    tokenizer = data.tokenizer
    if not messages:
        tokens = tokenizer.encode(row[data.text_key])
        cut = max(1, min(len(tokens) // 2, MOST))
        rest = tokenizer.decode(tokens[cut : cut + MOST])
        return Prompt(data, tokens[:cut][-max_seq_length:], tokenizer.decode(tokens[:cut]), rest)
    last = max((i for i, message in enumerate(messages) if i and is_turn(message)), default=len(messages))
    try:
        tokens = tokenizer.apply_chat_template(
            messages[:last], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # of the template
        raise InputError(
            f"{row.place} makes no prompt for {called('sample_prompts')}: {error}; mend the example, or leave the"
            " option out"
        ) from error
    expected = _content(messages[last]) if last < len(messages) else ""
    return Prompt(data, list(tokens)[-max_seq_length:], _content(messages[last - 1]), expected)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def answers(model: nn.Module, stop: Callable[[], bool], chosen: Sequence[Prompt]) -> Answers:
    """The model's most probable answers of up to `MOST` tokens; fewer answers if ``stop()`` becomes true."""
    found: Answers = []
    for prompt in chosen:
        text = ""
        for part in stream_generate(model, prompt.data.tokenizer, prompt=prompt.tokens, max_tokens=MOST):
            if stop():
                return found
            text += part.text
        found.append({"prompt": prompt.text, "expected": prompt.expected, "answer": text})
    return found


@dataclass(frozen=True)
class Sampling:
    """Puts the result of ``sample(model, stop)`` into the ``record``, of the first worker; the others wait.

    ``sample`` is None if nobody wants samples. Its errors never end the run: ``warn`` gets a sentence.
    """

    sample: Sample | None
    record: Record
    workers: Workers
    stop: Callable[[], bool]
    warn: Callable[[str], None]

    def first(self, model: nn.Module, iteration: int) -> None:
        """Takes samples, unless the record has some from before."""
        self._take(model, iteration, bool(self.record.samples))

    def last(self, model: nn.Module, iteration: int) -> None:
        """Takes samples, unless the record has those of this iteration."""
        self._take(model, iteration, any(each["iteration"] == iteration for each in self.record.samples))

    def _take(self, model: nn.Module, iteration: int, taken: bool) -> None:
        if self.sample is not None:
            self.workers.first_does(partial(self._take_here, self.sample, model, iteration, taken))

    def _take_here(self, sample: Sample, model: nn.Module, iteration: int, taken: bool) -> None:
        if taken or self.stop():
            return
        random = random_state.get()
        model.eval()
        try:
            found = sample(model, self.stop)
        except Exception as error:  # as of a model that mlx-lm cannot generate with
            self.warn(f"no samples of the model after iteration {iteration}: {error!r}; the run goes on")
        else:
            if not self.stop():
                self.record.add(iteration, found)
        finally:
            model.train()
            random_state.assign(random)
