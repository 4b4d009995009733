"""3000 steps of every kind of workload: after them as many arrays, and as much memory, as after 1000."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

# Several counts before each of the two, because what is traced anew changes in cycles.
FIRST, LAST = (range(last - 130, last + 1, 10) for last in (1000, 3000))


def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
    return mx.square(model(x)).mean().astype(mx.float32)


def batch(rows: int = 2) -> mx.array:
    return mx.ones((rows, 4))


class Caching(nn.Module):
    """A mask for each length, made in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self._masks = nn.Linear(4, 4), {}

    def __call__(self, x: mx.array) -> mx.array:
        if x.shape[0] not in self._masks:
            self._masks[x.shape[0]] = mx.ones((x.shape[0], 1))
        return self.layer(x) * self._masks[x.shape[0]]


def net(width: int = 4, dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 4))
    model.set_dtype(dtype)
    return model


Run = Callable[[int], object]  # the step of this number


def plain(model: nn.Module, optimizer: Any, **options: Any) -> Run:
    step = ca.make_step(model, loss_fn, optimizer, **options)
    return lambda i: step(batch())


def shapes() -> Run:
    step = ca.make_step(net(), loss_fn, ca.AdamW(1e-3), max_traces=4)
    return lambda i: step(batch(1 + i // 20 % 7))  # a new trace at every twentieth step


def subsets() -> Run:
    """An eager update of other parameters each time, of more sets than are kept."""
    optimizer = ca.AdamW(1e-3)
    parameters = {str(i): mx.ones((3,)) for i in range(20)}
    optimizer.init(parameters)

    def run(i: int) -> None:
        chosen = [str(i // 20 % 20), str((i // 20 + 1) % 20)]
        parameters.update(optimizer.apply_gradients({name: mx.ones((3,)) for name in chosen}, parameters))
        mx.eval(parameters, optimizer.state)

    return run


def numbers() -> Run:
    """A number of which a trace is a constant, changed at every tenth step."""
    optimizer = ca.AdamW(1e-3)
    step = ca.make_step(nn.Linear(4, 1), loss_fn, optimizer, max_traces=4)

    def run(i: int) -> None:
        optimizer.weight_decay = 1e-4 * (1 + i // 10)
        step(batch())

    return run


def looked_at() -> Run:
    optimizer = ca.AdamW(1e-3)
    step = ca.make_step(net(), loss_fn, optimizer)

    def run(i: int) -> None:
        step(batch())
        mx.eval(optimizer.state)

    return run


def saved() -> Run:
    step = ca.make_step(net(), loss_fn, ca.AdamW(1e-3), accumulate=2)

    def run(i: int) -> None:
        step(batch())
        if i % 100 == 50:
            step.load_state_dict(step.state_dict())

    return run


def replaced() -> Run:
    model = net(dtype=mx.bfloat16)
    step = ca.make_step(model, loss_fn, ca.AdamW(1e-3))

    def run(i: int) -> None:
        step(batch())
        model.layers[0].weight = mx.clip(model.layers[0].weight, -0.1, 0.1)

    return run


def begun_anew() -> Run:
    """A new step for the same model and optimizer."""
    model, optimizer = net(), ca.AdamW(1e-3)
    steps = [ca.make_step(model, loss_fn, optimizer)]

    def run(i: int) -> None:
        if i % 50 == 0:
            steps[0] = ca.make_step(model, loss_fn, optimizer)
        steps[0](batch())

    return run


def caches() -> Run:
    step = ca.make_step(Caching(), loss_fn, ca.AdamW(1e-3), max_traces=4)
    return lambda i: step(batch(1 + i // 20 % 7))


def multi() -> Run:
    optimizer = optim.MultiOptimizer([ca.AdamW(1e-3), optim.SGD(1e-3)], [lambda path, p: p.ndim > 1])
    return plain(net(), optimizer)


WORKLOADS: dict[str, Callable[[], Run]] = {
    "packed small leaves": lambda: plain(net(), ca.AdamW(1e-3, max_grad_norm=1.0, skip_nonfinite=True)),
    "large bfloat16 leaves": lambda: plain(net(192, mx.bfloat16), ca.AdamW(1e-3)),
    "8bit": lambda: plain(net(64), ca.AdamW(1e-3, moments="8bit")),
    "window": lambda: plain(net(), ca.AdamW(1e-3), accumulate=4),
    "stock optimizer": lambda: plain(net(), optim.AdamW(1e-3)),
    "several optimizers": multi,
    "changing shapes": shapes,
    "changing subsets": subsets,
    "changing numbers": numbers,
    "state looked at": looked_at,
    "state saved and loaded": saved,
    "replaced weights": replaced,
    "steps begun anew": begun_anew,
    "caches by length": caches,
}
SLOW = {"8bit", "stock optimizer", "several optimizers", "changing shapes", "changing numbers", "state looked at"}
SLOW |= {"steps begun anew", "caches by length", "large bfloat16 leaves", "replaced weights", "state saved and loaded"}


def counted() -> tuple[int, int]:
    """Live arrays made since the test began, and the bytes of all, when everything is computed."""
    gc.collect()
    mx.synchronize()
    return sum(isinstance(each, mx.array) for each in gc.get_objects()), mx.get_active_memory()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in WORKLOADS]
)
@pytest.mark.usefixtures("only_new_objects")
def test_three_thousand_steps(name: str) -> None:
    run = WORKLOADS[name]()
    found = {}
    for i in range(1, LAST.stop):
        run(i)
        if i in FIRST or i in LAST:
            found[i] = counted()
    (arrays, memory), (arrays_later, memory_later) = (
        [max(found[i][column] for i in steps) for column in (0, 1)] for steps in (FIRST, LAST)
    )
    assert 0 < arrays_later <= arrays
    # A second stream may still have some scalars; one of 4 bytes that is kept in each of 2000 steps would be 8000.
    assert memory_later <= memory + 4000
