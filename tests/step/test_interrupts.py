"""Ctrl-C at any bytecode leaves the state before a call, or the state after it."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from interrupts import bytecodes, interrupted
from mlx.utils import tree_flatten
from nets import Counting


def loss_fn(model: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    return mx.square(model(x)).sum().astype(mx.float32), mx.array(float(x.shape[0]))


def batch(rows: int = 3) -> mx.array:
    return mx.random.normal((rows, 4), key=mx.random.key(rows))


def contents(step: ca.TrainStep) -> dict[str, np.ndarray]:
    """Everything that a call changes, by name."""
    state = step.state_dict()
    arrays = {f"{part}.{path}": array for part, its in state.items() for path, array in its.items()}
    arrays |= {f"all.{path}": array for path, array in tree_flatten(step.model.parameters())}
    return {path: np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for path, a in arrays.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def make(kind: str, accumulate: int = 1) -> ca.TrainStep:
    optimizers: dict[str, Callable[[], Any]] = {
        "ours": lambda: ca.AdamW(1e-2, max_grad_norm=1.0, skip_nonfinite=True),
        "8bit": lambda: ca.Adam(1e-2, moments="8bit"),
        "stock": lambda: optim.AdamW(1e-2),
        "multi": lambda: optim.MultiOptimizer([ca.Adam(1e-2), optim.SGD(1e-2)], [lambda path, p: p.ndim > 1]),
    }
    mx.random.seed(0)
    model = Counting(mx.bfloat16 if kind == "ours" else mx.float32)
    return ca.make_step(model, loss_fn, optimizers[kind](), accumulate=accumulate, weighted=True)


def check(kind: str, accumulate: int, at: Callable[[int], list[int]], call: Callable[[ca.TrainStep, int], Any]) -> None:
    """Interrupts calls at many bytecodes, and compares a twin that is never interrupted."""
    step, twin = make(kind, accumulate), make(kind, accumulate)
    # MLX's random state is one for all: each of the two gets its own back before a call.
    keys = {id(each): mx.random.key(1).tolist() for each in (step, twin)}

    def called(each: ca.TrainStep, rows: int, position: int | None) -> bool:
        high, low = keys[id(each)]
        mx.random.seed(high << 32 | low)
        out = False
        if position is None:
            call(each, rows)
        else:
            out = interrupted(lambda: call(each, rows), position)
        keys[id(each)] = mx.random.state[0].tolist()
        return out

    def state(each: ca.TrainStep) -> dict[str, np.ndarray]:
        return contents(each) | {"random.key": np.array(keys[id(each)])}

    for each in (step, twin):
        called(each, 3, None)
    state(twin)  # as before each of the calls below: it shows the moments, which makes a call longer
    total = bytecodes(lambda: called(twin, 3, None))
    called(step, 3, None)
    outcomes = []
    for i, position in enumerate(at(total)):
        before = state(twin)
        out = called(step, 3 + i, position)
        made = not same(state(step), before)
        if made or not out:
            called(twin, 3 + i, None)
            found, expected = state(step), state(twin)
            assert same(found, expected), [path for path in expected if not np.array_equal(found[path], expected[path])]
        else:
            for each in (step, twin):  # the call after one that was not made may bind anew, which takes longer
                called(each, 3, None)
        outcomes.append((out, made))
    assert (True, False) in outcomes, "no call was interrupted before it was made"
    assert (True, True) in outcomes, "no call was interrupted after it was made"


@pytest.mark.parametrize(("kind", "accumulate"), [("ours", 1), ("ours", 2), ("8bit", 1), ("stock", 2), ("multi", 1)])
def test_a_step_is_made_or_not_made(kind: str, accumulate: int) -> None:
    def spread(total: int) -> list[int]:
        chosen = random.Random(0)
        # The last hundred, where it assigns, one by one; the others at random.
        return [chosen.randrange(1, total) for _ in range(100)] + list(range(total - 100, total, 2))

    check(kind, accumulate, spread, lambda step, rows: step(batch(3)))


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_step_that_traces_is_made_or_not_made(kind: str) -> None:
    chosen = random.Random(1)
    check(
        kind,
        1,
        lambda total: [chosen.randrange(1, 4 * total) for _ in range(60)] + list(range(total - 20, total)),
        lambda step, rows: step(batch(rows)),
    )


def test_an_eager_update_is_made_or_not_made() -> None:
    def fresh() -> tuple[nn.Module, ca.Adam, dict]:
        mx.random.seed(0)
        model, adam = nn.Linear(4, 4), ca.Adam(1e-2, max_grad_norm=1.0)
        return model, adam, nn.value_and_grad(model, lambda m, x: mx.square(m(x)).sum())(model, batch())[1]

    def contents(model: nn.Module, adam: ca.Adam) -> dict[str, np.ndarray]:
        arrays = tree_flatten({"model": model.parameters(), "state": adam.state})
        return {path: np.array(array) for path, array in arrays}

    model, adam, gradients = fresh()
    adam.init(model.trainable_parameters())
    states = [contents(model, adam)]
    adam.update(model, gradients)
    states.append(contents(model, adam))
    total, compiled = bytecodes(lambda: adam.update(model, gradients)), adam._leaves._compiled
    outcomes = set()
    for position in range(1, total + 1):
        model, adam, gradients = fresh()
        adam.init(model.trainable_parameters())
        adam._leaves._compiled = compiled  # not traced again for each
        interrupted(lambda: adam.update(model, gradients), position)  # noqa: B023
        found = [same(contents(model, adam), state) for state in states]
        assert any(found), position
        outcomes.add(found.index(True))
    assert outcomes == {0, 1}


def test_an_interrupt_after_an_error_does_not_lose_the_model() -> None:
    def failing(model: nn.Module, x: mx.array) -> mx.array:
        model(x)
        raise RuntimeError("bad batch")

    mx.random.seed(0)
    model = Counting(mx.float32)
    step = ca.make_step(model, failing, ca.Adam(1e-2))
    before = contents(step)

    def call() -> None:
        with pytest.raises(RuntimeError):
            step(batch())

    total = bytecodes(call)
    for position in range(total - 400, total):
        try:
            interrupted(call, position)
        except BaseException as error:  # what pytest.raises makes of an interrupt
            assert "KeyboardInterrupt" in repr(error) or "RuntimeError" in repr(error)
        assert same(contents(step), before), position


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer of the operating system")
def test_thousands_of_real_interrupts() -> None:
    """A timer interrupts steps with old and new shapes, windows, buffers and dropout; everything always agrees."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    step, chosen, interrupts = make("ours", accumulate=3), random.Random(2), 0
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        calls = 0
        while interrupts < 2000:
            calls += 1
            assert calls < 40000
            # As many calls as the model has counted were made: its buffer, the window and the step must agree.
            count, filled, made = (
                int(step.model.count.item()),
                step._state.filled,
                int(step.optimizer.state["step"].item()),
            )
            assert count == 3 * made + filled, (count, made, filled)
            try:
                signal.setitimer(signal.ITIMER_REAL, chosen.uniform(1e-5, 4e-3))
                step(batch(1 + calls % 7 if calls % 3 else 3))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
            if calls % 97 == 0:
                step.state_dict()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    mx.eval(step.model.parameters(), step.optimizer.state)
    assert all(mx.isfinite(array.astype(mx.float32)).all().item() for _, array in tree_flatten(step.model.parameters()))
