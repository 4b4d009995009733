from __future__ import annotations

from functools import partial

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from nets import assert_same, batch, linear_net, masked_error, net, ragged_batch, squared_error


def eager_steps(model: nn.Module, optimizer: optim.Optimizer, count: int, loss_fn=squared_error) -> list[float]:
    value_and_grad = nn.value_and_grad(model, loss_fn)
    losses = []
    for i in range(count):
        loss, gradients = value_and_grad(model, *batch(i))
        optimizer.update(model, gradients)
        losses.append(loss.item())
    return losses


def compiled_steps(model: nn.Module, optimizer: optim.Optimizer, count: int) -> list[float]:
    value_and_grad = nn.value_and_grad(model, squared_error)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = value_and_grad(model, x, y)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for i in range(count):
        losses.append(step(*batch(i)).item())
        mx.eval(state)
    return losses


OPTIMIZERS = {
    "Adam": lambda: ca.Adam(1e-2, bias_correction=True),
    "AdamW, schedule": lambda: ca.AdamW(ca.schedulers.cosine(1e-2, 10, warmup=3)),
    "stock AdamW": lambda: optim.AdamW(1e-2),
    "SGD": lambda: optim.SGD(1e-2, momentum=0.9),
    "MultiOptimizer": lambda: optim.MultiOptimizer([optim.SGD(1e-2), ca.Adam(1e-2)], [lambda path, p: p.ndim == 2]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eager_users_compile_and_make_step_agree(name: str) -> None:
    # Dropout on, so that the random state matters, and running statistics, so that buffers do. Tolerances: three
    # different graphs of the same float32 formulas, six steps; Adam divides by sqrt(v), which amplifies.
    results = []
    for run in ("eager", "compiled", "step"):
        model, optimizer = net(dropout=0.3), OPTIMIZERS[name]()
        mx.random.seed(3)
        if run == "eager":
            losses = eager_steps(model, optimizer, 6)
        elif run == "compiled":
            losses = compiled_steps(model, optimizer, 6)
        else:
            step = ca.make_step(model, squared_error, optimizer)
            losses = [step(*batch(i)).loss.item() for i in range(6)]
            assert step.traces == {"grad": 1, "accumulate": 0, "update": 1, "evicted": 0}
        results.append((model, losses, mx.random.state[0].tolist()))
    for model, losses, key in results[1:]:
        assert losses == pytest.approx(results[0][1], rel=1e-5)
        assert_same(model, results[0][0], 1e-5)
        assert key == results[0][2]
    assert abs(results[0][1][0] - results[0][1][-1]) > 1e-2


def test_frozen_parameters_stay_and_running_statistics_move() -> None:
    model = net()
    frozen, mean = np.array(model.layers[3].weight), np.array(model.layers[1].running_mean)
    step = ca.make_step(model, squared_error)
    for i in range(3):
        step(*batch(i))
    assert np.array_equal(frozen, np.array(model.layers[3].weight))
    assert not np.array_equal(mean, np.array(model.layers[1].running_mean))
    assert not mx.any(mx.isnan(model.layers[1].running_mean)).item()


def test_the_default_optimizer_is_adam() -> None:
    step = ca.make_step(net(), squared_error)
    assert type(step.optimizer) is ca.Adam
    assert step(*batch()).learning_rate.item() == np.float32(1e-3)


def test_result() -> None:
    def loss_fn(model: nn.Module, x: mx.array, *, y: mx.array, power: int = 2) -> tuple:
        error = mx.abs(model(x) - y) ** power
        return error.mean(), {"worst": error.max()}, "a word", None

    model = net()
    x, y = batch()
    _, gradients = nn.value_and_grad(model, lambda m: loss_fn(m, x, y=y)[0])(model)
    norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(gradients))).item()
    expected = loss_fn(model, x, y=y)
    step = ca.make_step(net(), loss_fn, ca.Adam(0.5))
    result = step(x, y=y)
    assert result.loss.item() == pytest.approx(expected[0].item(), rel=1e-6)  # eager and compiled rounding
    assert result.aux[0]["worst"].item() == pytest.approx(expected[1]["worst"].item(), rel=1e-6)
    assert result.aux[1:] == ("a word", None)
    assert result.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert (result.learning_rate.item(), result.updated, result.skipped.item()) == (0.5, True, 0)
    step(x, y=y, power=3)
    step(x, y=y, power=3)
    assert step.traces["grad"] == 2


def test_only_a_new_signature_is_traced() -> None:
    optimizer = ca.AdamW(ca.schedulers.linear(1e-2, 100))
    step = ca.make_step(net(), squared_error, optimizer)
    for i in range(4):
        step(*batch(i))
    assert step.traces == {"grad": 1, "accumulate": 0, "update": 1, "evicted": 0}
    for rows in (8, 16, 24, 8):
        step(*batch(0, rows))
    assert step.traces == {"grad": 3, "accumulate": 0, "update": 1, "evicted": 0}
    assert optimizer.traces == 1

    step = ca.make_step(net(), squared_error, ca.AdamW(1e-2))
    for rate in (1e-2, 1e-3, 0):
        step.optimizer.learning_rate = rate
        step(*batch())
    assert step.traces == {"grad": 1, "accumulate": 0, "update": 1, "evicted": 0}


