"""A model of mlx-lm in two parts: the backbone, which computes hidden states, and the head, which makes logits of them.

Each model class computes its logits in its own way: with a layer, or with the embeddings, with scales and soft caps. So
the head is the model itself, called with something in the backbone's place that returns given rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from ..base import InputError

# Where the classes of mlx-lm have their backbone.
_BACKBONES = ("language_model.model", "language_model.backbone", "model", "backbone", "transformer")
# Logits of differently many rows differ by rounding: float32 sums of up to 16384 products, or half-precision results.
_ROUNDING = {mx.float32: 1e-4, mx.float16: 2**-7, mx.bfloat16: 2**-5}


class Parts(NamedTuple):
    """The place of the backbone in a model."""

    owner: nn.Module
    key: str

    def hidden(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """The hidden states of ``tokens``, (batch, length, width)."""
        found: list[Any] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            found.append(backbone(*args, **kwargs))
            # The model makes logits of something. They are never computed, because nobody asks for them.
            return found[0][:, :1] if isinstance(found[0], mx.array) else found[0]

        backbone = self.owner[self.key]
        with self.replaced(record):
            model(tokens)
        if len(found) != 1 or not isinstance(found[0], mx.array) or found[0].ndim != 3:
            raise InputError("the backbone is not called once, or returns something else than hidden states")
        return found[0]

    def head(self, model: nn.Module) -> Callable[[mx.array], mx.array]:
        """A function from rows of hidden states, (rows, width), to their logits, (rows, vocabulary)."""

        def logits(rows: mx.array) -> mx.array:
            with self.replaced(lambda *args, **kwargs: rows[None]):
                return model(mx.zeros((1, len(rows)), mx.int32)).squeeze(0)

        return logits

    @contextmanager
    def replaced(self, function: Callable[..., Any]) -> Iterator[None]:
        """Inside the block, ``function`` is called in the place of the backbone."""
        backbone = self.owner[self.key]
        # Items of the dictionary that a module is, and not attributes, whose assignment would change the order.
        self.owner[self.key] = _Stub(backbone, function)
        try:
            yield
        finally:
            self.owner[self.key] = backbone


class _Stub:
    """Is called in the place of a backbone, and has all its attributes, such as the embeddings."""

    def __init__(self, backbone: nn.Module, function: Callable[..., Any]) -> None:
        self._backbone, self._function = backbone, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


def parts(model: nn.Module) -> Parts:
    """The parts of ``model``, after a test on a few tokens that they compute the model's own logits.

    Raises:
        ValueError: they do not. The message says why.
    """
    if (found := place(model)) is None:
        raise InputError("the model has no backbone where the models of mlx-lm have it")
    training = model.training
    model.eval()  # dropout would make two calls differ
    try:
        _compare(model, found)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise InputError(f"the model is not a backbone and a head: {error}") from error
    finally:
        model.train(training)
    return found


def place(model: nn.Module) -> Parts | None:
    """The backbone of ``model``, where the models of mlx-lm have it, without a test; None if there is none."""
    modules = dict(model.named_modules())
    for path in _BACKBONES:
        if path in modules:
            owner, _, key = path.rpartition(".")
            return Parts(modules[owner], key)
    return None


def _compare(model: nn.Module, found: Parts) -> None:
    tokens = mx.arange(1, 9).reshape(2, 4)
    whole = model(tokens)
    expected = whole.reshape(-1, whole.shape[-1])[::-1]  # in another order: a head must treat every row alike
    hidden = found.hidden(model, tokens)
    logits = found.head(model)(hidden.reshape(-1, hidden.shape[-1])[::-1])
    if logits.shape != expected.shape:
        raise InputError(f"its logits have the shape {logits.shape}, not {expected.shape}")
    wide = expected.astype(mx.float32)
    apart = cast(float, (mx.abs(logits.astype(mx.float32) - wide).max() / mx.abs(wide).max()).item())
    if not apart <= _ROUNDING.get(hidden.dtype, 0):
        raise InputError(f"its logits differ by {apart:.1e} of the largest")
