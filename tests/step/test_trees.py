"""Trees, classes and numbers that MLX allows: what plain MLX trains, a step trains, or it is refused by name."""

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
from compiled_adam.update import residual
from mlx.utils import tree_flatten, tree_map
from nets import assert_same, values


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return mx.square(model(x) - 1).mean()


def trained(make: Callable[[], nn.Module], optimizer: Callable[[], Any], with_step: bool, calls: int = 4) -> nn.Module:
    """A model after some updates by a step, or by MLX's own loop."""
    mx.random.seed(0)
    model, its = make(), optimizer()
    step = ca.make_step(model, loss_fn, its) if with_step else None
    for i in range(calls):
        x = mx.random.normal((3, 4), key=mx.random.key(i))
        if step is None:
            its.update(model, nn.value_and_grad(model, loss_fn)(model, x)[1])
            mx.eval(model.parameters(), its.state)
        else:
            step(x)
    return model


class Named(nn.Module):
    """One layer under any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        setattr(self, name, nn.Linear(4, 1))

    def __call__(self, x: mx.array) -> mx.array:
        return getattr(self, self._name)(x)


class Layers(nn.Module):
    def __init__(self, **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x: mx.array) -> mx.array:
        return self.last(nn.gelu(self.first(x)))


def frozen(layer: nn.Module) -> nn.Module:
    layer.freeze()
    return layer


MODELS: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: Layers(first=nn.Linear(4, 4), act=nn.GELU(), last=nn.Linear(4, 4)),
    "dropout last": lambda: Layers(first=nn.Linear(4, 4), last=nn.Linear(4, 4), drop=nn.Dropout(0.5)),
    "list that ends without parameters": lambda: nn.Sequential(nn.Linear(4, 1), nn.ReLU()),
    "frozen layer": lambda: Layers(first=nn.Linear(4, 4), last=nn.Linear(4, 4), more=frozen(nn.Linear(4, 4))),
    "frozen layer in a list": lambda: nn.Sequential(nn.Linear(4, 4), frozen(nn.Linear(4, 4)), nn.Linear(4, 1)),
    "nested without parameters": lambda: Layers(first=nn.Linear(4, 4), acts=[[nn.ReLU()]], last=nn.Linear(4, 4)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_multi_optimizer_updates_what_it_updates_in_mlxs_loop(kind: str) -> None:
    def optimizer() -> optim.Optimizer:
        return optim.MultiOptimizer([ca.AdamW(1e-2), optim.SGD(1e-1)], [lambda path, p: p.ndim > 1])

    found, expected = (trained(MODELS[kind], optimizer, with_step) for with_step in (True, False))
    assert_same(found, expected, 1e-5)  # float32, fused differently
    before = MODELS[kind]()
    moved = [not np.allclose(values(found)[path], array) for path, array in values(before).items()]
    assert any(moved)


@pytest.mark.parametrize("name", ["skipped", "grad_norm", "rounding_key", "learning", "m", "v", "residual", "states"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}, {"moments": "bfloat16"}])
def test_a_layer_may_have_the_name_of_a_counter(name: str, options: dict[str, Any]) -> None:
    make = partial(Named, name)
    found, expected = (trained(make, lambda: ca.AdamW(1e-2, **options), with_step) for with_step in (True, False))
    stock = trained(make, lambda: optim.AdamW(1e-2), False)
    # bfloat16 moments are rounded at random, in another order for packed leaves: 2^-8 of an update of 1e-2 each.
    tolerance = 1e-3 if options.get("moments") else 1e-5
    assert_same(found, expected, tolerance)
    if "max_grad_norm" not in options:
        assert_same(found, stock, max(tolerance, 1e-4))  # MLX's formula divides in another order


def test_a_counter_whose_name_is_taken_counts_and_comes_back() -> None:
    model = Named("skipped")
    adam = ca.AdamW(1e-2, skip_nonfinite=True)
    step = ca.make_step(model, loss_fn, adam)
    step(mx.ones((3, 4)))
    assert step(mx.full((3, 4), float("nan"))).skipped.item() == 1
    assert adam.skipped.item() == 1
    fresh = ca.make_step(Named("skipped"), loss_fn, ca.AdamW(1e-2, skip_nonfinite=True))
    fresh.load_state_dict(step.state_dict())
    assert fresh(mx.full((3, 4), float("nan"))).skipped.item() == 2


@pytest.mark.parametrize("name", ["step", "learning_rate"])
def test_a_name_that_mlx_itself_cannot_train_is_refused_before_the_first_step(name: str) -> None:
    with pytest.raises(InputError, match=f"parameters named '{name}'.*rename"):
        ca.make_step(Named(name), loss_fn, ca.AdamW(1e-2))


class Caching(nn.Module):
    """Masks by length, made in the forward pass; also a shape and a list of numbers that it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self._masks, self.seen, self.history = nn.Linear(4, 4), {}, (0, 0), []

    def __call__(self, x: mx.array) -> mx.array:
        length = x.shape[0]
        if length not in self._masks:
            self._masks[length] = mx.tril(mx.ones((length, length)))
        self.seen = x.shape
        self.history.append(length)
        return self._masks[length] @ self.layer(x)


