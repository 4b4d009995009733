"""A step under what happens to it: errors, changed models and optimizers, unusual models."""

from __future__ import annotations

import math

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from nets import Two, assert_same, batch, linear_net, masked_error, net, ragged_batch, squared_error, values


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
            self.count, self.table, self.total = mx.array(0.0), mx.zeros((3,)), mx.array(0.0)
            self.freeze(recurse=False, keys=["count", "table", "total"])

        def __call__(self, x: mx.array) -> mx.array:
            self.count += 1
            self.total = self.total + 1  # another array, beside those that are edited
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
    assert model.total.item() == 3.0


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
