"""What ``compiled-adam lora`` says before and after the table: the job, and the next command to type."""

from __future__ import annotations

import contextlib
import shlex
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from ..base import TrainingStopped
from ..distributed import join
from ..finetune.names import BEST, BEST_LOSS
from ..finetune.saving import has_checkpoints
from . import like_mlx_lm

_WORDS = 6  # of an example, for a prompt


def facts(
    args: types.SimpleNamespace, model: nn.Module, train_set: Any, valid_set: Any, padding: str | None
) -> Iterator[tuple[str, str]]:
    """The names and values in the box above the table."""
    yield "model", str(args.model)
    yield "data", f"{args.data}: {len(train_set):,} examples, {len(valid_set):,} for validation"
    trainable = dict(tree_flatten(model.trainable_parameters()))
    trained, total = sum(each.size for each in trainable.values()), get_total_parameters(model)
    kind = args.fine_tune_type
    if args.lora_parameters:
        kind += f" of rank {args.lora_parameters['rank']}"
    layers = "all layers" if args.num_layers < 0 else f"{args.num_layers} layers"
    yield "trains", f"{kind}, {layers}: {trained:,} of {total:,} parameters ({100 * trained / total:.3g} %)"
    rate = f"{args.learning_rate:g}" if args.lr_schedule is None else f"from the schedule {args.lr_schedule['name']}"
    yield "optimizer", f"{args.optimizer}, learning rate {rate}"
    if padding is not None:
        yield "padding", padding
    yield "results", like_mlx_lm.differences(args)


@contextlib.contextmanager
def how_to_go_on(args: types.SimpleNamespace) -> Iterator[None]:
    """If the run is stopped, prints the command that goes on from its checkpoint."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, TrainingStopped):
        alone = join(args.worker_timeout).size() == 1  # or else the command is the launcher's
        if alone and has_checkpoints(Path(args.adapter_path)) and (typed := getattr(args, "typed", None)):
            resume = [] if args.resume == "auto" else ["--resume"]
            print(f"to go on: {shlex.join(['compiled-adam', 'lora', *typed, *resume])}")
        raise


def generate(args: types.SimpleNamespace, examples: Any) -> str:
    """The command that shows what the model has learned, with a prompt from the ``examples``."""
    folder = Path(args.adapter_path)
    # A run without a finite validation loss has none.
    adapters = folder / BEST if args.save_best and (folder / BEST / BEST_LOSS).exists() else folder
    words = {"--model": args.model, "--adapter-path": adapters, "--prompt": prompt(examples[0] if examples else {})}
    return f"mlx_lm.generate {' '.join(f'{flag} {shlex.quote(str(word))}' for flag, word in words.items())}"


def prompt(example: Mapping[str, Any]) -> str:
    """The words that a user would type to get an example: the first message, the prompt, or how a text begins.

    >>> prompt({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]})
    'Who are you?'
    >>> prompt({"text": "To fine-tune a model\\nuse the command that is described below."})
    'To fine-tune a model use the'
    """
    messages = example.get("messages")  # in a data set of prompts they may be anything
    turns = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    asked = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    found = next((text for text in (*asked, example.get("prompt")) if isinstance(text, str)), None)
    if found is None:
        text = example.get("text")
        found = " ".join(text.split()[:_WORDS]) if isinstance(text, str) else ""
    return " ".join(found.split()) or "Hello"
