"""Tokenizing a whole data set before the training, with progress."""

from __future__ import annotations

from typing import Any

from .console import TrainingProgress

_MANY = 1000  # examples, whose tokenizing takes a second


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
