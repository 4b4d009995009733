"""The cross entropy of a head in chunks of rows: its loss, its gradients and its memory."""

from __future__ import annotations

from functools import partial

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam import losses
from compiled_adam.base import kernels
from mlx.utils import tree_flatten

WIDTH, VOCABULARY, SHAPE = 32, 128, (3, 25)


class Tied(nn.Module):
    """Embeddings, one layer, and the embeddings again as the head, with a cap as Gemma 2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def hidden(self, tokens: mx.array) -> mx.array:
        return mx.tanh(self.layer(self.embed(tokens)))

    def head(self, rows: mx.array) -> mx.array:
        return mx.tanh(self.embed.as_linear(rows) / 3) * 3


def batch() -> tuple[mx.array, mx.array, mx.array]:
    """Tokens, targets, and which of them count: about half."""
    keys = mx.random.split(mx.random.key(1), 3)
    tokens, targets = (mx.random.randint(0, VOCABULARY, SHAPE, key=key) for key in keys[:2])
    return tokens, targets, mx.random.bernoulli(0.5, SHAPE, key=keys[2])


def whole(model: Tied, tokens: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    each = losses.cross_entropy(model.head(model.hidden(tokens)), targets)
    return mx.where(mask, each, 0.0).sum() / mx.maximum(mask.sum(), 1)


def in_chunks(model: Tied, tokens: mx.array, targets: mx.array, mask: mx.array, **options) -> mx.array:
    return losses.linear_cross_entropy(model.hidden(tokens), model.head, targets, mask, **options)[0]


def assert_same(ours: object, expected: object, tolerance: float) -> None:
    ours, expected = dict(tree_flatten(ours)), dict(tree_flatten(expected))
    assert ours.keys() == expected.keys()
    for path, array in expected.items():
        assert ours[path].dtype == array.dtype
        apart = mx.abs(ours[path].astype(mx.float32) - array.astype(mx.float32)).max()
        assert apart.item() <= tolerance * mx.abs(array).max().item(), path


# float32 sums in another order, and exponentials of another of MLX's kernels: measured 3e-6 of the largest.
EXACT = 1e-5


@pytest.mark.parametrize("rows", [1, 7, 25, 75, 1000, None])
@pytest.mark.parametrize("ahead", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(rows: int | None, ahead: bool) -> None:
    model = Tied()
    expected, gradients = nn.value_and_grad(model, whole)(model, *batch())
    loss, ours = nn.value_and_grad(model, partial(in_chunks, rows=rows, ahead=ahead))(model, *batch())
    assert loss.dtype == mx.float32 and loss.item() == pytest.approx(expected.item(), rel=EXACT)
    assert_same(ours, gradients, EXACT)


def test_a_frozen_head_of_any_kind() -> None:
    _, targets, mask = batch()
    hidden = mx.random.normal((*SHAPE, 64), key=mx.random.key(0))
    linear = nn.Linear(64, VOCABULARY)
    quantized, weight = nn.QuantizedLinear.from_linear(linear, 32, 4), mx.random.normal((64, VOCABULARY))
    mx.eval(weight)  # a constant
    for head in (linear, quantized, lambda rows: 0.5 * (rows @ weight)):
        if isinstance(head, nn.Module):
            head.freeze()

        def plain(hidden: mx.array, head=head) -> mx.array:
            return mx.where(mask, losses.cross_entropy(head(hidden), targets), 0.0).sum() / mask.sum()

        def ours(hidden: mx.array, head=head) -> mx.array:
            return losses.linear_cross_entropy(hidden, head, targets, mask, rows=16)[0]

        expected, found = mx.value_and_grad(plain)(hidden), mx.compile(mx.value_and_grad(ours))(hidden)
        assert found[0].item() == pytest.approx(expected[0].item(), rel=EXACT)
        assert_same([found[1]], [expected[1]], EXACT)


def test_without_a_target_loss_and_gradient_are_zero() -> None:
    model, (tokens, targets, mask) = Tied(), batch()
    loss, gradients = nn.value_and_grad(model, in_chunks)(model, tokens, targets, mx.zeros_like(mask))
    assert loss.item() == 0
    assert all(mx.all(gradient == 0).item() for _, gradient in tree_flatten(gradients))


@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_rows_that_do_not_count_may_be_infinite(device: mx.DeviceType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))  # chooses how the gradient is computed
    model, (tokens, targets, mask) = Tied(), batch()
    hidden = mx.where(mask[..., None], model.hidden(tokens), mx.inf)
    ours = mx.value_and_grad(
        lambda hidden: losses.linear_cross_entropy(hidden, nn.Linear(WIDTH, 8), targets % 8, mask)[0]
    )
    loss, gradient = ours(hidden)
    assert np.isfinite(loss.item())
    assert mx.all(mx.isfinite(gradient[mx.array(np.flatnonzero(np.array(mask)) // SHAPE[1])])).item()


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32() -> None:
    """Each of 512 chunks of one row adds a 512th part: a sum in bfloat16 would stop to grow at 256 of them."""
    head = nn.Linear(2, 2, bias=False)
    head.weight = mx.zeros((2, 2), mx.bfloat16)
    hidden = mx.ones((512, 2), mx.bfloat16)

    def loss(head: nn.Linear) -> mx.array:
        return losses.linear_cross_entropy(hidden, head, mx.zeros((512,), mx.int32), rows=1)[0]

    gradient = nn.value_and_grad(head, loss)(head)[1]["weight"]
    assert gradient.dtype == mx.bfloat16
    assert gradient.tolist() == [[-0.5, -0.5], [0.5, 0.5]]  # softmax is one half everywhere: exact


def test_a_compiled_step_trains_like_that_of_all_logits() -> None:
    """Also that a function's closure is searched for parameters: without that the embeddings would train half."""
    trained = []
    for loss_fn in (whole, partial(in_chunks, rows=16)):
        mx.random.seed(0)
        model = Tied()
        step = ca.make_step(model, loss_fn, ca.AdamW(1e-2))
        values = [step(*batch()).loss.item() for _ in range(20)]
        assert values[-1] < 0.8 * values[0] and step.traces["grad"] == 1
        trained.append((values, model.parameters()))
    assert trained[1][0] == pytest.approx(trained[0][0], rel=1e-4)  # Adam magnifies rounding of small gradients
    assert_same(trained[1][1], trained[0][1], 1e-3)


