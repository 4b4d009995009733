"""`Compensated`: calls, state, options, guard and resuming. Its numbers: `test_compensated_numerics.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.update import residual
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from tests.nets import linear_net, squared_error
from tests.trees import assert_identical, copied

MAKE: dict[str, Callable[[float], optim.Optimizer]] = {
    "Muon": lambda rate: optim.Muon(rate, weight_decay=0.0),
    "SGD": lambda rate: optim.SGD(rate, momentum=0.9),
    "Lion": optim.Lion,
    "Adafactor": lambda rate: optim.Adafactor(rate, relative_step=False),
    "RMSprop": optim.RMSprop,
}


def both(rate: float = 1e-2) -> optim.Optimizer:
    return optim.MultiOptimizer([optim.Muon(rate), optim.AdamW(rate)], [lambda path, p: p.ndim > 1])


def gradient(i: int, dtype: mx.Dtype, scale: float = 0.1) -> mx.array:
    return (mx.random.normal((16, 8), key=mx.random.key(i)) * scale + 0.2 * scale).astype(dtype)


def start(dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((16, 8), key=mx.random.key(99)).astype(dtype)


OPTIMIZERS = {**{name: lambda make=make: make(1e-2) for name, make in MAKE.items()}, "MultiOptimizer": both}


def net(dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    model = linear_net()
    model.set_dtype(dtype)
    return model


def inputs(i: int, dtype: mx.Dtype = mx.bfloat16) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((8, 4), key=mx.random.key(i)).astype(dtype)
    return x, x.sum(axis=1, keepdims=True)


class Linear(nn.Module):
    """Parameters whose gradients are the batch, so that no rounding of a forward pass differs."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = start(mx.bfloat16), mx.ones((8,), mx.bfloat16)


def product(model: nn.Module, w: mx.array, b: mx.array) -> mx.array:
    return (model.w * w).astype(mx.float32).sum() + (model.b * b).astype(mx.float32).sum()


