"""The memory of a step, computed from shapes alone: of the forward and backward pass of a batch, and of the update.

The gradient of the model's own classes is traced, and `base.peak` follows its evaluation. So a new architecture needs
nothing here. What a trace cannot show, because MLX exports no ``custom_function``, is put together from parts: layers
that are computed again (`recompute`), and a head whose logits exist in chunks (`linear_cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..base import Graph, InputError, Places, operations, peak, strided, traced
from ..optimizers import Adam
from ..step import chunk_rows, kept, kept_gradient, losses, trainable_of, update_of
from .attention import in_blocks
from .experts import traceable
from .head import Parts, place
from .recompute import Call, floats, holding, places_of, replaced

Head = Callable[[mx.array, mx.array], list[mx.array]]  # of hidden states and tokens
# Classes of mlx-lm raise one of these if a config does not fit, or if they need a GPU.
_OF_MODELS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RuntimeError)
MOST_OPERATIONS = 30_000  # of a forward pass; a larger graph is traced for minutes
MOST_CHUNKS = 32  # that are followed; further ones take the same memory again


class Batch(NamedTuple):
    """The largest batch of a job, and how its gradient is computed."""

    rows: int  # examples
    length: int  # positions that the model sees of each
    recomputed: bool = False  # --grad-checkpoint
    chunked: bool = True  # --chunked-loss, of which all positions are targets
    loss: Callable[..., Any] = losses.next_token  # if it is not chunked
    blocks: bool = True  # attention as `attention.in_blocks` computes it

    @property
    def tokens(self) -> mx.array:
        return mx.zeros((self.rows, self.length + 1), mx.int32)

    def loss_of(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """The loss with all logits at once."""
        return self.loss(model, tokens, mx.array([[0, self.length + 1]] * self.rows))[0]


class Pass(NamedTuple):
    """Bytes that a forward and backward pass allocates at most, beside those of the weights."""

    most: int  # all gradients included
    logits: int  # what the head and the loss have of that, if nothing else is there


def of_pass(model: nn.Module, batch: Batch) -> Pass:
    """The memory for the gradient of ``model``, whose arrays may be lazy: none is evaluated.

    Raises:
        ValueError: the model cannot be called with tokens alone, or cannot be taken apart. The message says why.
    """
    with _refusing("activations"), in_blocks(batch.blocks):
        if (parts := place(model)) is None:
            if batch.recomputed:
                raise InputError("the model has no backbone where the models of mlx-lm have it")
            return Pass(peak(_graph(model, partial(_whole, model, batch), batch.tokens)), 0)
        _check_length(model, parts, batch.length)
        head = partial(_head_in_chunks, model, parts) if batch.chunked else partial(_head, model, parts, batch)
        gradient = partial(_recomputing if batch.recomputed else _gradient, model, parts, head)
        hidden = parts.hidden(model, batch.tokens[:, :-1])
        return Pass(peak(_graph(model, gradient, batch.tokens)), peak(_graph(model, head, hidden, batch.tokens)))


def layout(model: nn.Module) -> list[bool]:
    """Whether the elements of each gradient are in another order than that of the memory, for batches of any size.

    That of the weight of ``nn.Linear`` is transposed, that of an embedding is not.
    """
    batch = Batch(1, 2)
    with _refusing("activations"):
        return strided(_graph(model, partial(_whole, model, batch), batch.tokens))[1:]


def of_update(model: nn.Module, optimizer: optim.Optimizer, accumulate: int, layout: list[bool]) -> int:
    """The most bytes beside weights, state and window, gradients included. All arrays may be lazy, none is evaluated.

    The gradients are there at once. Each is freed when its parameter has been updated. Until then there are copies of
    gradients in the order of the memory, packs, sums of squares, joined weights and guesses of square roots, of as many
    parameters as are being updated at a time. ``layout`` is that of the gradients, from `layout`.

    Raises:
        ValueError: the update cannot be traced. The message says why.
    """
    with _refusing("the update's memory"):
        update = update_of(model, optimizer, accumulate)
        gradients = [mx.zeros(each.shape, each.dtype) for each in update.gradients]
        graph = traced(update.function, *gradients, *update.arrays)
        strided = [*layout, *(False for _ in update.arrays)]
        owned = dict(zip(graph.inputs, strided, strict=True))
        streams = 2 if isinstance(optimizer, Adam) else 1
        return peak(graph, owned, streams) - sum(array.nbytes for array in update.arrays)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Errors of a model inside the block become one that says in a line what cannot be computed."""
    try:
        yield
    except _OF_MODELS as error:
        raise InputError(f"{what} cannot be computed: {str(error).partition(chr(10))[0]}") from error


def _check_length(model: nn.Module, parts: Parts, length: int) -> None:
    """Raises ValueError for a model that computes one position after the other, and too many of them."""
    two, three = (operations([parts.hidden(model, mx.zeros((1, count), mx.int32))]) for count in (2, 3))
    if (made := (three - two) * length) > MOST_OPERATIONS:
        raise InputError(
            f"the model computes one position after the other, so the graph of {length} has more than {made:,}"
            " operations, which take long to trace, and to train; give a --max-seq-length of at most"
            f" {MOST_OPERATIONS // (three - two)}"
        )