def test_the_least_recently_used_trace_goes_and_evicted_shapes_still_work() -> None:
    rows = [4, 8, 4, 12, 4, 8, 16, 4]
    bounded, unbounded = net(), net()
    step = ca.make_step(bounded, squared_error, ca.Adam(1e-2), max_traces=2)
    other = ca.make_step(unbounded, squared_error, ca.Adam(1e-2))
    for i, n in enumerate(rows):
        step(*batch(i, n))
        other(*batch(i, n))
    # 4 and 8 are traced; 12 evicts 8; 8 evicts 12; 16 evicts 4; 4 evicts 8.
    assert step.traces == {"grad": 6, "accumulate": 0, "update": 1, "evicted": 4}
    assert other.traces == {"grad": 4, "accumulate": 0, "update": 1, "evicted": 0}
    assert_same(bounded, unbounded, 0.0)


def test_an_evicted_trace_is_freed() -> None:
    def with_a_constant(model: nn.Module, x: mx.array) -> mx.array:
        constant = mx.array(np.ones(1 << 18, np.float32))  # 1 MiB that lives as long as the trace
        return model(x).sum() + constant.sum()

    # No mean and no normalisation: 1 / rows would be a constant of the kernels, each of which takes g++ a second.
    step = ca.make_step(nn.Linear(4, 1), with_a_constant, max_traces=2)
    mx.eval(step(mx.ones((1, 4))).loss)
    before = mx.get_active_memory()
    for rows in range(2, 12):
        mx.eval(step(mx.ones((rows, 4))).loss)
    mx.synchronize()
    assert mx.get_active_memory() - before < 2.5 * (1 << 20)


@pytest.mark.parametrize("optimizer", [lambda: ca.AdamW(1e-2), lambda: optim.SGD(1e-1)])
def test_weighted_accumulation_is_the_one_big_batch(optimizer) -> None:
    whole, parts = linear_net(), linear_net()
    big = ca.make_step(whole, masked_error, optimizer())
    small = ca.make_step(parts, masked_error, optimizer(), accumulate=4, weighted=True)
    for i in range(5):
        expected = big(*ragged_batch(i))
        for j in range(0, 16, 4):
            result = small(*(array[j : j + 4] for array in ragged_batch(i)))
            assert result.updated == (j == 12)
            assert (result.grad_norm is not None) == (j == 12)
        assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
        assert_same(whole, parts, 1e-5)
    assert small.traces == {"grad": 1, "accumulate": 1, "update": 1, "evicted": 0}
    assert big.optimizer.step.item() == small.optimizer.step.item() == 5


def test_unweighted_accumulation_is_the_mean() -> None:
    whole, parts = linear_net(), linear_net()
    big = ca.make_step(whole, squared_error, ca.Adam(1e-2))
    small = ca.make_step(parts, squared_error, ca.Adam(1e-2), accumulate=2)
    for i in range(4):
        x, y = batch(i)
        big(x, y)
        small(x[:8], y[:8])
        small(x[8:], y[8:])
    assert_same(whole, parts, 1e-5)


def test_accumulation_of_half_precision_sums_in_float32() -> None:
    # 64 micro-batches with gradients 1 and then 2^-9 each: bfloat16 cannot add the small ones to the sum at all.
    model = nn.Linear(1, 1, bias=False)
    model.weight = mx.zeros((1, 1), mx.bfloat16)
    step = ca.make_step(model, lambda model, x: (model.weight * x).sum(), optim.SGD(1.0), accumulate=64)
    for i in range(64):
        step(mx.full((1, 1), 1.0 if i == 0 else 2.0**-8, mx.bfloat16))
    expected = -(1 + 63 * 2.0**-8) / 64
    assert model.weight.dtype == mx.bfloat16
    assert model.weight.item() == pytest.approx(expected, rel=2.0**-8)  # one rounding to bfloat16


def test_flush_applies_a_partial_window() -> None:
    whole, parts = linear_net(), linear_net()
    x, y, mask = ragged_batch(0)
    big = ca.make_step(whole, masked_error, ca.Adam(1e-2))
    small = ca.make_step(parts, masked_error, ca.Adam(1e-2), accumulate=4, weighted=True)
    assert small.flush() is None
    expected = big(x[:12], y[:12], mask[:12])
    for j in range(0, 12, 4):
        small(x[j : j + 4], y[j : j + 4], mask[j : j + 4])
    result = small.flush()
    assert result.updated
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)  # the sum is split in three
    assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
    assert_same(whole, parts, 1e-5)
    assert small.flush() is None
    # The next window starts empty.
    for i in range(4):
        updated = small(*ragged_batch(i)).updated
    assert updated
    assert small.traces["update"] == 1


def test_eval_and_train_between_steps() -> None:
    model = net(dropout=0.5)
    step = ca.make_step(model, squared_error, optim.SGD(0.0))
    for _ in range(3):
        step(*batch())
    statistics = np.array(model.layers[1].running_mean)
    model.eval()
    assert len({step(*batch()).loss.item() for _ in range(4)}) == 1
    assert np.array_equal(statistics, np.array(model.layers[1].running_mean))
    model.train()
    assert len({step(*batch()).loss.item() for _ in range(4)}) == 4
    model.layers[2].eval()  # one layer only
    step(*batch())
    assert step.traces == {"grad": 3, "accumulate": 0, "update": 1, "evicted": 0}
