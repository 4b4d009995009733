"""What loops that people have give to a step and get from it: batches, results, optimizers, random numbers."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
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
from nets import assert_same, linear_net, squared_error, values

from tests.small_steps import loss_fn, trained

Pair = namedtuple("Pair", "x y")
X = np.linspace(-1, 1, 12).reshape(3, 4)  # float64, as NumPy makes it


def of_dict(model: nn.Module, batch: Any, scale: float = 1.0) -> mx.array:
    return squared_error(model, batch["x"], batch["y"]) * scale


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_batches_may_be_any_mapping_of_numpy_arrays(kind: type) -> None:
    step = ca.make_step(linear_net(), of_dict, optim.SGD(0.0))
    y = X.sum(axis=1, keepdims=True)
    loss = step(kind(x=X, y=y)).loss
    assert loss.item() == squared_error(linear_net(), mx.array(X), mx.array(y)).item()
    assert loss.dtype == mx.float32  # as mx.array makes float64
    assert step(kind(x=mx.array(X), y=np.float32(y))).loss.item() == loss.item()
    assert step(kind(x=X, y=y), scale=np.float32(2)).loss.item() == pytest.approx(2 * loss.item())  # as a number
    assert step.traces["grad"] == 2  # all arrays are the same signature; a number is a constant


def test_batches_may_be_named_tuples() -> None:
    step = ca.make_step(linear_net(), lambda model, pair: squared_error(model, pair.x, pair.y), optim.SGD(0.0))
    assert step(Pair(X, 0)).loss.item() == squared_error(linear_net(), mx.array(X), 0).item()


def test_a_numpy_buffer_may_be_filled_again() -> None:
    buffer = X.copy()
    step = ca.make_step(linear_net(), lambda model, x: mx.square(model(x)).mean(), optim.SGD(0.0))
    first = step(buffer).loss
    buffer[:] = 0
    assert first.item() == mx.square(linear_net()(mx.array(X))).mean().item()


def test_a_result_unpacks_to_what_loss_fn_returned() -> None:
    def loss_fn(model: nn.Module, x: mx.array) -> Any:
        y = model(x)
        return y.mean(), y.max(), {"shape": y.shape, "parts": [y, (None, "text", 3)]}, 0.5

    result = ca.make_step(linear_net(), loss_fn, optim.SGD(0.0))(X)
    loss, most, parts, number = result
    y = linear_net()(mx.array(X))
    assert (loss.item(), most.item()) == pytest.approx((y.mean().item(), y.max().item()), rel=1e-5)  # fused differently
    assert parts["shape"] == (3, 1)
    assert parts["parts"][1] == (None, "text", 3)
    assert mx.allclose(parts["parts"][0], y)
    assert (number, len(result), result.loss, result.aux) == (0.5, 4, loss, (most, parts, number))
    mx.eval(result)  # a tree, as a tuple is
    doubled = tree_map(lambda a: 2 * a if isinstance(a, mx.array) else a, result)
    assert doubled.loss.item() == 2 * loss.item()


def test_results_may_be_in_a_dictionary() -> None:
    def loss_fn(model: nn.Module, x: mx.array) -> Any:
        y = model(x)
        return {"most": y.max(), "loss": y.mean(), "rows": len(x)}

    loss, rest = result = ca.make_step(linear_net(), loss_fn, optim.SGD(0.0))(X)
    y = linear_net()(mx.array(X))
    assert loss is result.loss
    assert loss.item() == pytest.approx(y.mean().item(), rel=1e-5)
    assert rest.keys() == {"most", "rows"}
    with pytest.raises(TypeError, match="'loss'"):
        ca.make_step(linear_net(), lambda model, x: {"los": model(x).mean()})(mx.array(X))


class Signs:
    """Momentum and signs. The state is a new tree after every update."""

    def __init__(self, rate: float) -> None:
        self.rate, self.state, self.updates = rate, {}, mx.array(0)

    def init(self, parameters: Any) -> None:
        self.state = tree_map(mx.zeros_like, parameters)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self.state = tree_map(lambda m, g: 0.9 * m + g, self.state, gradients)
        self.updates = self.updates + 1
        return tree_map(lambda p, m: p - self.rate * mx.sign(m), parameters, self.state)

    def update(self, model: nn.Module, gradients: Any) -> None:
        model.update(self.apply_gradients(gradients, model.trainable_parameters()))


class Without(Signs):
    """Without `update`."""

    update = None


def started(optimizer: Signs) -> Signs:
    mx.random.seed(0)
    optimizer.init(linear_net().trainable_parameters())
    return optimizer


@pytest.mark.parametrize("cls", [Signs, Without])
def test_an_optimizer_of_ones_own_class_trains_as_in_a_plain_loop(cls: type) -> None:
    made: list[Signs] = []

    def optimizer(cls: type) -> Signs:
        made.append(started(cls(0.01)))
        return made[-1]

    found, expected = (
        trained(linear_net, lambda: optimizer(cls), True),
        trained(linear_net, lambda: optimizer(Signs), False),
    )
    assert_same(found, expected, 1e-6)  # float32, fused differently
    assert [its.updates.item() for its in made] == [4, 4]
    assert not np.allclose(values(found)["layers.0.weight"], values(linear_net())["layers.0.weight"])


def test_an_optimizer_of_ones_own_class_is_traced_once_saved_and_continued() -> None:
    batches = [mx.random.normal((3, 4), key=mx.random.key(i)) for i in range(6)]
    whole = ca.make_step(linear_net(), loss_fn, Signs(0.01))
    assert [whole(x).updated for x in batches] == [True] * 6
    assert whole.traces == {"grad": 1, "accumulate": 0, "update": 1, "evicted": 0}
    first = ca.make_step(linear_net(), loss_fn, Signs(0.01))
    for x in batches[:3]:
        first(x)
    second = ca.make_step(linear_net(), loss_fn, Signs(0.01))
    second.load_state_dict(first.state_dict(), convert=True)
    again = ca.make_step(second.model, loss_fn, second.optimizer)  # make_step calls init, which must not forget
    for x in batches[3:]:
        again(x)
    assert_same(whole.model, again.model, 0.0)
    assert again.optimizer.updates.item() == 6
    assert repr(again).startswith("TrainStep(Sequential of 49 trainable parameters, Signs(), accumulate=1")
    assert again.description() == {"accumulate": 1, "weighted": False, "optimizer": "Signs", "rate": 0.01}


def test_a_subclass_may_assign_a_new_state() -> None:
    class Momentum(optim.SGD):
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            new = super().apply_gradients(gradients, parameters)
            self._state = dict(self._state)
            return new

    found, expected = (trained(linear_net, partial(cls, 0.1, momentum=0.9), True) for cls in (Momentum, optim.SGD))
    assert_same(found, expected, 0.0)


def test_what_a_trace_of_ones_own_optimizer_would_freeze_is_refused() -> None:
    class Counting(Signs):
        count = 0

        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            self.count = self.count + 1
            return super().apply_gradients(gradients, parameters)

    class Growing(Signs):
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            self.more = self.updates
            return super().apply_gradients(gradients, parameters)

    counting = Counting(0.1)
    counting.count = 0
    for optimizer, message in ((counting, r"count'.* int.*mx\.array"), (Growing(0.1), r"adds.*more.*init")):
        step = ca.make_step(linear_net(), loss_fn, optimizer)
        before = values(step.model)
        with pytest.raises(InputError, match=message):
            step(X)
        assert all(np.array_equal(array, before[path]) for path, array in values(step.model).items())
        assert optimizer.updates.item() == 0
    holding = Signs(0.1)
    holding.model = linear_net()
    with pytest.raises(InputError, match="Signs keeps a module"):
        ca.make_step(linear_net(), loss_fn, holding)
    for optimizer in (Signs, object()):
        with pytest.raises(TypeError, match=r"init.*apply_gradients"):
            ca.make_step(linear_net(), loss_fn, optimizer)
