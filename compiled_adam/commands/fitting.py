"""The options that make a job fit into memory: those that cost its user least come first."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SHORTEST = 128  # no smaller --max-seq-length is proposed


def changed(args: types.SimpleNamespace, values: Mapping[str, Any]) -> types.SimpleNamespace:
    """The settings ``args`` with other values."""
    return types.SimpleNamespace(**{**vars(args), **values})


def found(
    args: types.SimpleNamespace, workers: int, fits: Callable[[types.SimpleNamespace], bool]
) -> dict[str, Any] | None:
    """The changed settings with which the job ``fits``: {} if it does as it is, and None if nothing here makes it fit.

    `remedies` are added one by one until it fits. Then those that are not needed are left out, the costliest first.
    """
    if fits(args):
        return {}
    added: list[dict[str, Any]] = []
    for remedy in remedies(args, workers):
        added = [each for each in added if each.keys() != remedy.keys()] + [remedy]
        if fits(changed(args, _together(added))):
            break
    else:
        return None
    for each in added[-2::-1]:
        fewer = [other for other in added if other is not each]
        if fits(changed(args, _together(fewer))):
            added = fewer
    return _together(added)


def remedies(args: types.SimpleNamespace, workers: int) -> Iterator[dict[str, Any]]:
    """Settings that save memory. The first cost nothing, then time, then precision of the state; the last cut examples.

    Smaller batches are accumulated, so that the updates stay the same.
    """
    if not args.chunked_loss:
        yield {"chunked_loss": True}
    if not args.grad_checkpoint:
        yield {"grad_checkpoint": True}
    if args.optimizer in ("adam", "adamw") and args.moments != "8bit":
        yield {"moments": "8bit"}
    accumulated, length = args.grad_accumulation_steps, args.max_seq_length
    if args.batch_tokens is None:
        name, size, least = "batch_size", args.batch_size, workers
    else:
        name, size, least = "batch_tokens", args.batch_tokens, workers * length
    while size % 2 == 0 and size // 2 >= least and size // 2 % workers == 0:
        size, accumulated = size // 2, 2 * accumulated
        yield {name: size, "grad_accumulation_steps": accumulated}
    while length // 2 >= SHORTEST:
        length //= 2
        yield {"max_seq_length": length}


def flags(values: Mapping[str, Any]) -> str:
    """The settings as a part of a command line.

    >>> flags({"grad_checkpoint": True, "batch_size": 2})
    '--grad-checkpoint --batch-size 2'
    """
    return " ".join(
        f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}" for name, value in values.items()
    )


def _together(remedies: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for each in remedies for name, value in each.items()}
