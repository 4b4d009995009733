"""Models that loss_fn uses besides the one that is trained: a step follows them, as a plain loop does."""

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
from nets import assert_same, linear_net, net, squared_error, values


def judged(judge: nn.Module, model: nn.Module, x: mx.array) -> mx.array:
    return squared_error(judge, mx.repeat(model(x), 4, axis=1), mx.ones((3, 1)))


class Trainer:
    def __init__(self, judge: nn.Module) -> None:
        self.judge, self.data = judge, [object()]

    def loss(self, model: nn.Module, x: mx.array) -> mx.array:
        return judged(self.judge, model, x)


class Called(Trainer):
    def __call__(self, model: nn.Module, x: mx.array) -> mx.array:
        return sum(self.loss(model, x) for _ in range(2)) / 2


def in_a_closure(judge: nn.Module) -> Callable[..., mx.array]:
    def helper(model: nn.Module, x: mx.array) -> mx.array:
        return (
            sum([judged(judge, model, x) for _ in range(2)]) / 2 if later is None else later
        )  # also in a comprehension

    def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
        return helper(model, x)

    its = ca.make_step(linear_net(), loss_fn)  # while `later` has no value, which must do no harm
    later = None
    assert its.traces["grad"] == 0
    return loss_fn


def global_judge(judge: nn.Module) -> Callable[..., mx.array]:
    globals()["JUDGE"] = judge
    return lambda model, x: judged(JUDGE, model, x)  # noqa: F821


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "partial": lambda judge: partial(judged, judge),
    "method": lambda judge: Trainer(judge).loss,
    "object": Called,
    "closure": in_a_closure,
    "list": lambda judge: lambda model, x, of=[judge]: judged(of[0], model, x),
    "global": global_judge,
}


def game(with_steps: bool, way: str, between: Callable[[nn.Module], Any] = lambda judge: None) -> Any:
    """Two models that train against each other, as in a GAN. The judge has running statistics."""
    model, judge = linear_net(), net()
    fool = WAYS[way](judge)
    others: Any = lambda judge, x: squared_error(judge, mx.repeat(model(x), 4, axis=1), mx.zeros((3, 1)))  # noqa: E731
    pairs = [(model, fool, optim.Adam(0.05)), (judge, others, optim.SGD(0.1, momentum=0.9))]
    steps = [ca.make_step(*each) for each in pairs]
    losses = []
    for i in range(4):
        x = mx.random.normal((3, 4), key=mx.random.key(i))
        for (trained, loss_fn, optimizer), step in zip(pairs, steps, strict=True):
            between(judge)
            if with_steps:
                losses.append(step(x).loss.item())
                continue
            loss, gradients = nn.value_and_grad(trained, loss_fn)(trained, x)
            optimizer.update(trained, gradients)
            mx.eval(model.parameters(), judge.parameters(), optimizer.state)
            losses.append(loss.item())
    return model, judge, losses, [step.traces["grad"] for step in steps]


@pytest.mark.parametrize("way", WAYS)
def test_two_models_train_each_other(way: str) -> None:
    model, judge, losses, traces = game(True, way)
    expected_model, expected_judge, expected, _ = game(False, way)
    assert losses == pytest.approx(expected, rel=1e-5)  # float32, fused differently
    # Adam divides by sqrt(v), which amplifies that.
    assert_same(model, expected_model, 1e-4)
    assert_same(judge, expected_judge, 1e-4)  # with the running statistics, which both steps move
    assert traces == [1, 1]


def test_freezing_traces_nothing_and_training_flags_and_replaced_layers_are_seen() -> None:
    def between(judge: nn.Module) -> None:
        judge.unfreeze()
        judge.layers[3].freeze()
        judge.freeze() if frozen.append(1) or len(frozen) % 2 else None

    frozen: list[int] = []
    judge = net()
    step = ca.make_step(linear_net(), partial(judged, judge), optim.SGD(0.0))
    x = mx.ones((3, 4))
    for _ in range(4):
        between(judge)
        loss = step(x).loss.item()
    assert step.traces["grad"] == 1
    judge.eval()
    assert step(x).loss.item() != loss
    assert step.traces["grad"] == 2
    judge.layers[4] = nn.Linear(8, 1)
    assert step(x).loss.item() == pytest.approx(judged(judge, linear_net(), x).item(), rel=1e-5)  # fused differently


def test_an_error_leaves_the_other_model_whole() -> None:
    def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
        if fails:
            judge.layers.append(judged(judge, model, x))
            raise OSError("transient")
        return judged(judge, model, x)

    judge, fails = net(), True
    before = values(judge)
    step = ca.make_step(linear_net(), loss_fn, optim.SGD(0.1))
    with pytest.raises(OSError, match="transient"):
        step(mx.ones((3, 4)))
    after = values(judge)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    fails = False
    assert step(mx.ones((3, 4))).updated
    assert set(step.state_dict()["model"]) == {f"layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


def test_layers_that_both_models_have_are_trained_once() -> None:
    model = linear_net()
    twin = linear_net()
    shared = nn.Sequential(model, nn.Tanh())
    step = ca.make_step(model, lambda model, x: squared_error(shared, x, 0.5), optim.SGD(0.1))
    reference = ca.make_step(twin, lambda model, x: mx.square(mx.tanh(model(x)) - 0.5).mean(), optim.SGD(0.1))
    for i in range(3):
        x = mx.random.normal((3, 4), key=mx.random.key(i))
        assert step(x).loss.item() == pytest.approx(reference(x).loss.item(), rel=1e-6)
    assert_same(model, twin, 1e-6)