def test_caches_by_length_are_kept_and_trace_a_gradient_alone() -> None:
    mx.random.seed(0)
    model, twin, adam = Caching(), Caching(), ca.AdamW(1e-2)
    twin.update(model.parameters())
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-2))
    for i, length in enumerate((3, 5, 3, 7, 5, 3)):
        x = mx.random.normal((length, 4), key=mx.random.key(i))
        step(x)
        adam.update(twin, nn.value_and_grad(twin, loss_fn)(twin, x)[1])
    assert step.traces == {"grad": 3, "accumulate": 0, "update": 1, "evicted": 0}
    assert {n: mask.tolist() for n, mask in model._masks.items()} == {
        n: mx.tril(mx.ones((n, n))).tolist() for n in (3, 5, 7)
    }
    assert model.seen == (7, 4)
    assert model.history == [3, 5, 7]  # a trace is Python's only visit
    assert_same(model, twin, 1e-5)  # float32, fused differently
    model._masks.clear()  # what is cached is nobody's parameter: it may go
    step(mx.ones((3, 4)))
    assert step.traces["update"] == 1


def test_a_cached_constant_that_somebody_replaces_is_used() -> None:
    model = Caching()
    step = ca.make_step(model, lambda model, x: model(x).sum(), optim.SGD(0.0))
    first = step(mx.ones((3, 4))).loss.item()
    model._masks[3] = mx.zeros((3, 3))
    assert first != 0
    assert step(mx.ones((3, 4))).loss.item() == 0


def test_numbers_that_a_module_remembers_trace_nothing() -> None:
    model = Caching()
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-2), accumulate=2)
    for i in range(6):
        model.history.append(step(mx.ones((3, 4))).loss.item())
        model.seen = (i, i)
    assert step.traces == {"grad": 1, "accumulate": 1, "update": 1, "evicted": 0}


@pytest.mark.parametrize("where", ["attribute", "dictionary", "tuple"])
def test_what_depends_on_the_batch_cannot_be_kept(where: str) -> None:
    class Keeping(Caching):
        def __call__(self, x: mx.array) -> mx.array:
            y = self.layer(x)
            if where == "attribute":
                self.kept = y
            elif where == "dictionary":
                self._masks["kept"] = y
            else:
                self.seen = (y, y)
            return y

    model = Keeping()
    before = values(model)
    with pytest.raises(InputError, match="create it in __init__"):
        ca.make_step(model, loss_fn, ca.AdamW(1e-2))(mx.ones((3, 4)))
    assert model.seen == (0, 0)
    assert model._masks == {}
    assert values(model).keys() == before.keys()


def test_a_parameter_that_the_forward_pass_creates_is_refused_by_name() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def __call__(self, x: mx.array) -> mx.array:
            if "scale" not in self:
                self.scale = mx.ones((4,))
            return self.layer(x) * self.scale

    model = Lazy()
    with pytest.raises(InputError, match=r"\(scale\)"):
        ca.make_step(model, loss_fn, ca.AdamW(1e-2))(mx.ones((3, 4)))
    assert "scale" not in model


def test_equal_tuples_that_are_put_in_anew_are_no_other_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 3))
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-3), accumulate=2)
    x = mx.ones((1, 5, 5, 2))
    for _ in range(4):
        step(x)
        mx.eval(nn.value_and_grad(model, loss_fn)(model, x))
    assert step.traces == {"grad": 1, "accumulate": 1, "update": 1, "evicted": 0}


@pytest.mark.parametrize("base", [ca.AdamW, optim.AdamW, optim.SGD])
def test_an_update_of_a_subclass_is_followed(base: type) -> None:
    class Clipped(base):
        def update(self, model: nn.Module, gradients: dict) -> None:
            super().update(model, tree_map(lambda g: mx.clip(g, -1e-3, 1e-3), gradients))
            model.update(tree_map(lambda p: mx.maximum(p, -0.5), model.trainable_parameters()))

    found, expected = (trained(lambda: nn.Linear(4, 1), lambda: Clipped(0.1), with_step) for with_step in (True, False))
    plain = trained(lambda: nn.Linear(4, 1), lambda: base(0.1), False)
    assert_same(found, expected, 1e-5)  # float32, fused differently
    assert not np.allclose(values(found)["weight"], values(plain)["weight"], rtol=1e-3)