def test_a_head_that_raises_leaves_the_model_whole() -> None:
    model, (tokens, targets, mask) = Tied(), batch()
    calls = []

    def head(rows: mx.array) -> mx.array:
        calls.append(model.embed.weight)
        if len(calls) == 3:
            raise RuntimeError("third call")
        return model.head(rows)

    before = [array for _, array in tree_flatten(model.parameters())]
    with pytest.raises(RuntimeError, match="third call"):
        losses.linear_cross_entropy(model.hidden(tokens), head, targets, mask, rows=8)
    assert all(a is b for a, (_, b) in zip(before, tree_flatten(model.parameters()), strict=True))
    assert calls[1] is not before[0]  # the chunk computed with an argument in the model's place


def test_errors_name_the_remedy() -> None:
    hidden, targets, head = mx.zeros((2, 3, 4)), mx.zeros((2, 3), mx.int32), nn.Linear(4, 8)
    for arguments, options, message in (
        ((hidden, head, targets[:, :2]), {}, r"give targets of shape \(2, 3\)"),
        ((hidden, head, targets, mx.ones((2, 3))), {}, "such as weights > 0"),
        ((hidden, head, targets), {"rows": 0}, "at least 1, or None"),
        ((hidden[:0], head, targets[:0]), {}, "no rows"),
    ):
        with pytest.raises(ca.InputError, match=message):
            losses.linear_cross_entropy(*arguments, **options)


def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    hidden, targets = mx.ones((5, 4)), mx.zeros((5,), mx.int32)

    def loss(weight: mx.array) -> mx.array:
        return losses.linear_cross_entropy(hidden, lambda rows: rows @ weight, targets)[0]

    for gradient in (mx.grad(loss), mx.compile(mx.grad(loss))):
        with pytest.raises(ca.InputError, match=r"make it a parameter of an nn\.Module"):
            gradient(mx.ones((4, 8)))


@pytest.mark.parametrize("ahead", [True, False])
def test_the_memory_is_that_of_a_chunk(ahead: bool) -> None:
    rows, vocabulary = 256, 100_000  # all logits are 102 MB in float32; those of 8 rows 3.2 MB
    head = nn.Linear(8, vocabulary, bias=False)
    head.freeze()
    hidden, targets = mx.random.normal((rows, 8)), mx.arange(rows)
    mx.eval(head.parameters(), hidden, targets)

    def peak(loss) -> int:
        gradient = mx.compile(mx.value_and_grad(loss))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient(hidden))
        return mx.get_peak_memory() - before

    every = peak(lambda hidden: losses.cross_entropy(head(hidden), targets).mean())
    chunk = peak(lambda hidden: losses.linear_cross_entropy(hidden, head, targets, rows=8, ahead=ahead)[0])
    # Measured 0.09 and 0.11: MLX allocates for some ten operations before they run, and so for several chunks at once.
    assert every > 2 * 4 * rows * vocabulary and chunk < 0.2 * every


@pytest.mark.parametrize(("ahead", "products"), [(True, 4), (False, 2)])
def test_a_loss_without_a_gradient_computes_none(ahead: bool, products: int) -> None:
    """Two chunks: a product with the head for each, and one more for each gradient."""
    head = nn.Linear(8, VOCABULARY, bias=False)
    loss, _ = losses.linear_cross_entropy(mx.ones((32, 8)), head, mx.arange(32), rows=16, ahead=ahead)
    assert kernels([loss])["Matmul"] == products + 2 * ahead  # the weights are trainable: their gradients, too
