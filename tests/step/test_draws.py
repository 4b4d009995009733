"""Random numbers of Python and NumPy in loss_fn are refused, because a trace would repeat them."""

from __future__ import annotations

import cProfile
import random
import sys
import threading
from collections.abc import Callable, Iterator
from random import gauss

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base import InputError
from compiled_adam.step.draws import without_draws
from numpy.random import rand

from tests.nets import assert_same, linear_net
from tests.small_steps import loss_fn

GENERATOR, LOCAL = np.random.default_rng(0), random.Random(0)
OTHER = np.random.RandomState(np.random.PCG64(0))  # whose state is not NumPy's tuple of old
SYSTEM = random.SystemRandom()  # which has no state
DRAWS: list[tuple[str, Callable[[], float]]] = [
    ("Python's random", random.random),
    ("Python's random", lambda: random.randint(1, 5)),
    ("Python's random", lambda: gauss(0, 1)),
    ("numpy.random", lambda: np.random.rand()),
    ("numpy.random", lambda: np.random.permutation(3)[0].item()),
    ("numpy.random", lambda: rand()),
    (r"numpy.random.default_rng\(\)", lambda: np.random.default_rng().normal()),
    ("its Generator", lambda: GENERATOR.normal()),
    ("its Random", lambda: LOCAL.random()),
    ("its RandomState", lambda: OTHER.rand()),
]
ORIGINAL = np.random.normal


def step_with(draw: Callable[[], float]) -> ca.TrainStep:
    def drawing(model: nn.Module, x: mx.array) -> mx.array:
        return loss_fn(model, x) * draw()

    return ca.make_step(linear_net(), drawing, optim.SGD(1e-2))


def hidden() -> float:
    """C calls ``random.random``, which no profile function is told."""
    return next(iter(random.random, None))


def elsewhere() -> float:
    threads = [threading.Thread(target=draw) for _, draw in DRAWS[:5]]
    for thread in threads:
        thread.start()
        thread.join()
    return 1.0


@pytest.fixture
def other_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


def refused(draw: Callable[[], float], name: str) -> None:
    step = step_with(draw)
    with pytest.raises(InputError, match=f"draws random numbers from {name}, .*mx.random"):
        step(mx.ones((3, 4)))
    assert_same(step.model, linear_net(), 0.0)
    assert np.random.normal is ORIGINAL


@pytest.mark.usefixtures("other_thread")
@pytest.mark.parametrize(("name", "draw"), DRAWS)
def test_draws_of_this_thread_are_refused_whatever_others_do(name: str, draw: Callable[[], float]) -> None:
    refused(draw, name)
    assert sys.getprofile() is None


@pytest.mark.usefixtures("other_thread")
@pytest.mark.parametrize("draw", [elsewhere, hidden])
def test_a_draw_that_may_be_anothers_is_a_warning(draw: Callable[[], float]) -> None:
    step = step_with(draw)
    with pytest.warns(UserWarning, match="unless another thread has drawn just now, loss_fn draws random numbers"):
        assert step(mx.ones((3, 4))).updated


def test_a_draw_that_can_only_be_of_this_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # a process of pytest-xdist has threads
    refused(hidden, "Python's random")
    refused(lambda: np.random.ranf(), "numpy.random")


def test_a_profiler_sees_the_trace_undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    profiler = cProfile.Profile()
    with profiler:
        refused(random.random, "Python's random")
        refused(lambda: np.random.rand(), "numpy.random")
        assert sys.version_info >= (3, 12) or sys.getprofile() is profiler
    assert any("drawing" in str(entry.code) for entry in profiler.getstats())


def test_what_is_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading states, a generator that the first call makes, NumPy imported by it, one without a state."""
    made: dict[str, np.random.Generator] = {}
    numpy = sys.modules["numpy.random"]
    monkeypatch.delitem(sys.modules, "numpy.random")

    def nothing() -> float:
        made.setdefault("generator", np.random.default_rng(0))
        sys.modules["numpy.random"] = numpy
        return float(all([random.getstate(), np.random.get_state(), SYSTEM]))

    assert step_with(nothing)(mx.ones((3, 4))).updated
    assert step_with(nothing)(mx.ones((3, 4))).updated  # now with NumPy and the generator from the beginning


def test_two_threads_trace_at_the_same_time() -> None:
    """The second one begins later, ends later, and draws when the first one has ended."""
    begun, may_end = threading.Event(), threading.Event()
    errors: list[InputError] = []

    def drawing() -> None:
        begun.set()
        may_end.wait()
        np.random.rand()

    def second() -> None:
        try:
            without_draws(drawing, None)
        except InputError as error:
            errors.append(error)

    thread = threading.Thread(target=second)

    def first() -> None:
        thread.start()
        begun.wait()

    without_draws(first, None)
    assert np.random.uniform(low=5.0, high=6.0) >= 5.0  # this thread's, while the other one is watched
    may_end.set()
    thread.join()
    assert len(errors) == 1 and np.random.normal is ORIGINAL


def test_a_generator_with_a_seed_that_loss_fn_makes_repeats_itself_anyway() -> None:
    assert step_with(lambda: np.random.default_rng(0).random())(mx.ones((3, 4))).updated