def loop(model: nn.Module, optimizer: optim.Optimizer, how: str, steps: int) -> None:
    batches = [(gradient(i, mx.bfloat16), gradient(i, mx.bfloat16)[0]) for i in range(steps)]
    if how == "step":
        step = ca.make_step(model, product, optimizer)
        for batch in batches:
            step(*batch)
        assert step.traces["update"] == 1
        return
    optimizer.init(model.trainable_parameters())

    def one(w: mx.array, b: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, product)(model, w, b)
        optimizer.update(model, gradients)
        return loss

    state = [model.state, optimizer.state]
    run = mx.compile(one, inputs=state, outputs=state) if how == "compiled" else one
    for batch in batches:
        mx.eval(run(*batch), model.parameters(), optimizer.state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_called_in_a_compile_and_in_a_step_are_the_same(name: str) -> None:
    found = {}
    for how in ("called", "compiled", "step"):
        model, optimizer = Linear(), ca.Compensated(OPTIMIZERS[name](), max_grad_norm=0.5, skip_nonfinite=True)
        loop(model, optimizer, how, 5)
        assert optimizer.traces == 1, how
        assert optimizer.grad_norm is not None and optimizer.grad_norm.item() > 0.5
        states = optimizer.state["states"] if name == "MultiOptimizer" else [optimizer.state]
        rest = {key: each[key]["residual"] for each in states for key in ("w", "b") if key in each}
        found[how] = {key: np.array(residual.join(model[key], rest[key])) for key in ("w", "b")}
    for how in ("compiled", "step"):
        for key, array in found["called"].items():
            # Only float32 rounding of differently fused kernels, which Muon's polynomial amplifies.
            np.testing.assert_allclose(found[how][key], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_weights_get_what_the_optimizer_alone_gives(name: str) -> None:
    ours, alone = net(mx.float32), net(mx.float32)
    for model, optimizer in ((ours, ca.Compensated(OPTIMIZERS[name]())), (alone, OPTIMIZERS[name]())):
        for i in range(5):
            _, gradients = nn.value_and_grad(model, squared_error)(model, *inputs(i, mx.float32))
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
    for (path, a), (_, b) in zip(tree_flatten(ours.parameters()), tree_flatten(alone.parameters()), strict=True):
        # Muon's polynomial and Adafactor's roots amplify the rounding of a fused kernel.
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-6, err_msg=path)


def tree(dtype: mx.Dtype = mx.bfloat16) -> dict:
    return {"layers": [{"w": start(dtype)}, {"b": mx.ones((8,), dtype)}], "f": mx.ones((4, 4))}


def gradients_of(i: int, scale: float = 0.1) -> dict:
    return tree_map(lambda p: (mx.random.normal(p.shape, key=mx.random.key(i)) * scale).astype(p.dtype), tree())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_no_bit(name: str, bad: float) -> None:
    optimizer = ca.Compensated(OPTIMIZERS[name](), skip_nonfinite=True)
    weights = optimizer.apply_gradients(gradients_of(0), tree())
    before = copied({"weights": weights, "state": optimizer.state})
    gradients = gradients_of(1)
    gradients["layers"][1]["b"] = gradients["layers"][1]["b"] * bad
    weights = optimizer.apply_gradients(gradients, weights)
    assert optimizer.skipped is not None and optimizer.skipped.item() == 1
    after = {"weights": weights, "state": optimizer.state}
    flat = [
        {path: a for path, a in tree_flatten(each) if not path.endswith(("_grad_norm", "_skipped"))}
        for each in (before, after)
    ]
    assert_identical(*flat)
    assert not np.isfinite(optimizer.grad_norm.item())


def test_a_bad_learning_rate_changes_no_bit() -> None:
    rates = mx.array([1e-2, float("nan"), 1e-2])
    optimizer = ca.Compensated(optim.SGD(lambda step: rates[step]), skip_nonfinite=True)
    weights = optimizer.apply_gradients(gradients_of(0), tree())
    before = copied({"w": weights, "step": optimizer.step, "rate": optimizer.learning_rate})
    weights = optimizer.apply_gradients(gradients_of(1), weights)
    assert_identical(before, {"w": weights, "step": optimizer.step, "rate": optimizer.learning_rate})
    assert optimizer.skipped.item() == 1


def test_clipping_is_that_of_scaled_gradients() -> None:
    clipped, scaled = ca.Compensated(both(), max_grad_norm=0.25), ca.Compensated(both())
    g = tree_map(lambda x: x.astype(mx.float32), gradients_of(0))
    norm = np.sqrt(sum(np.square(np.array(x, np.float64)).sum() for _, x in tree_flatten(g)))
    new = clipped.apply_gradients(g, tree())
    expected = scaled.apply_gradients(tree_map(lambda x: x * (0.25 / norm), g), tree())
    assert clipped.grad_norm.item() == pytest.approx(norm, rel=1e-6) and norm > 0.25
    assert clipped.skipped.item() == 0 and scaled.grad_norm is None and scaled.skipped is None
    one, other = (dict(tree_flatten(each.state)) for each in (clipped, scaled))
    moments = [path for path in other if path.endswith((".m", ".v"))]
    assert len(moments) == 4
    for path in moments:  # not the weights: where a moment is near zero, the step is all rounding
        np.testing.assert_allclose(np.array(one[path]), np.array(other[path]), rtol=1e-5)  # float32 rounding
    assert new["f"].shape == expected["f"].shape


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_bytes_beside_a_float32_state(name: str) -> None:
    optimizer, alone = ca.Compensated(OPTIMIZERS[name]()), OPTIMIZERS[name]()
    optimizer.init(tree())
    alone.init(tree_map(lambda p: p.astype(mx.float32), tree()))
    mine, its = dict(tree_flatten(optimizer.state)), dict(tree_flatten(alone.state))
    assert {path: a.dtype for path, a in its.items()}.items() <= {path: a.dtype for path, a in mine.items()}.items()
    half = sum(p.size for _, p in tree_flatten(tree()) if p.dtype == mx.bfloat16)
    assert sum(a.nbytes for a in mine.values()) - sum(a.nbytes for a in its.values()) == 2 * half


@pytest.mark.parametrize(
    ("name", "alone", "ours"),
    [(name, 2, 6) for name in ("SGD", "Lion", "Muon", "RMSprop")] + [("AdamW", 4, 10), ("Adafactor", 0, 2)],
)
def test_bytes_beside_a_bfloat16_weight_are_those_of_the_docs(name: str, alone: int, ours: int) -> None:
    make = MAKE.get(name, optim.AdamW)
    for optimizer, expected in ((make(1e-2), alone), (ca.Compensated(make(1e-2)), ours)):
        optimizer.init({"w": mx.zeros((1024, 1024), mx.bfloat16)})
        nbytes = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
        # The step, rates, and Adafactor's row and column: 8 kB of 1 M weights.
        assert nbytes / 2**20 == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_survives_a_file(name: str, tmp_path: Path) -> None:
    optimizer = ca.Compensated(OPTIMIZERS[name](), skip_nonfinite=True)
    weights = optimizer.apply_gradients(gradients_of(0), tree())
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    other = ca.Compensated(OPTIMIZERS[name](), skip_nonfinite=True)
    loaded = mx.load(str(tmp_path / "state.safetensors"))
    other.state = tree_unflatten(list(loaded.items()))
    new = [each.apply_gradients(gradients_of(1), copied(weights)) for each in (optimizer, other)]
    assert_identical(*new)
    assert_identical(optimizer.state, other.state)


def test_a_stock_state_can_be_assigned() -> None:
    stock = MAKE["Muon"](1e-2)
    weights = stock.apply_gradients(gradients_of(0), tree())
    optimizer = ca.Compensated(MAKE["Muon"](1e-2))
    optimizer.state = copied(stock.state)
    optimizer.init(weights)
    state = optimizer.state["layers"][0]["w"]  # before an update, whose arithmetic would make it float32 anyway
    assert state["v"].dtype == mx.float32 and state["residual"].dtype == mx.int16
    assert mx.array_equal(state["v"], stock.state["layers"][0]["w"]["v"]) and state["v"].any()
    optimizer.apply_gradients(gradients_of(1), weights)
    assert optimizer.step.item() == 2 and optimizer.traces == 1
    optimizer.state = copied(stock.state)  # the next update converts it, too
    optimizer.apply_gradients(gradients_of(1), weights)
    assert optimizer.step.item() == 2


def test_a_number_that_is_assigned_is_no_constant_of_a_trace() -> None:
    optimizer = ca.Compensated(optim.SGD(0.0))
    weights = {"a": mx.ones(3)}
    for rate in (1.0, 2.0):
        optimizer.state["learning_rate"] = rate
        weights = optimizer.apply_gradients({"a": mx.ones(3)}, weights)
    assert weights["a"].tolist() == [-2.0] * 3 and optimizer.traces == 1


def test_a_parameter_of_another_shape_gets_a_new_residual() -> None:
    optimizer = ca.Compensated(optim.SGD(1e-3))
    for size in (3, 1, 4):  # with momentum MLX's array would stay, and the update would fail
        optimizer.init({"a": mx.ones(size, mx.bfloat16)})
        assert optimizer.state["a"]["residual"].shape == (size,)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_step_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    def made() -> ca.TrainStep:
        return ca.make_step(net(), squared_error, ca.Compensated(OPTIMIZERS[name](), max_grad_norm=0.5))

    whole, first, second = made(), made(), made()
    for i in range(6):
        whole(*inputs(i))
        if i < 3:
            first(*inputs(i))
    ca.save_checkpoint(tmp_path / "3", first, {})
    ca.load_checkpoint(tmp_path / "3", second)
    for i in range(3, 6):
        second(*inputs(i))
    for part, arrays in whole.state_dict().items():
        assert_identical(arrays, second.state_dict()[part])


def test_a_resumed_step_must_have_the_same_options(tmp_path: Path) -> None:
    steps = [
        ca.make_step(net(), squared_error, optimizer)
        for optimizer in (
            ca.Compensated(optim.SGD(1e-2), max_grad_norm=0.5),
            ca.Compensated(optim.SGD(1e-2), max_grad_norm=1.0),
        )
    ]
    assert steps[0].description() != steps[1].description()
    assert steps[0].description()["max_grad_norm"] == 0.5 and steps[0].description()["compensated"] is True


def test_a_replaced_weight_gets_a_new_residual() -> None:
    model, optimizer = net(), ca.Compensated(optim.SGD(1e-3))
    step = ca.make_step(model, squared_error, optimizer)
    step(*inputs(0))
    layer = model.layers[0]
    layer.weight = mx.zeros_like(layer.weight)
    optimizer.learning_rate = 0.0
    step(*inputs(1))
    assert not layer.weight.any() and not optimizer.state["layers"][0]["weight"]["residual"].any()


def test_rates_steps_and_schedules() -> None:
    optimizer = ca.Compensated(both(0.5))
    assert optimizer.learning_rate.item() == 0.5 and optimizer.step.item() == 0
    optimizer.learning_rate = 0.25
    assert [part.learning_rate.item() for part in optimizer.wrapped.optimizers] == [0.25, 0.25]
    with pytest.raises(ca.InputError, match="learning_rate is -1"):
        optimizer.learning_rate = -1
    seen = []

    def schedule(step: mx.array) -> mx.array:
        seen.append(step.item())  # plain Python: works when the optimizer is called
        return mx.array(0.1 if step.item() < 2 else 0.01)

    optimizer = ca.Compensated(optim.SGD(schedule))
    weights = tree()
    for i in range(4):
        weights = optimizer.apply_gradients(gradients_of(i), weights)
    assert optimizer.learning_rate.item() == pytest.approx(0.01) and seen[1:] == [0, 1, 2, 3] and optimizer.traces == 1


def test_numbers_of_the_wrapped_optimizer_may_change() -> None:
    optimizer = ca.Compensated(optim.SGD(1.0))
    weights = {"w": mx.zeros((2,), mx.bfloat16)}
    for decay in (0.0, 1.0):
        optimizer.wrapped.weight_decay = decay
        weights = optimizer.apply_gradients({"w": mx.full((2,), -1.0, mx.bfloat16)}, weights)
    assert weights["w"].tolist() == [1.0, 1.0] and optimizer.traces == 2


def test_a_copy_goes_its_own_way() -> None:
    optimizer = ca.Compensated(both())
    weights = optimizer.apply_gradients(gradients_of(0), tree())
    other = copy.deepcopy(optimizer)
    other.apply_gradients(gradients_of(1), weights)
    assert (optimizer.step.item(), other.step.item()) == (1, 2)


@pytest.mark.parametrize("wrap", [ca.Compensated, lambda optimizer: optimizer])
def test_lists_that_end_before_a_gap_of_another_optimizer(wrap: Callable[..., optim.Optimizer]) -> None:
    """MLX cannot merge [a] with [{}, {}, b]. Here the layer between two has no parameters."""
    filters = [lambda path, p: path == "layers.0.weight", lambda path, p: path.startswith("layers.2")]
    several = optim.MultiOptimizer([optim.Muon(0.1), optim.Lion(0.1), optim.SGD(0.1)], filters)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    step = ca.make_step(model, squared_error, wrap(several))
    before = dict(tree_flatten(model.parameters()))
    step(*inputs(0, mx.float32))
    model.layers[2].freeze()  # the state keeps what follows the last layer that is trained
    step = ca.make_step(model, squared_error, wrap(several))
    step(*inputs(1, mx.float32))
    for path, array in tree_flatten(model.parameters()):
        assert mx.abs(array - before[path]).max().item() > 0, path


def test_inside_a_multi_optimizer_and_repr() -> None:
    parts = [ca.Compensated(optim.Muon(1e-2), skip_nonfinite=True), ca.AdamW(1e-2, skip_nonfinite=True)]
    step = ca.make_step(net(), squared_error, optim.MultiOptimizer(parts, [lambda path, p: p.ndim > 1]))
    result = step(*inputs(0))
    assert result.skipped.item() == 0 and step(*[mx.array(float("nan")) * x for x in inputs(1)]).skipped.item() == 2
    assert repr(parts[0]) == "Compensated(Muon(learning_rate=0.01), skip_nonfinite=True; skipped=1)"
    many = ca.Compensated(both(), max_grad_norm=0.5)
    assert repr(many) == (
        "Compensated(MultiOptimizer(Muon(learning_rate=0.01), AdamW(learning_rate=0.01)), max_grad_norm=0.5)"
    )


class OwnUpdate(optim.SGD):
    def update(self, model, gradients):
        super().update(model, gradients)


class OwnInit(optim.Optimizer):
    def init(self, parameters):
        self.state["all"] = mx.zeros(3)


class Counts(optim.SGD):
    def init_single(self, parameter, state):
        state["count"] = 0

    def apply_single(self, gradient, parameter, state):
        state["count"] += 1
        return parameter


class Grows(optim.SGD):
    def apply_single(self, gradient, parameter, state):
        state["seen"] = gradient
        return parameter


class Noisy(optim.SGD):
    """One's own optimizer: it draws random numbers, and has arrays in containers."""

    def init_single(self, parameter, state):
        state["sums"] = {"gradients": [mx.zeros_like(parameter)]}

    def apply_single(self, gradient, parameter, state):
        state["sums"] = {"gradients": [state["sums"]["gradients"][0] + gradient]}
        return parameter + mx.random.normal(parameter.shape)


def test_an_optimizer_of_ones_own_may_draw_and_nest_its_state() -> None:
    optimizer = ca.Compensated(Noisy(1e-3))
    first, second = (optimizer.apply_gradients({"a": mx.ones(3)}, {"a": mx.zeros(3)})["a"] for _ in range(2))
    assert optimizer.traces == 1 and not mx.array_equal(first, second)
    assert optimizer.state["a"]["sums"]["gradients"][0].tolist() == [2.0] * 3


def test_the_state_of_other_options_can_be_assigned() -> None:
    clipped, plain = ca.Compensated(optim.SGD(1e-3), max_grad_norm=1.0), ca.Compensated(optim.SGD(1e-3))
    for optimizer in (clipped, plain):
        optimizer.init(tree())
    clipped.state, plain.state = plain.state, clipped.state
    for optimizer in (clipped, plain):
        optimizer.apply_gradients(gradients_of(0), tree())
    assert clipped.grad_norm.item() > 0 and plain.grad_norm is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.SGD, "must be an optimizer of MLX"),
        (lambda: ca.AdamW(1e-3), "AdamW keeps residuals of half-precision weights itself; use it without Compensated$"),
        (lambda: ca.Compensated(optim.SGD(1e-3)), "Compensated keeps residuals"),
        (
            lambda: optim.MultiOptimizer([optim.Muon(1e-3), ca.AdamW(1e-3)], [lambda path, p: True]),
            "use it without Compensated; put mlx.optimizers.AdamW there",
        ),
        (lambda: OwnUpdate(1e-3), "OwnUpdate has an update method of its own"),
        (OwnInit, "OwnInit has no init_single"),
    ],
)
def test_what_cannot_be_wrapped(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ca.InputError, match=message):
        ca.Compensated(make())


