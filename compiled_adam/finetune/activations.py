"""The memory of the forward and backward pass of a batch, computed from shapes alone.

The gradient of the model's own classes is traced, and `base.peak` follows its evaluation. So a new architecture needs
nothing here. What a trace cannot show, because MLX exports no ``custom_function``, is put together from parts: layers
that are computed again (`recompute`), and a head whose logits exist in chunks (`linear_cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..base import Graph, InputError, Places, along, operations, peak, reached, strided, traced
from ..step import chunk_rows, kept, kept_gradient, losses
from .attention import in_blocks
from .experts import traceable
from .head import Parts, place
from .recompute import floats, replaced, with_floats

Head = Callable[[mx.array, mx.array], list[mx.array]]  # of hidden states and tokens
# Classes of mlx-lm raise one of these if a config does not fit, or if they need a GPU.
OF_MODELS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RuntimeError)
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


class Pass(NamedTuple):
    """Bytes that a forward and backward pass allocates at most, beside those of the weights."""

    most: int  # all gradients included
    logits: int  # what the head and the loss have of that, if nothing else is there


def of_pass(model: nn.Module, batch: Batch) -> Pass:
    """The memory for the gradient of ``model``, whose arrays may be lazy: none is evaluated.

    Raises:
        ValueError: the model cannot be called with tokens alone, or cannot be taken apart. The message says why.
    """
    try:
        with in_blocks(batch.blocks):
            return _of_pass(model, batch)
    except OF_MODELS as error:
        raise _refused(error) from error


def _refused(error: Exception) -> InputError:
    return InputError(f"activations cannot be computed: {str(error).partition(chr(10))[0]}")


def _of_pass(model: nn.Module, batch: Batch) -> Pass:
    tokens = _tokens(batch)
    if (parts := place(model)) is None:
        if batch.recomputed:
            raise InputError("the model has no backbone where the models of mlx-lm have it")
        return Pass(peak(_graph(model, partial(_whole, model, batch), tokens)), 0)
    _check_length(model, parts, batch.length)
    head = partial(_head_in_chunks if batch.chunked else _head, model, parts, batch)
    gradient = partial(_recomputing if batch.recomputed else _gradient, model, parts, head)
    hidden = parts.hidden(model, tokens[:, :-1])
    return Pass(peak(_graph(model, gradient, tokens)), peak(_graph(model, head, hidden, tokens)))


def _check_length(model: nn.Module, parts: Parts, length: int) -> None:
    """Raises ValueError for a model that computes one position after the other, and too many of them."""
    two, three = (operations([parts.hidden(model, mx.zeros((1, count), mx.int32))]) for count in (2, 3))
    if (made := (three - two) * length) > MOST_OPERATIONS:
        raise InputError(
            f"the model computes one position after the other, so the graph of {length} has more than {made:,}"
            " operations, which take long to trace, and to train; give a --max-seq-length of at most"
            f" {MOST_OPERATIONS // (three - two)}"
        )


def layout(model: nn.Module) -> list[bool]:
    """Whether the elements of each gradient are in another order than that of the memory, for batches of any size.

    That of the weight of ``nn.Linear`` is transposed, that of an embedding is not.
    """
    batch = Batch(1, 2)
    try:
        return strided(_graph(model, partial(_whole, model, batch), _tokens(batch)))[1:]
    except OF_MODELS as error:
        raise _refused(error) from error


def _whole(model: nn.Module, batch: Batch, tokens: mx.array) -> list[mx.array]:
    """The loss and the gradients, with all logits at once."""
    trained = _places(model)[1]

    def loss(parameters: list[mx.array]) -> mx.array:
        trained.write(parameters)
        return batch.loss(model, tokens, _lengths(batch))[0]

    value, found = mx.value_and_grad(loss)(trained.read())
    return [value, *found]


def _gradient(model: nn.Module, parts: Parts, head: Head, tokens: mx.array) -> list[mx.array]:
    trained = _places(model)[1]
    others: list[mx.array] = []

    def objective(parameters: list[mx.array]) -> mx.array:
        trained.write(parameters)
        hidden = parts.hidden(model, tokens[:, :-1])
        loss, cotangent, *more = head(mx.stop_gradient(hidden), tokens)
        others.extend([loss, *more])
        # The gradient of this sum is the cotangent, and nobody asks for the sum.
        return (hidden * mx.stop_gradient(cotangent)).sum()

    _, found = mx.value_and_grad(objective)(trained.read())
    return [*others, *found]


def _recomputing(model: nn.Module, parts: Parts, head: Head, tokens: mx.array) -> list[mx.array]:
    """The gradient of layers that are computed again, in the order of `recompute`, and of nothing between them."""
    calls, hidden = _calls(model, parts, tokens)
    loss, cotangent, *others = head(hidden, tokens)
    found: list[mx.array] = []
    for call in reversed(calls):
        own, cotangent = call.gradient(cotangent)
        found = [*own, *found]
    return [loss, *others, *found]


def _head(model: nn.Module, parts: Parts, batch: Batch, hidden: mx.array, tokens: mx.array) -> list[mx.array]:
    """The loss, and its gradient with respect to the hidden states."""

    def loss(hidden: mx.array) -> mx.array:
        with parts.replaced(lambda *args, **kwargs: hidden):
            return batch.loss(model, tokens, _lengths(batch))[0]

    return list(mx.value_and_grad(loss)(hidden))


def _head_in_chunks(model: nn.Module, parts: Parts, batch: Batch, hidden: mx.array, tokens: mx.array) -> list[mx.array]:
    """What `losses.linear_cross_entropy` computes, in the same order: the loss, and its gradients with respect to the
    hidden states and the trained parameters of the head."""
    head, trained = parts.head(model), _places(model)[1]
    shape, hidden, targets = hidden.shape, hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    sample = head(mx.zeros((1, shape[-1]), hidden.dtype))
    used = reached([sample], trained.read())
    own = Places([each for each, is_used in zip(_triples(trained), used, strict=True) if is_used])
    size = chunk_rows(sample.shape[-1])
    total, pieces, counts = mx.array(0.0), list[mx.array](), mx.ones(targets.shape, mx.bool_)
    sums = [mx.zeros(array.shape, mx.float32) for array in own.read()]
    for start in range(0, min(len(hidden), MOST_CHUNKS * size), size):
        rows = mx.depends([hidden[start : start + size]], [total, *sums, *pieces[-1:]])[0]
        loss, cotangent = _loss(head(rows), targets[start : start + size], counts[start : start + size])

        def logits(rows: mx.array, *parameters: mx.array) -> mx.array:
            before = own.read()
            own.write(parameters)
            made = head(rows)
            own.write(before)
            return made

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


class _Call(NamedTuple):
    layer: nn.Module
    call: Callable[..., Any]
    args: Any  # positional and keyword arguments

    def gradient(self, cotangent: mx.array) -> tuple[list[mx.array], mx.array]:
        """The gradients with respect to parameters and the first argument, by that of the result."""
        trained = _places(self.layer)[1]
        before = trained.read()

        def result(*primals: mx.array) -> list[mx.array]:
            trained.write(primals[: len(trained)])
            args, kwargs = with_floats(self.args, iter(primals[len(trained) :]))
            made = floats(self.call(self.layer, *args, **kwargs))
            trained.write(before)
            return made[:1]

        primals = mx.depends([*before, *floats(self.args)], [cotangent])
        _, found = mx.vjp(result, primals, [cotangent])
        own, first = found[: len(trained)], found[len(trained)]
        return own, mx.depends([first], own)[0] if own else first


def _calls(model: nn.Module, parts: Parts, tokens: mx.array) -> tuple[list[_Call], mx.array]:
    """The calls of the layers in a forward pass, from the first layer that is trained, and the hidden states."""
    calls: list[_Call] = []

    def recording(kind: type[nn.Module]) -> Callable[..., Any]:
        call: Callable[..., Any] = kind.__call__

        def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(_Call(self, call, (args, kwargs)))
            return call(self, *args, **kwargs)

        return recorded

    layers: Any = model.layers
    with replaced(layers, recording):
        hidden = parts.hidden(model, tokens[:, :-1])
    first = next((i for i, each in enumerate(calls) if len(_places(each.layer)[1])), len(calls))
    return calls[first:], hidden


def _graph(model: nn.Module, function: Callable[..., list[mx.array]], *inputs: mx.array) -> Graph:
    """The graph of ``function(*inputs)``, which refers to arrays of the model."""
    every = _places(model)[0]
    before = every.read()

    def of_arrays(*arrays: mx.array) -> list[mx.array]:
        every.write(arrays[: len(every)])
        return function(*arrays[len(every) :])

    try:
        with traceable(model) as of_run:
            return of_run(traced(of_arrays, *before, *inputs))
    finally:
        every.write(before)


def _places(module: nn.Module) -> tuple[Places, Places]:
    """The places of all arrays, and of the trained ones."""
    return _along(module.parameters(), module), _along(module.trainable_parameters(), module)


def _along(tree: Any, module: nn.Module) -> Places:
    # A tied module has two paths, and counts once.
    found = {(id(container), key): (path, container, key) for path, container, key in along(tree, module)}
    return Places(list(found.values()))


def _triples(places: Places) -> Iterator[tuple[str, Any, Any]]:
    return ((path, *each) for path, each in zip(places.paths, places.places, strict=True))


def _tokens(batch: Batch) -> mx.array:
    return mx.zeros((batch.rows, batch.length + 1), mx.int32)


def _lengths(batch: Batch) -> mx.array:
    return mx.array([[0, batch.length + 1]] * batch.rows)
