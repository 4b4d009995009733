"""A call that fails, another thread, another transformation: what a step leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base.compiled import Compiled
from compiled_adam.base.errors import InputError
from mlx.utils import tree_flatten, tree_map
from nets import assert_same, values

from tests.small_steps import loss_fn, trained


def unevaluable() -> mx.array:
    """An array that another thread made, and has not evaluated: no other thread can."""
    made: list[mx.array] = []

    def make() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            made.append(mx.ones((8, 4)) + 1)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@pytest.mark.parametrize("optimizer", [lambda: ca.AdamW(1e-2), lambda: optim.SGD(1e-2, momentum=0.9)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_cannot_be_evaluated_changes_nothing(optimizer: Callable[[], Any], accumulate: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Dropout(0.5), nn.Linear(3, 1))
    step = ca.make_step(model, loss_fn, optimizer(), accumulate=accumulate)
    for _ in range(3):
        step(mx.ones((8, 4)))
    before, key = step.state_dict(), mx.random.state[0].tolist()
    traces = dict(step.traces)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Stream"):
            step(unevaluable())
        after = step.state_dict()
        assert mx.random.state[0].tolist() == key
        for part, arrays in before.items():
            assert arrays.keys() == after[part].keys()
            assert all(mx.array_equal(array, after[part][path]).item() for path, array in arrays.items())
    assert step.traces == traces
    step(mx.ones((8, 4)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_kernel_that_fails_changes_nothing(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX raises while it evaluates, in the forward pass or in the update: g++ that is not there, say."""
    model = nn.Linear(4, 1)
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-2), accumulate=accumulate)
    evaluate, calls = mx.async_eval, 0

    def failing(*trees: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("[Compile::eval_cpu] Failed to compile function")
        evaluate(*trees)

    raised = 0
    for at in (2, 3):  # the batch itself is the first; the last one is the update, whose kernels were tried before
        fresh = ca.make_step(nn.Linear(4, 1), loss_fn, ca.AdamW(1e-2), accumulate=accumulate)
        before, calls = fresh.state_dict(), 0
        with monkeypatch.context() as patch:
            patch.setattr(mx, "async_eval", failing)
            with pytest.raises(RuntimeError, match="Failed to compile"):
                fresh(mx.ones((8, 4)))
        raised += 1
        after = fresh.state_dict()
        for part, arrays in before.items():
            assert arrays.keys() == after[part].keys()
            assert all(mx.array_equal(array, after[part][path]).item() for path, array in arrays.items()), at
        fresh(mx.ones((8, 4)))
    assert raised == 2
    assert step(mx.ones((8, 4))).loss.item() > 0


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU's step does not wait for the CPU's stream")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_operation_that_fails_while_it_runs_changes_nothing(accumulate: int) -> None:
    """MLX raises such an error when somebody waits for the result, which may be long after the call."""

    def inverse(model: nn.Module, x: mx.array) -> mx.array:
        return mx.square(model(x)).mean() + mx.linalg.inv(x, stream=mx.cpu).sum()

    model = nn.Linear(4, 1)
    step = ca.make_step(model, inverse, ca.AdamW(1e-2), accumulate=accumulate)
    step(mx.eye(4))
    before = {part: {p: np.array(a) for p, a in arrays.items()} for part, arrays in step.state_dict().items()}
    for _ in range(5):
        with pytest.raises(RuntimeError, match="Inverse"):
            step(mx.zeros((4, 4)))
        for part, arrays in step.state_dict().items():
            assert all(np.array_equal(np.array(array), before[part][path]) for path, array in arrays.items()), part
    step(mx.eye(4))


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_inside_a_transformation_is_refused_and_the_model_is_whole(captured: bool) -> None:
    model, adam = nn.Linear(4, 1), ca.AdamW(1e-2)
    step = ca.make_step(model, loss_fn, adam)
    for calls in range(2):
        before = values(model)
        state = [model.state, adam.state, mx.random.state]
        wrapped = (
            mx.compile(lambda x: step(x).loss, inputs=state, outputs=state)
            if captured
            else mx.compile(lambda x: step(x).loss)
        )
        with pytest.raises(InputError, match=r"inside mx\.compile.*call it outside"):
            wrapped(mx.ones((8, 4)))
        assert all(np.array_equal(array, before[path]) for path, array in values(model).items())
        mx.eval(adam.state, mx.random.normal((1,)))
        step(mx.ones((8, 4)))
        assert adam.step.item() == calls + 1


@pytest.mark.parametrize("cls", [ca.AdamW, optim.AdamW, optim.SGD, partial(ca.Adam, moments="8bit")])
@pytest.mark.parametrize("how", ["called", "make_step"])
def test_what_one_thread_makes_another_may_use_first(cls: Callable[..., Any], how: str) -> None:
    model = nn.Linear(100, 100)
    mx.eval(model.parameters())
    x = mx.ones((2, 100))
    mx.eval(x)
    optimizer = cls(1e-3)
    if how == "make_step":
        step = ca.make_step(model, loss_fn, optimizer)
    else:
        optimizer.init(model.trainable_parameters())
        if not isinstance(optimizer, ca.Adam):
            mx.eval(optimizer.state)  # stock MLX leaves that lazy
    errors = []

    def work() -> None:
        try:
            if how == "make_step":
                step(x)
            else:
                optimizer.update(model, nn.value_and_grad(model, loss_fn)(model, x)[1])
            mx.eval(model.parameters(), optimizer.state)
        except Exception as error:
            errors.append(error)

    before = np.array(model.weight)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert not np.array_equal(np.array(model.weight), before)


class Buffer(nn.Module):
    """A buffer that counts the forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(4, 1), mx.array(0.0)
        self.freeze(recurse=False, keys=["count"])

    def __call__(self, x: mx.array) -> mx.array:
        self.count = self.count + 1
        return self.layer(x)


def test_a_trace_that_ends_early_in_one_thread_leaves_that_of_another() -> None:
    class Counting(Buffer):
        def __call__(self, x: mx.array) -> mx.array:
            y = super().__call__(x)
            if failing:
                raise RuntimeError("not now")
            return y

    failing, errors = False, []
    model, x = Counting(), mx.ones((2, 4))
    mx.eval(x)
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-2))
    step(x)

    def work() -> None:
        try:
            step(x)
        except RuntimeError as error:
            errors.append(str(error))

    failing = True
    thread = threading.Thread(target=work)  # traces anew: MLX's traces belong to a thread
    thread.start()
    thread.join()
    assert errors == ["not now"]
    failing = False
    step(x)
    assert model.count.item() == 2


def test_more_dtypes_than_traces_that_are_kept() -> None:
    model = Buffer()
    step = ca.make_step(model, loss_fn, optim.SGD(0.0), max_traces=1)
    shapes = ((), (1,), (1, 1), (1, 1, 1))
    for shape in (*shapes, *shapes[:3], shapes[0], shapes[1]):
        model.count = mx.zeros(shape)
        step(mx.ones((2, 4)))
        assert model.count.shape == shape
        assert model.count.item() == 1


def test_something_else_than_an_array_is_named() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [mx.ones((2,)), mx.ones((2,))]

    for optimizer in (ca.AdamW(1e-2), optim.SGD(1e-2)):
        model = Scales()
        step = ca.make_step(model, lambda model, x: (model.scales[0] * model.scales[1] * x).sum(), optimizer)
        step(mx.ones((2,)))
        kept, model.scales[1] = model.scales[1], np.ones(2)
        with pytest.raises(TypeError, match=r"'scales\.1' has become ndarray; assign an mx\.array"):
            step(mx.ones((2,)))
        model.scales[1] = kept
        step(mx.ones((2,)))


@pytest.mark.parametrize("optimizer", [ca.AdamW(1e-2), optim.AdamW(1e-2)])
def test_a_weight_of_another_shape_gets_advice_that_works(optimizer: optim.Optimizer) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    step = ca.make_step(model, loss_fn, optimizer)
    step(mx.ones((2, 4)))
    moments = np.array(optimizer.state["layers"][1]["bias"]["m"])
    model.layers[0].weight, model.layers[0].bias, model.layers[1].weight = mx.ones((5, 4)), mx.ones(5), mx.ones((1, 5))
    before = dict(tree_flatten(model.parameters()))
    with pytest.raises(InputError, match=r"'layers.0.*shape \(5.*call make_step again, with the same optimizer"):
        step(mx.ones((2, 4)))
    assert all(array is before[path] for path, array in tree_flatten(model.parameters()))
    with pytest.warns(UserWarning, match="moments of layers.0.weight, layers.0.bias, layers.1.weight.*begin anew"):
        step = ca.make_step(model, loss_fn, optimizer)
    assert np.array_equal(np.array(optimizer.state["layers"][1]["bias"]["m"]), moments)
    assert optimizer.state["layers"][0]["weight"]["m"].shape == (5, 4)
    step(mx.ones((2, 4)))


@pytest.mark.parametrize("cls", [ca.AdamW, optim.SGD, lambda rate: optim.MultiOptimizer([optim.SGD(rate)])])
def test_a_schedule_of_plain_python_is_refused_before_the_first_step(cls: Callable[..., Any]) -> None:
    def warm(step: mx.array) -> float:
        return 1e-3 * min(1.0, step.item() / 10)

    with pytest.raises(InputError, match=r"schedule .*warm \(.*test_failing_calls.py.*compiled_adam\.schedulers"):
        ca.make_step(nn.Linear(4, 1), loss_fn, cls(warm))


@pytest.mark.parametrize("optimizer", [lambda: ca.AdamW(1e-2), lambda: optim.AdamW(1e-2)])
def test_what_is_put_into_a_state_that_was_kept_is_used(optimizer: Callable[[], Any]) -> None:
    """Between steps, moments of packed parameters are not in the state's tree, which somebody may have kept."""

    def edited(with_step: bool) -> nn.Module:
        mx.random.seed(0)
        model, its = nn.Linear(4, 4), optimizer()
        its.init(model.trainable_parameters())
        step = ca.make_step(model, loss_fn, its) if with_step else None
        for i in range(6):
            x = mx.random.normal((3, 4), key=mx.random.key(i))
            if step is None:
                its.update(model, nn.value_and_grad(model, loss_fn)(model, x)[1])
            else:
                step(x)
            if i == 0:
                kept, inner = its.state, its.state["weight"]
            if i == 2:
                inner["m"] = mx.ones((4, 4))
            if i == 3:
                kept["bias"] = {"m": mx.ones(4), "v": mx.ones(4)}
        return model

    assert_same(edited(True), edited(False), 1e-5)  # float32, fused differently


class Counts(optim.Optimizer):
    """A number of Python in the state of each parameter, which its update counts or reads."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self._counts = counts

    def init_single(self, parameter: mx.array, state: dict) -> None:
        state["t"] = 1

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        state["t"] += self._counts
        return parameter - 0.01 * state["t"] * gradient


def test_a_number_that_an_update_changes_is_refused_by_name() -> None:
    model = nn.Linear(4, 4)
    step, before = ca.make_step(model, loss_fn, Counts(True)), values(model)
    with pytest.raises(InputError, match=r"changes '0\.weight\.t' of its state, which is int.*mx.array in init_single"):
        step(mx.ones((3, 4)))
    assert all(np.array_equal(array, before[path]) for path, array in values(model).items())
    make = partial(nn.Linear, 4, 4)
    assert_same(trained(make, lambda: Counts(False), True), trained(make, lambda: Counts(False), False), 1e-5)


def test_an_update_is_traced_once_where_one_trace_is_kept() -> None:
    step = ca.make_step(nn.Linear(4, 4), loss_fn, ca.AdamW(1e-2), accumulate=2, max_traces=1)
    for i in range(8):
        step(mx.ones((3 + i // 4, 4)))
    assert step.traces == {"grad": 2, "accumulate": 1, "update": 1, "evicted": 1}


@pytest.mark.parametrize("base", [ca.AdamW, optim.SGD])
@pytest.mark.parametrize("name", ["calls", "_calls"])
def test_a_number_that_a_subclass_counts_is_followed(base: type, name: str) -> None:
    """It is a constant of a trace, so that each update has a trace of its own: slow, but what the class says."""

    class Slower(base):  # type: ignore[misc]
        def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
            setattr(self, name, getattr(self, name, 0) + 1)
            factor = 1.0 / getattr(self, name)
            return super().apply_gradients(tree_map(lambda g: factor * g, gradients), parameters)

    def make() -> Any:
        optimizer = Slower(1e-2)
        setattr(optimizer, name, 0)
        return optimizer

    model = partial(nn.Linear, 4, 4)
    assert_same(trained(model, make, True), trained(model, make, False), 1e-5)  # float32, fused differently


def test_what_two_threads_have_traced_never_runs_for_another_function() -> None:
    """MLX forgets it in one of the threads only, and takes a later function at the same address for it."""

    def make(i: int) -> Callable[[mx.array], mx.array]:
        return lambda x: x + i

    functions = [make(i) for i in range(40)]  # all now, so that what is freed below is used again by the next one
    x = mx.array(0)
    mx.eval(x)
    for i, function in enumerate(functions):
        compiled = Compiled(function, 4)
        assert compiled(x).item() == i
        thread = threading.Thread(target=compiled, args=(x,))
        thread.start()
        thread.join()
        del compiled, thread