def test_complex_parameters_are_trained_as_mlx_does() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.r = mx.array([3 + 4j, 1 - 1j, 0.5j, 1 + 0j]), mx.array([1.0, 2.0, 3.0, 4.0])

        def __call__(self, x: mx.array) -> mx.array:
            return mx.abs(self.c * x) * self.r

    found, expected = (trained(Net, lambda: optim.SGD(0.1, momentum=0.9), with_step) for with_step in (True, False))
    assert_same(found, expected, 1e-5)  # float32, fused differently
    window = Net()
    step = ca.make_step(window, loss_fn, optim.SGD(0.1, momentum=0.9), accumulate=2)
    for i in range(4):
        for _ in range(2):
            step(mx.random.normal((3, 4), key=mx.random.key(i)))
    assert_same(window, expected, 1e-5)
    with pytest.raises(TypeError, match=r"'c' is mlx\.core\.complex64; Adam updates float32"):
        ca.make_step(Net(), loss_fn, ca.AdamW(1e-2))


@pytest.mark.parametrize("key", ["3", 3, "a.b"])
def test_keys_of_every_kind(key: Any) -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = {key: nn.Linear(4, 4), "other": nn.Linear(4, 1)}

        def __call__(self, x: mx.array) -> mx.array:
            return self.layers["other"](self.layers[key](x))

    for optimizer in (lambda: ca.AdamW(1e-2, max_grad_norm=1.0), lambda: optim.SGD(0.1, momentum=0.9)):
        found, expected = (trained(Keyed, optimizer, with_step) for with_step in (True, False))
        assert_same(found, expected, 1e-5)  # float32, fused differently


# Scalars of the state.


