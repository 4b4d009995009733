"""The loss of language models: which tokens are its targets, and what it is beside mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from compiled_adam import losses
from compiled_adam.finetune.batches import Batches
from mlx_lm.tuner.trainer import default_loss

VOCABULARY = 50


def logits(length: int, rows: int = 1, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((rows, length, VOCABULARY), key=mx.random.key(length)).astype(dtype)


def by_hand(scores: mx.array, tokens: list[int], targets: list[int]) -> float:
    """The mean over the tokens at ``targets``, in float64."""
    found = np.array(scores.astype(mx.float32)).astype(np.float64)[0]
    log_softmax = found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
    return -float(np.mean([log_softmax[i - 1, tokens[i]] for i in targets]))


@pytest.mark.filterwarnings("ignore:an example has")  # it is to be cut
@pytest.mark.parametrize(
    ("length", "offset", "cut", "targets"),
    [
        (10, 0, 64, range(1, 10)),  # padded to 33
        (10, 1, 64, range(1, 10)),
        (10, 4, 64, range(4, 10)),  # a prompt of four tokens
        (32, 0, 64, range(1, 32)),  # one token of padding
        (64, 0, 64, range(1, 64)),  # no padding
        (100, 0, 64, range(1, 64)),  # cut: the last token that is left is a target
        (100, 60, 64, range(60, 64)),
        (100, 63, 64, [63]),
        (100, 64, 64, []),  # the prompt fills the length
        (100, 80, 64, []),
        (10, 10, 64, []),  # nothing after the prompt
        (1, 0, 64, []),  # nothing before the only token
        (2, 0, 64, [1]),
    ],
)
def test_the_targets_are_the_tokens_from_the_offset_to_the_end(length: int, offset: int, cut: int, targets) -> None:
    tokens = list(range(1, length + 1)) if length < VOCABULARY else [1 + i % 40 for i in range(length)]
    (batch,) = Batches([(tokens, offset)], 1, cut)
    scores = logits(batch[0].shape[1] - 1)

    def loss(scores: mx.array):
        return losses.next_token(lambda inputs: scores, *batch)

    (value, count), gradient = mx.value_and_grad(loss)(scores)
    assert count.item() == len(targets)
    expected = by_hand(scores, tokens, list(targets)) if targets else 0.0
    assert value.item() == pytest.approx(expected, rel=1e-6)  # float32
    moved = np.flatnonzero(np.abs(np.array(gradient[0])).sum(axis=-1))
    assert moved.tolist() == [i - 1 for i in targets]  # the logits that predict a target, and no others at all


def test_rows_of_a_batch_have_their_own_targets() -> None:
    batch = next(Batches([([1] * 5, 0), ([2] * 40, 30), ([3] * 9, 9)], 3, 64))
    _, count = losses.next_token(lambda inputs: mx.zeros((*inputs.shape, VOCABULARY)), *batch)
    assert count.item() == 4 + 10 + 0


def test_mlx_lms_loss_trains_the_padding() -> None:
    """The difference, so that we notice if mlx-lm changes."""
    batch = next(Batches([([1, 2, 3], 0)], 1, 64))
    scores = logits(32)
    theirs, count = default_loss(lambda inputs: scores, *batch)
    assert count.item() == 3
    assert theirs.item() == pytest.approx(by_hand(scores, [1, 2, 3, 0], [1, 2, 3]), rel=1e-6)
    # Where nothing is padded they are one.
    full = next(Batches([([4] * 64, 3)], 1, 64))
    scores = logits(63)
    both = [loss(lambda inputs: scores, *full) for loss in (default_loss, losses.next_token)]
    assert [count.item() for _, count in both] == [61, 61]
    assert both[0][0].item() == pytest.approx(both[1][0].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_have_a_loss_in_float32(dtype: mx.Dtype) -> None:
    batch = next(Batches([([1, 2, 3, 4], 0)], 1, 64))
    scores = logits(32, dtype=dtype)
    value, _ = losses.next_token(lambda inputs: scores, *batch)
    assert value.dtype == mx.float32
    assert value.item() == pytest.approx(by_hand(scores, [1, 2, 3, 4], [1, 2, 3]), rel=1e-6)


def test_the_fused_kernel_of_gpus_computes_the_same() -> None:
    if not hasattr(mx.fast, "cross_entropy"):
        pytest.skip("this MLX has no such kernel")
    scores, targets = logits(9), mx.arange(9)[None]
    ours, fused = losses.cross_entropy(scores, targets), mx.fast.cross_entropy(scores, targets)
    assert fused.dtype == mx.float32 and mx.allclose(ours, fused, rtol=1e-6).item()


def test_logits_of_the_padding_that_are_not_numbers_do_not_count() -> None:
    batch = next(Batches([([1, 2, 3], 0)], 1, 64))
    scores = logits(32)
    value, _ = losses.next_token(lambda inputs: mx.where(mx.arange(32)[:, None] < 2, scores, mx.nan), *batch)
    assert value.item() == pytest.approx(by_hand(scores, [1, 2, 3], [1, 2]), rel=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_loss_of_mlx_lm(dtype: mx.Dtype) -> None:
    batch = next(Batches([([1] * 5, 0), ([2] * 40, 30), ([3] * 64, 9), ([4] * 33, 33)], 4, 64))
    scores = logits(batch[0].shape[1] - 1, rows=4, dtype=dtype)

    def found(loss):
        return mx.value_and_grad(lambda scores: loss(lambda inputs: scores, *batch))(scores)

    (ours, count), gradient = found(losses.like_mlx_lm)
    (theirs, expected), other = found(default_loss)
    assert count.item() == expected.item() == losses.next_token(lambda inputs: scores, *batch)[1].item() + 3
    assert ours.item() == theirs.item() and mx.array_equal(gradient, other).item()  # the same operations
    # Where mlx-lm divides by zero, it is 0.
    nothing = mx.array([[1, 2, 3]]), mx.array([[3, 2]])
    assert [x.item() for x in losses.like_mlx_lm(lambda inputs: scores[:1, :2], *nothing)] == [0, 0]
