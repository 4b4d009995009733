from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import compiled_adam as ca


class Net(nn.Module):
    """A frozen layer, batch normalisation and dropout: everything that a step must carry besides parameters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        # No bias before the normalisation: its gradient is zero but for rounding, which Adam would blow up.
        self.layers = [
            nn.Linear(4, 8, bias=False),
            nn.BatchNorm(8),
            nn.Dropout(dropout),
            nn.Linear(8, 8),
            nn.Linear(8, 1),
        ]
        self.layers[3].freeze()

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def net(dropout: float = 0.0) -> Net:
    mx.random.seed(7)
    return Net(dropout)


def squared_error(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return mx.square(model(x) - y).mean()


def batch(step: int = 0, rows: int = 16) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((rows, 4), key=mx.random.key(step))
    return x, x.sum(axis=1, keepdims=True)


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {path: np.array(array) for path, array in tree_flatten(model.parameters())}


def assert_same(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=tolerance, atol=tolerance, err_msg=path)


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


def masked_error(model: nn.Module, x: mx.array, y: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    tokens = mask.sum()
    return (mx.square(model(x) - y) * mask).sum() / tokens, tokens


def ragged_batch(step: int) -> tuple[mx.array, mx.array, mx.array]:
    """16 rows of which 4 micro-batches of 4 have 1, 4, 2 and 3 that count."""
    counts = [1, 4, 2, 3]
    mask = mx.concatenate([(mx.arange(4) < n)[:, None] for n in counts])
    return *batch(step), mask


def linear_net() -> nn.Module:
    mx.random.seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


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


@pytest.mark.parametrize("traced_before", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_fn_that_raises_changes_nothing(traced_before: bool, accumulate: int) -> None:
    def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        loss = squared_error(model, x, y)
        if x.shape[0] == 2:
            raise RuntimeError("bad batch")
        return loss

    model, twin = net(dropout=0.3), net(dropout=0.3)
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-2), accumulate=accumulate)
    reference = ca.make_step(twin, loss_fn, ca.AdamW(1e-2), accumulate=accumulate)
    if traced_before:
        mx.random.seed(1)
        step(*batch())
        mx.random.seed(1)
        reference(*batch())
    mx.random.seed(2)
    key = mx.random.state[0].tolist()
    with pytest.raises(RuntimeError, match="bad batch"):
        step(*batch(0, 2))
    assert mx.random.state[0].tolist() == key
    assert_same(model, twin, 0.0)
    for i in range(3):
        step(*batch(i))
    mx.random.seed(2)
    for i in range(3):
        reference(*batch(i))
    step.flush()
    reference.flush()
    assert_same(model, twin, 0.0)
    assert step.optimizer.step.item() == reference.optimizer.step.item()


def test_changed_parameters_are_named() -> None:
    model = net()
    step = ca.make_step(model, squared_error)
    step(*batch())
    before = values(model)

    model.layers[0].freeze()
    with pytest.raises(ValueError, match=r"no longer trainable: layers\.0\.weight.*make_step again"):
        step(*batch())
    model.layers[0].unfreeze()
    model.layers[3].unfreeze()
    with pytest.raises(ValueError, match=r"newly trainable: layers\.3\.bias, layers\.3\.weight"):
        step(*batch())
    model.layers[3].freeze()
    model.layers.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"newly trainable: layers\.5\.bias, layers\.5\.weight"):
        step(*batch())
    model.layers.pop()
    model.layers[0].extra = mx.zeros((2,))
    with pytest.raises(ValueError, match=r"newly trainable: layers\.0\.extra"):
        step(*batch())
    del model.layers[0].extra
    for path, array in values(model).items():
        assert np.array_equal(array, before[path]), path
    step(*batch())


def test_parameters_replaced_from_outside_are_used() -> None:
    model, twin = net(), net()
    step, reference = (ca.make_step(m, squared_error, optim.SGD(1e-2)) for m in (model, twin))
    step(*batch())
    reference(*batch())
    model.load_weights(tree_flatten(tree_map(lambda p: p * 2, model.parameters())))
    twin.update(tree_map(lambda p: p * 2, twin.parameters()))
    model.layers[3] = nn.Linear(8, 8)  # another module in the place of a frozen one, with other weights
    model.layers[3].freeze()
    twin.layers[3].update(model.layers[3].parameters())
    loss = step(*batch(1)).loss.item()
    assert loss == reference(*batch(1)).loss.item()
    assert_same(model, twin, 0.0)
    assert step.traces["grad"] == 2


def test_a_replaced_optimizer_state_is_used() -> None:
    model, twin = net(), net()
    step, reference = (ca.make_step(m, squared_error, ca.AdamW(1e-2)) for m in (model, twin))
    for i in range(3):
        step(*batch(i))
        reference(*batch(i))
    step.optimizer.state = tree_map(lambda a: a, reference.optimizer.state)
    step(*batch(3))
    reference(*batch(3))
    assert step.optimizer.step.item() == 4
    assert_same(model, twin, 0.0)


@pytest.mark.parametrize("clip", [None, 1e3])
def test_tied_modules_are_updated_and_counted_once(clip: float | None) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = [self.a]

        def __call__(self, x: mx.array) -> mx.array:
            return self.b[0](self.a(x)).sum(axis=1, keepdims=True)

    mx.random.seed(7)
    model = Tied()
    _, gradient = nn.value_and_grad(model.a, lambda: squared_error(model, *batch()))()
    norm = mx.sqrt(sum(mx.square(g).sum() for g in gradient.values())).item()
    expected = optim.Adam(0.1).apply_gradients(gradient, model.a)
    result = ca.make_step(model, squared_error, ca.Adam(0.1, max_grad_norm=clip))(*batch())
    assert model.b[0] is model.a
    for name in ("weight", "bias"):
        np.testing.assert_allclose(np.array(model.a[name]), np.array(expected[name]), rtol=1e-6)  # one float32 update
    assert result.grad_norm.item() == pytest.approx(norm, rel=1e-6)


def test_casts_shared_by_loss_and_aux() -> None:
    # mx.compile raised IndexError for this when aux was an output of value_and_grad.
    def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        count = (y > 0).sum()
        return mx.square(model(x) - y).sum() / count, count.astype(mx.float32), count.astype(mx.float32)

    result = ca.make_step(net(), loss_fn, accumulate=2, weighted=True)(*batch())
    assert result.aux[0].item() == result.aux[1].item() == (batch()[1] > 0).sum().item()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_an_update_that_raises_changes_nothing_and_can_be_repeated(optimizer: str, accumulate: int) -> None:
    def schedule(step: mx.array) -> mx.array:
        if failing:
            raise OSError("transient")
        return mx.array(1e-2) + 0 * step

    def make(model: nn.Module):
        made = ca.Adam(schedule) if optimizer == "Adam" else optim.SGD(schedule)
        return ca.make_step(model, squared_error, made, accumulate=accumulate)

    failing = False
    model, twin = net(dropout=0.3), net(dropout=0.3)
    step, reference = make(model), make(twin)
    mx.random.seed(2)
    for i in range(accumulate - 1):
        step(*batch(i))
    key = mx.random.state[0].tolist()
    failing = True
    for _ in range(3):
        with pytest.raises(OSError, match="transient"):
            step(*batch(5))
    failing = False
    assert mx.random.state[0].tolist() == key
    assert [step(*batch(i)).updated for i in range(5, 9)] == ([True] * 4 if accumulate == 1 else [True, False] * 2)
    mx.random.seed(2)
    for i in [*range(accumulate - 1), *range(5, 9)]:
        reference(*batch(i))
    assert_same(model, twin, 0.0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mx.zeros((2,)), mx.zeros((2,))

    def __call__(self, x: mx.array) -> mx.array:
        return (self.a * x).sum() * 100 + (self.b * x).sum() * 0.01


def test_parameters_in_another_order_keep_their_own_state() -> None:
    model = Two()
    step = ca.make_step(model, lambda model, x: model(x), optim.SGD(0.1, momentum=0.9))
    step(mx.ones((2,)))
    first = model.a
    del model.a
    model.a = first  # now after b
    step(mx.ones((2,)))
    assert model.a.tolist() == pytest.approx([-29.0] * 2, rel=1e-6)  # 0.1 (100 + 190), float32
    assert model.b.tolist() == pytest.approx([-0.0029] * 2, rel=1e-6)


def test_layers_may_not_be_replaced_within_a_window() -> None:
    model = linear_net()
    step = ca.make_step(model, squared_error, optim.SGD(1.0), accumulate=2)
    step(*batch())
    model.layers[2] = nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"after 1 of 2 micro-batches.*flush"):
        step(*batch())


def test_an_optimizers_numbers_may_be_changed_between_steps() -> None:
    for make in (lambda: ca.AdamW(0.1, weight_decay=0.0), lambda: optim.AdamW(0.1, weight_decay=0.0)):
        model, optimizer = Two(), make()
        model.a = mx.ones((2,))
        step = ca.make_step(model, lambda model, x: model(x), optimizer)
        step(mx.zeros((2,)))
        optimizer.weight_decay = 1.0
        step(mx.zeros((2,)))
        assert model.a.tolist() == pytest.approx([0.9, 0.9], rel=1e-6)
        assert step.traces["update"] == 2
    with pytest.raises(AttributeError):
        step.optimizer = ca.Adam(1.0)


def test_what_the_forward_pass_assigns_to_a_parameter_is_kept() -> None:
    class Counting(Two):
        def __init__(self) -> None:
            super().__init__()
            self.count = mx.array(0.0)

        def __call__(self, x: mx.array) -> mx.array:
            self.count = self.count + 1
            self.a = self.a / 2 + 1
            return super().__call__(x)

    model, twin = Counting(), Counting()
    optimizer = optim.SGD(0.1)
    step = ca.make_step(model, lambda model, x: model(x), optim.SGD(0.1))
    for _ in range(3):
        step(mx.ones((2,)))
        _, gradients = nn.value_and_grad(twin, lambda x: twin(x))(mx.ones((2,)))
        optimizer.update(twin, gradients)
    assert model.count.item() == 3
    assert_same(model, twin, 1e-6)  # float32 rounding, contracted differently


@pytest.mark.parametrize("compiled", [True, False])
def test_what_the_forward_pass_changes_in_place_is_kept(compiled: bool) -> None:
    class InPlace(Two):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.table = mx.array(0.0), mx.zeros((3,))
            self.freeze(recurse=False, keys=["count", "table"])

        def __call__(self, x: mx.array) -> mx.array:
            self.count += 1
            self.table[0] = self.table[0] + 2
            self.a *= 0.5
            return super().__call__(x)

    model = InPlace()
    model.a = mx.ones((2,))
    step = ca.make_step(model, lambda model, x: model(x), optim.SGD(0.0))
    if not compiled:
        mx.disable_compile()
    try:
        for _ in range(3):
            step(mx.ones((2,)))
        with pytest.raises(ValueError, match="shape"):
            step(mx.ones((3,)))
    finally:
        mx.enable_compile()
    assert (model.count.item(), model.table.tolist(), model.a.tolist()) == (3.0, [6.0, 0.0, 0.0], [0.125, 0.125])


def test_a_window_without_any_token_has_no_gradient() -> None:
    model, twin = linear_net(), linear_net()
    x, y, mask = ragged_batch(0)
    step = ca.make_step(model, masked_error, ca.Adam(1e-2), accumulate=2, weighted=True)
    for _ in range(2):
        result = step(x, y, mask & False)
    assert result.grad_norm.item() == 0.0
    step(x, y, mask & False)
    step.flush()
    assert_same(model, twin, 0.0)
    step(x, y, mask)
    assert step(x, y, mask).grad_norm.item() > 0


def test_skipped_counts_in_a_multi_optimizer() -> None:
    parts = [ca.Adam(1e-2, skip_nonfinite=True), ca.AdamW(1e-2, skip_nonfinite=True)]
    step = ca.make_step(linear_net(), squared_error, optim.MultiOptimizer(parts, [lambda path, p: p.ndim == 2]))
    x, y = batch()
    assert step(x, y).skipped.item() == 0
    assert step(x, y * math.nan).skipped.item() == 2


def test_an_optimizer_may_draw_random_numbers() -> None:
    class Noisy(optim.SGD):
        def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
            return parameter + mx.random.normal(parameter.shape)

    model = Two()
    step = ca.make_step(model, lambda model, x: model(x), Noisy(0.1))
    noise = []
    for _ in range(3):
        before = model.a
        step(mx.ones((2,)))
        noise.append((model.a - before).tolist())
    assert noise[0] != noise[1] != noise[2] != noise[0]


def test_a_parameter_may_change_its_shape_between_windows() -> None:
    model = nn.Linear(4, 1, bias=False)
    step = ca.make_step(model, lambda model, x: model(x).sum(), optim.SGD(1.0), accumulate=2)
    for _ in range(2):
        step(mx.ones((2, 4)))
    model.weight = mx.zeros((3, 4))
    for _ in range(2):
        step(mx.ones((2, 4)))
    assert model.weight.tolist() == [[-2.0] * 4] * 3


def test_a_micro_batch_without_tokens_counts_for_nothing() -> None:
    whole, parts = linear_net(), linear_net()
    x, y, _ = ragged_batch(0)
    mask = (mx.arange(16) < 3)[:, None]
    ca.make_step(whole, masked_error, ca.Adam(1e-2))(x, y, mask)
    small = ca.make_step(parts, masked_error, ca.Adam(1e-2), accumulate=2, weighted=True)
    small(x[:8], y[:8], mask[:8])
    assert small(x[8:], y[8:], mask[8:]).updated
    assert_same(whole, parts, 1e-6)  # 8 rows instead of 16


def test_a_loss_fn_that_freezes_and_raises_has_not_frozen() -> None:
    def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        model.layers[0].freeze()
        raise RuntimeError("no")

    model = net()
    before = len(tree_flatten(model.trainable_parameters()))
    with pytest.raises(RuntimeError, match="no"):
        ca.make_step(model, loss_fn)(*batch())
    assert len(tree_flatten(model.trainable_parameters())) == before


def test_constants_are_told_apart_by_their_bits() -> None:
    step = ca.make_step(net(), lambda model, x, y, c: squared_error(model, x, y) * 0 + math.copysign(1, c))
    nan = float("nan")
    assert [step(*batch(), c).loss.item() for c in (0.0, -0.0, nan, nan)] == [1, -1, 1, 1]
    assert step.traces["grad"] == 3


def test_a_forward_pass_may_not_create_arrays() -> None:
    def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        model.layers[0].cached = model(x)
        model.layers[3].bias = None
        return squared_error(model, x, y)

    model = net()
    model.layers[0].cached = None
    step = ca.make_step(model, loss_fn)
    with pytest.raises(ValueError, match=r"layers\.0\.cached.*create it in __init__"):
        step(*batch())
    assert model.layers[0].cached is None
    assert model.layers[3].bias.shape == (8,)
    mx.eval(model.parameters())


def test_without_compilation(uncompiled: None) -> None:
    model = net(dropout=0.3)
    mx.random.seed(3)
    step = ca.make_step(model, squared_error, ca.AdamW(1e-2), accumulate=2)
    losses = [step(*batch(i)).loss.item() for i in range(4)]
    assert step.traces == {"grad": 4, "accumulate": 4, "update": 2, "evicted": 0}
    mx.enable_compile()
    twin = net(dropout=0.3)
    mx.random.seed(3)
    step = ca.make_step(twin, squared_error, ca.AdamW(1e-2), accumulate=2)
    assert losses == pytest.approx([step(*batch(i)).loss.item() for i in range(4)], rel=1e-5)
    assert_same(model, twin, 1e-5)  # two graphs of the same float32 formulas


def test_checkpointed_layers() -> None:
    model, twin = linear_net(), linear_net()
    checkpointed = nn.utils.checkpoint(model.layers[0])

    def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return mx.square(model.layers[2](model.layers[1](checkpointed(x))) - y).mean()

    step, reference = ca.make_step(model, loss_fn), ca.make_step(twin, squared_error)
    for i in range(3):
        step(*batch(i))
        reference(*batch(i))
    assert_same(model, twin, 1e-6)  # the layer is computed twice, in differently fused graphs


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (None, TypeError, "returned NoneType as the loss"),
        ((), TypeError, "returned tuple as the loss"),
        (1.0, TypeError, "returned float as the loss"),
        (mx.zeros((3,)), ValueError, r"shape \(3,\)"),
        (mx.array(1), TypeError, "dtype mlx.core.int32"),
    ],
)
def test_a_bad_loss_is_explained(output, error: type[Exception], message: str) -> None:
    model = net()
    step = ca.make_step(model, lambda model, x, y: output)
    with pytest.raises(error, match=message):
        step(*batch())
    mx.eval(model.parameters())


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ((), ValueError, r"needs loss_fn to return \(loss, weight"),
        (("3",), TypeError, "str as the weight"),
        ((mx.ones((2,)),), ValueError, r"weight of shape \(2,\)"),
    ],
)
def test_a_bad_weight_is_explained(weight: tuple, error: type[Exception], message: str) -> None:
    step = ca.make_step(net(), lambda model, x, y: (squared_error(model, x, y), *weight), weighted=True)
    with pytest.raises(error, match=message):
        step(*batch())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": {}}, TypeError, "model is dict"),
        ({"model": nn.ReLU()}, ValueError, "no trainable parameters"),
        ({"loss_fn": None}, TypeError, "loss_fn is NoneType"),
        ({"optimizer": 1e-3}, TypeError, "optimizer is float"),
        ({"accumulate": 0}, ValueError, "accumulate is 0"),
        ({"accumulate": 2.0}, ValueError, "accumulate is 2.0"),
        ({"max_traces": 0}, ValueError, "max_traces is 0"),
        ({"max_trace": 3}, TypeError, "max_trace"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ca.make_step(**{"model": nn.Linear(1, 1), "loss_fn": squared_error, **arguments})


def test_an_integer_parameter_is_named() -> None:
    model = nn.Linear(2, 2)
    model.positions = mx.arange(3)
    with pytest.raises(TypeError, match=r"'positions' is mlx\.core\.int32.*freeze"):
        ca.make_step(model, squared_error)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.ones((2, 4)), r"batch\[0\] is numpy.ndarray"),
        ({"x": [object()]}, r"batch\[0\]\['x'\]\[0\] is builtins.object"),
    ],
)
def test_a_bad_batch_is_named(argument, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ca.make_step(net(), squared_error)(argument, mx.ones((2, 1)))


def test_batches_may_be_trees_with_constants() -> None:
    def loss_fn(model: nn.Module, data: dict, options: tuple) -> mx.array:
        reduce = getattr(mx, options[0])
        return reduce(mx.square(model(data["xy"][0]) - data["xy"][1])) * options[1]

    step = ca.make_step(net(), loss_fn, optim.SGD(0.0))
    x, y = batch()
    mean = step({"xy": [x, y]}, ("mean", 1)).loss.item()
    assert step({"xy": [x, y]}, ("sum", 1)).loss.item() == pytest.approx(16 * mean, rel=1e-5)
    assert step({"xy": [x, y]}, ("mean", True)).loss.item() == pytest.approx(mean, rel=1e-5)
    assert step({"xy": [x, y]}, ("mean", 2.0)).loss.item() == pytest.approx(2 * mean, rel=1e-5)
    assert step.traces["grad"] == 4