def test_wrong_options_and_trees() -> None:
    with pytest.raises(ca.InputError, match="max_grad_norm is 0; it must be a number greater than 0"):
        ca.Compensated(optim.SGD(1e-3), max_grad_norm=0)
    with pytest.raises(ca.InputError, match="skip_nonfinite is 1; it must be True or False"):
        ca.Compensated(optim.SGD(1e-3), skip_nonfinite=1)
    optimizer = ca.Compensated(optim.SGD(1e-3))
    optimizer.init({"a": mx.ones(3)})
    with pytest.raises(ca.InputError, match="the optimizer has no state for 'b'"):
        optimizer.apply_gradients({"b": mx.ones(3)}, {"a": mx.ones(3), "b": mx.ones(3)})
    with pytest.raises(ca.InputError, match=r"the gradient of 'a' has shape \(1,\), but the parameter has \(3,\)"):
        optimizer.apply_gradients({"a": mx.ones(1)}, {"a": mx.ones(3)})
    with pytest.raises(ca.InputError, match="there is a gradient for 'c'"):
        optimizer.apply_gradients({"c": mx.ones(3)}, {"a": mx.ones(3)})
    assert optimizer.step.item() == 0
    for dtype in (mx.bfloat16, mx.float16):
        weights = {"a": mx.ones(3, dtype)}
        with pytest.raises(ca.InputError, match="the state of 'a' was made for another dtype; call"):
            optimizer.apply_gradients(weights, weights)
        optimizer.init(weights)
        assert optimizer.apply_gradients(weights, weights)["a"].dtype == dtype
    with pytest.raises(ca.InputError, match="the optimizer changed the structure of its state"):
        ca.Compensated(Grows(1e-3)).apply_gradients({"a": mx.ones(3)}, {"a": mx.ones(3)})
    with pytest.raises(ca.InputError, match="the optimizer changed 0 in its state"):
        ca.Compensated(Counts(1e-3)).apply_gradients({"a": mx.ones(3)}, {"a": mx.ones(3)})