@pytest.mark.parametrize("cls", [ca.AdamW, optim.AdamW])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [7, np.int64(7), 7.0, np.array(7)])
def test_a_number_in_the_state_is_a_step(cls: type, when: str, number: Any) -> None:
    model, optimizer = nn.Linear(4, 1), cls(1e-3, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    if when == "before":
        optimizer.state["step"] = number
    step = ca.make_step(model, loss_fn, optimizer)
    if when == "after":
        step(mx.ones((2, 4)))
        optimizer.state["step"] = number
    for _ in range(2):
        step(mx.ones((2, 4)))
    assert int(optimizer.state["step"]) == 9


def test_numbers_in_the_state_of_a_called_optimizer() -> None:
    parameters = {"w": mx.ones((2,))}
    adam = ca.AdamW(1e-3)
    adam.state["step"], adam.state["learning_rate"] = 7, 0.25
    adam.apply_gradients(parameters, parameters)
    assert adam.step.item() == 8
    assert adam.state["step"].item() == 8
    assert adam.learning_rate.item() == 0.25
    for name, value in (("step", "7"), ("step", -1), ("step", 1.5), ("step", True), ("learning_rate", "fast")):
        adam = ca.AdamW(1e-3)
        adam.init(parameters)
        before = adam.state["w"]["m"]
        adam.state[name] = value
        with pytest.raises((TypeError, ValueError), match=f"{name}.*is {value!r}"):
            adam.apply_gradients(parameters, parameters)
        assert adam.state["w"]["m"] is before


@pytest.mark.parametrize("optimizer", [lambda: ca.AdamW(1e-2, max_grad_norm=1.0), lambda: optim.SGD(1e-2)])
def test_results_are_values(optimizer: Callable[[], Any]) -> None:
    model, its = nn.Linear(4, 1), optimizer()
    step = ca.make_step(model, loss_fn, its)
    result = step(mx.ones((2, 4)))
    before = [array.item() for array in (result.loss, result.grad_norm, result.learning_rate, result.skipped)]
    kept = step.state_dict()
    weights = np.array(kept["model"]["weight"])
    its.state["learning_rate"] *= 0.0
    for name in ("grad_norm", "skipped"):
        if name in its.state:
            its.state[name] += 5
    model.weight[:] = 0.0
    mx.eval(its.state, model.parameters())
    assert [array.item() for array in (result.loss, result.grad_norm, result.learning_rate, result.skipped)] == before
    assert np.array_equal(np.array(kept["model"]["weight"]), weights)


# Weights that somebody replaces.


@pytest.mark.parametrize("size", [8, 40000])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("many", [False, True])
def test_a_replaced_weight_starts_with_residual_zero(size: int, dtype: mx.Dtype, many: bool) -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mx.random.normal((size,), key=mx.random.key(1)).astype(dtype)
            self.b = mx.random.normal((size,), key=mx.random.key(2)).astype(dtype)

    model, adam = Weights(), ca.AdamW(1e-3, weight_decay=0.0)
    optimizer = optim.MultiOptimizer([adam, optim.SGD(0.0)], [lambda path, p: True]) if many else adam
    step = ca.make_step(model, lambda m, x: ((m.a + m.b) * x).sum().astype(mx.float32), optimizer)
    for i in range(3):
        step(mx.array(0.5 + i))
    zero = residual.zeros(model.a)[0].item()
    rests = np.array(adam.state["a"]["residual"])
    assert (rests != zero).mean() > 0.9
    edits: dict[str, Callable[[], None]] = {
        "another array": lambda: setattr(model, "a", mx.where(mx.arange(size) % 2 == 0, mx.zeros((), dtype), model.a)),
        "in place": lambda: model.a.__setitem__(slice(None, None, 2), 1.0),
    }
    adam.learning_rate = 0.0  # the update itself changes nothing then
    for edit in edits.values():
        edit()
        weights = np.array(model.a.astype(mx.float32))
        step(mx.array(0.5))
        rests_now = np.array(adam.state["a"]["residual"])
        assert (rests_now[::2] == zero).all()
        assert np.array_equal(rests_now[1::2], rests[1::2])  # of those that nobody has touched
        assert np.array_equal(np.array(model.a.astype(mx.float32)), weights)
    untouched = np.array(adam.state["b"]["residual"])
    mx.eval(nn.value_and_grad(model, lambda m: m.a.sum().astype(mx.float32))(model))  # puts copies in their place
    step(mx.array(0.5))
    assert np.array_equal(np.array(adam.state["b"]["residual"]), untouched)


@pytest.mark.parametrize("size", [8, 40000])
@pytest.mark.parametrize("many", [False, True])
def test_what_is_saved_after_weights_were_replaced_goes_on_like_the_step(size: int, many: bool) -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = mx.random.normal((size,), key=mx.random.key(1)).astype(mx.bfloat16)
            self.b = mx.random.normal((size,), key=mx.random.key(2)).astype(mx.bfloat16)

    def make() -> ca.TrainStep:
        adam: optim.Optimizer = ca.AdamW(1e-4)
        if many:
            adam = optim.MultiOptimizer([adam, optim.SGD(0.1)], [lambda path, p: True])
        return ca.make_step(Weights(), lambda m, x: ((m.a + m.b) * x).sum().astype(mx.float32), adam)

    step, fresh = make(), make()
    for i in range(3):
        step(mx.array(0.5 + i))
    step.model.a = step.model.a[::-1]
    step.model.b[:4] = 0.25
    fresh.load_state_dict(step.state_dict())
    for each in (step, fresh):
        each(mx.array(0.5))
    expected = step.state_dict()
    for part, arrays in fresh.state_dict().items():
        for path, array in arrays.items():
            assert mx.array_equal(array, expected[part][path]).item(), path


def test_running_statistics_belong_to_a_state_from_before_the_first_step() -> None:
    def make() -> nn.Module:
        mx.random.seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Linear(3, 1))

    trained = make()
    step = ca.make_step(trained, loss_fn, ca.AdamW(1e-2))
    for i in range(3):
        step(mx.random.normal((8, 4), key=mx.random.key(i)))
    before = ca.make_step(trained, loss_fn, ca.AdamW(1e-2)).state_dict()
    fresh = ca.make_step(make(), loss_fn, ca.AdamW(1e-2))
    fresh.load_state_dict(before)
    assert_same(fresh.model, trained, 0.0)


def test_a_loaded_state_keeps_its_residuals() -> None:
    model = nn.Linear(300, 300)
    model.set_dtype(mx.bfloat16)
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-3))
    x = mx.ones((2, 300), mx.bfloat16)
    step(x)
    kept = step.state_dict()
    step(x)
    expected = step.state_dict()
    step.load_state_dict(kept)
    step(x)
    for path, array in step.state_dict()["optimizer"].items():
        assert mx.array_equal(array, expected["optimizer"][path]).item(), path


# Errors, threads and transformations.


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

    with pytest.raises(InputError, match=r"schedule .*warm \(.*test_trees.py.*compiled_adam\.schedulers"):
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
