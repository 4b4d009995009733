"""Trees, classes and numbers that MLX allows: what plain MLX trains, a step trains, or it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base.errors import InputError
from mlx.utils import tree_map
from nets import assert_same, values

from tests.small_steps import loss_fn, trained


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