def _whole(model: nn.Module, batch: Batch, tokens: mx.array) -> list[mx.array]:
    """The loss and the gradients, with all logits at once."""
    trained = _trained(model)

    def loss(parameters: list[mx.array]) -> mx.array:
        trained.write(parameters)
        return batch.loss_of(model, tokens)

    value, found = mx.value_and_grad(loss)(trained.read())
    return [value, *found]


def _gradient(model: nn.Module, parts: Parts, head: Head, tokens: mx.array) -> list[mx.array]:
    trained = _trained(model)

    def objective(parameters: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        trained.write(parameters)
        hidden = parts.hidden(model, tokens[:, :-1])
        loss, cotangent, *others = head(mx.stop_gradient(hidden), tokens)
        # The gradient of this sum is the cotangent, and nobody asks for the sum.
        return (hidden * mx.stop_gradient(cotangent)).sum(), [loss, *others]

    (_, others), found = mx.value_and_grad(objective)(trained.read())
    return [*others, *found]


def _recomputing(model: nn.Module, parts: Parts, head: Head, tokens: mx.array) -> list[mx.array]:
    """The gradient of layers that are computed again, in the order of `recompute`, and of nothing between them."""
    calls, hidden = _calls(model, parts, tokens)
    loss, cotangent, *others = head(hidden, tokens)
    found: list[mx.array] = []
    for call in reversed(calls):
        inputs = mx.depends(call.inputs, [cotangent])
        own, (cotangent, *_) = call.gradients(mx.vjp(partial(_first, call), inputs, [cotangent])[1])
        found = [*own, *found]
    return [loss, *others, *found]


def _first(call: Call, *inputs: mx.array) -> list[mx.array]:
    return floats(call(inputs))[:1]


def _head(model: nn.Module, parts: Parts, batch: Batch, hidden: mx.array, tokens: mx.array) -> list[mx.array]:
    """The loss, and its gradient with respect to the hidden states."""

    def loss(hidden: mx.array) -> mx.array:
        with parts.replaced(lambda *args, **kwargs: hidden):
            return batch.loss_of(model, tokens)

    return list(mx.value_and_grad(loss)(hidden))


def _head_in_chunks(model: nn.Module, parts: Parts, hidden: mx.array, tokens: mx.array) -> list[mx.array]:
    """What `losses.linear_cross_entropy` computes, in the same order: the loss, and its gradients with respect to the
    hidden states and the trained parameters of the head."""
    head = parts.head(model)
    shape, hidden, targets = hidden.shape, hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    own, sample = trainable_of(head, mx.zeros((1, shape[-1]), hidden.dtype))
    size = chunk_rows(sample.shape[-1])
    total, pieces, counts = mx.array(0.0), list[mx.array](), mx.ones(targets.shape, mx.bool_)
    sums = [mx.zeros(array.shape, mx.float32) for array in own.read()]
    for start in range(0, min(len(hidden), MOST_CHUNKS * size), size):
        rows = mx.depends([hidden[start : start + size]], [total, *sums, *pieces[-1:]])[0]
        loss, cotangent = _loss(head(rows), targets[start : start + size], counts[start : start + size])

        def logits(rows: mx.array, *parameters: mx.array) -> mx.array:
            with holding(own, parameters):
                return head(rows)

        _, (piece, *more) = mx.vjp(logits, [rows, *own.read()], [cotangent])
        total = total + loss
        pieces.append(piece)
        sums = [one + another.astype(mx.float32) for one, another in zip(sums, more, strict=True)]
    rest = mx.zeros((max(0, len(hidden) - MOST_CHUNKS * size), shape[-1]), hidden.dtype)
    return [total, mx.concatenate([*pieces, rest]).reshape(shape), *sums]


def _loss(logits: mx.array, targets: mx.array, counts: mx.array) -> tuple[mx.array, mx.array]:
    """The loss of a chunk and its gradient, as `kept_cross_entropy` computes them."""
    each, powers, total = kept(logits, targets)
    # The results of a custom function are there together.
    each, powers, total = mx.depends([each, powers, total], [each, logits])
    loss, factor = mx.value_and_grad(lambda each: mx.where(counts, each, 0.0).sum())(each)
    cotangent, _ = kept_gradient((logits, targets), [factor], (each, powers, total))
    return loss, cotangent


def _calls(model: nn.Module, parts: Parts, tokens: mx.array) -> tuple[list[Call], mx.array]:
    """The calls of the layers in a forward pass, from the first layer that is trained, and the hidden states."""
    calls: list[Call] = []

    def recording(layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        calls.append(Call(layer, call, args, kwargs))
        return call(layer, *args, **kwargs)

    layers: Any = model.layers
    with replaced(layers, recording):
        hidden = parts.hidden(model, tokens[:, :-1])
    first = next((i for i, each in enumerate(calls) if len(each.trained)), len(calls))
    return calls[first:], hidden


def _graph(model: nn.Module, function: Callable[..., list[mx.array]], *inputs: mx.array) -> Graph:
    """The graph of ``function(*inputs)``, which refers to arrays of the model."""
    every = places_of(model.parameters(), model)
    before = every.read()

    def of_arrays(*arrays: mx.array) -> list[mx.array]:
        every.write(arrays[: len(every)])
        return function(*arrays[len(every) :])

    with holding(every, before), traceable(model) as of_run:
        return of_run(traced(of_arrays, *before, *inputs))


def _trained(model: nn.Module) -> Places:
    return places_of(model.trainable_parameters(), model)
