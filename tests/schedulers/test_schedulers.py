from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam import schedulers
from hypothesis import given, settings
from hypothesis import strategies as st

WARMUP, STEPS = 7, 50


def _cos(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


# Each schedule with peak 1e-3, warmup 7 from 1e-5, horizon 50, end 1e-4: what it must be t steps after the warmup.
DECAYS = {
    "constant": (lambda **w: schedulers.constant(1e-3, **w), lambda t: 1e-3),
    "linear": (lambda **w: schedulers.linear(1e-3, STEPS, 1e-4, **w), lambda t: 1e-3 - 9e-4 * min(t / 43, 1)),
    "cosine": (lambda **w: schedulers.cosine(1e-3, STEPS, 1e-4, **w), lambda t: 1e-4 + 9e-4 * _cos(min(t / 43, 1))),
    "polynomial": (
        lambda **w: schedulers.polynomial(1e-3, STEPS, 1e-4, 3.0, **w),
        lambda t: 1e-4 + 9e-4 * (1 - min(t / 43, 1)) ** 3,
    ),
    "warmup_stable_decay": (
        lambda **w: schedulers.warmup_stable_decay(1e-3, STEPS, 1e-4, decay=13, **w),
        lambda t: 1e-3 - 9e-4 * min(max((t - 30) / 13, 0), 1),
    ),
    "inverse_sqrt": (lambda **w: schedulers.inverse_sqrt(1e-3, **w), lambda t: 1e-3 * math.sqrt(7 / (7 + t))),
    "exponential": (lambda **w: schedulers.exponential(1e-3, 0.9, 1e-4, **w), lambda t: max(1e-3 * 0.9**t, 1e-4)),
    "step_decay": (
        lambda **w: schedulers.step_decay(1e-3, 0.5, 10, 1e-4, **w),
        lambda t: max(1e-3 * 0.5 ** (t // 10), 1e-4),
    ),
}


@pytest.mark.parametrize("name", DECAYS)
def test_every_step_against_the_formula(name: str) -> None:
    make, decay = DECAYS[name]
    schedule = make(warmup=WARMUP, warmup_init=1e-5)
    compiled = mx.compile(schedule)
    for step in range(STEPS + 20):
        expected = 1e-5 + (1e-3 - 1e-5) * step / WARMUP if step < WARMUP else decay(step - WARMUP)
        for dtype in (mx.uint64, mx.int32, mx.float32):
            value = schedule(mx.array(step, dtype))
            assert value.dtype == mx.float32 and value.shape == ()
            # The exponent of a power of 50 and a cosine of pi: a few float32 roundings, 6e-8 each.
            assert value.item() == pytest.approx(expected, rel=2e-6), step
        assert compiled(mx.array(step, mx.uint64)).item() == pytest.approx(expected, rel=2e-6)
        assert schedule(step).item() == value.item()


@pytest.mark.parametrize("name", DECAYS)
def test_boundaries_are_exact(name: str) -> None:
    make, _ = DECAYS[name]
    schedule = make(warmup=WARMUP, warmup_init=1e-5)
    assert schedule(0).item() == np.float32(1e-5)
    assert schedule(WARMUP).item() == np.float32(1e-3)
    assert schedule(WARMUP - 1).item() < schedule(WARMUP).item()
    if name in ("linear", "cosine", "polynomial", "warmup_stable_decay"):
        assert schedule(STEPS - 1).item() > np.float32(1e-4)
        assert schedule(STEPS).item() == schedule(10 * STEPS).item() == np.float32(1e-4)
    if name != "inverse_sqrt":  # whose time scale is the warmup
        assert make()(0).item() == np.float32(1e-3)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "polynomial", "one_cycle"]),
    st.floats(1e-7, 10.0),
    st.floats(0.0, 1.0),
    st.integers(2, 100_000),
    st.floats(0.0, 0.99),
)
def test_peak_and_end_are_exact_for_any_numbers(name: str, peak: float, end: float, steps: int, part: float) -> None:
    warmup = int(part * steps)
    schedule = getattr(schedulers, name)(peak, steps, end * peak, warmup=warmup)
    assert schedule(warmup).item() == np.float32(peak)
    assert schedule(steps).item() == schedule(steps + 1).item() == np.float32(end * peak)
    middle = schedule((warmup + steps) // 2).item()
    assert end * peak * (1 - 1e-6) <= middle <= peak * (1 + 1e-6)  # the two products and their sum are rounded


def test_one_cycle_rises_and_falls_along_cosines() -> None:
    schedule = schedulers.one_cycle(1.0, 100)
    for step in range(110):
        up, down = 0.04 + 0.96 * (1 - _cos(step / 30)), 4e-6 + (1 - 4e-6) * _cos(min((step - 30) / 70, 1))
        assert schedule(step).item() == pytest.approx(up if step < 30 else down, abs=3e-7)  # a few roundings near 1


def test_join_starts_each_schedule_at_its_own_zero() -> None:
    schedule = schedulers.join([schedulers.linear(1.0, 10), schedulers.constant(3.0), lambda s: s * 10.0], [10, 15])
    values = [schedule(mx.array(step, mx.uint64)).item() for step in range(18)]
    assert values == pytest.approx([1 - step / 10 for step in range(10)] + [3.0] * 5 + [0.0, 10.0, 20.0], abs=1e-6)


@pytest.mark.parametrize("make", [lambda s: optim.SGD(s), lambda s: optim.Lion(s)])
def test_any_mlx_optimizer_takes_them_traced(make) -> None:
    optimizer = make(schedulers.cosine(1.0, 10, warmup=2))
    p = {"w": mx.zeros((2,))}
    optimizer.init(p)
    update = mx.compile(lambda g: optimizer.apply_gradients(g, p), inputs=optimizer.state, outputs=optimizer.state)
    rates = []
    for _ in range(4):
        update({"w": mx.ones((2,))})
        rates.append(optimizer.learning_rate.item())
    assert rates == pytest.approx([0.0, 0.5, 1.0, _cos(1 / 8)], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine_decay", [1e-3, 40]),
        ("cosine_decay", [1e-3, 40, 1e-5]),
        ("linear_schedule", [1e-3, 1e-5, 40]),
        ("exponential_decay", [1e-3, 0.9]),
        ("step_decay", [1e-3, 0.9, 7]),
    ],
)
def test_from_config_is_mlx_after_the_warmup(name: str, arguments: list) -> None:
    config = {"name": name, "arguments": arguments}
    plain, stock = schedulers.from_config(config), getattr(optim, name)(*arguments)
    warm = schedulers.from_config({**config, "warmup": 10, "warmup_init": 1e-4})
    for step in range(60):
        assert plain(mx.array(step)).item() == pytest.approx(stock(mx.array(step)).item(), rel=2e-6)
        # mlx-lm repeats the peak at step 11 and is one step late from there on.
        expected = 1e-4 + 9e-4 * step / 10 if step < 10 else stock(mx.array(step - 10)).item()
        assert warm(mx.array(step)).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "after_warmup"),
    [
        ("constant", [1.0], 1.0),
        ("linear", [1.0, 30, 0.1], 0.55),
        ("cosine", [1.0, 30, 0.1], 0.55),
        ("polynomial", [1.0, 30, 0.0, 3.0], 0.125),
        ("warmup_stable_decay", [1.0, 30, 0.0, 20], 0.5),
        ("inverse_sqrt", [1.0, 30], math.sqrt(0.75)),
        ("exponential", [1.0, 0.9], 0.9**10),
        ("one_cycle", [1.0, 30, 0.1], 0.55),
    ],
)
def test_from_config_knows_ours(name: str, arguments: list, after_warmup: float) -> None:
    schedule = schedulers.from_config({"name": name, "arguments": arguments, "warmup": 10, "warmup_init": 0.0})
    assert [schedule(step).item() for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule(20).item() == pytest.approx(after_warmup, rel=1e-6)  # a few float32 roundings


def test_numpy_numbers_are_numbers() -> None:
    assert schedulers.linear(np.float32(1.0), np.int64(10))(np.int64(5)).item() == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedulers.constant(-1.0), "value is -1.0"),
        (lambda: schedulers.constant(math.nan), "value is nan"),
        (lambda: schedulers.cosine(math.inf, 10), "peak is inf"),
        (lambda: schedulers.cosine("1e-3", 10), "peak is '1e-3'"),
        (lambda: schedulers.cosine(1.0, 0), "steps is 0"),
        (lambda: schedulers.cosine(1.0, 10.0), "steps is 10.0"),
        (lambda: schedulers.cosine(1.0, 10, -0.1), "end is -0.1"),
        (lambda: schedulers.linear(1.0, 10, warmup=-1), "warmup is -1"),
        (lambda: schedulers.linear(1.0, 10, warmup=10), "warmup is 10; it must be less than steps = 10"),
        (lambda: schedulers.linear(1.0, 10, warmup=2, warmup_init=-1.0), "warmup_init is -1.0"),
        (lambda: schedulers.polynomial(1.0, 10, power=0.0), "power is 0.0"),
        (lambda: schedulers.warmup_stable_decay(1.0, 10, decay=9, warmup=2), "decay is 9"),
        (lambda: schedulers.inverse_sqrt(1.0), "timescale is None"),
        (lambda: schedulers.inverse_sqrt(1.0, 0), "timescale is 0"),
        (lambda: schedulers.exponential(1.0, 1.5), "decay_rate is 1.5"),
        (lambda: schedulers.step_decay(1.0, 0.5, 0), "step_size is 0"),
        (lambda: schedulers.one_cycle(1.0, True), "steps is True"),
        (lambda: schedulers.join([], []), "schedules is"),
        (lambda: schedulers.join([1.0], []), "schedules is"),
        (lambda: schedulers.join([schedulers.constant(1.0)], [3]), "boundaries is"),
        (lambda: schedulers.join([schedulers.constant(1.0)] * 3, [5, 5]), r"boundaries\[1\] is 5"),
        (lambda: schedulers.from_config([]), "lr_schedule is"),
        (lambda: schedulers.from_config({"name": "sine", "arguments": [1.0]}), "name is 'sine'"),
        (lambda: schedulers.from_config({"name": ["cosine"], "arguments": [1.0]}), r"name is \['cosine'\]"),
        (lambda: schedulers.from_config({"name": "cosine", "arguments": 1.0}), "arguments is 1.0; it must be a list"),
        (lambda: schedulers.from_config({"name": "cosine", "arguments": "1"}), "arguments is '1'; it must be a list"),
        (lambda: schedulers.from_config({"name": "cosine", "arguments": []}), r"arguments is \[\]; it must be a list"),
        (lambda: schedulers.from_config({"name": "cosine", "arguments": [1.0]}), "does not fit cosine"),
        (lambda: schedulers.from_config({"name": "cosine_decay", "arguments": [-1.0, 5]}), r"arguments\[0\] is -1"),
        (lambda: schedulers.from_config({"name": "cosine", "args": [1.0]}), "key 'args'"),
    ],
)
def test_bad_arguments_are_named_with_their_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_values_that_are_no_learning_rate() -> None:
    schedulers.check_values(schedulers.constant(1e-3), 1)
    schedulers.check_values(schedulers.cosine(1e-3, 100), 10**12)
    with pytest.raises(ValueError, match="the learning rate inf at update 12348 of 50000; change"):
        schedulers.check_values(lambda step: mx.where(step >= 12340, math.inf, 1.0), 50_000)
    with pytest.raises(ValueError, match="the learning rate -1 at update 99 of 100"):
        schedulers.check_values(lambda step: mx.where(step == 99, -1.0, 1.0), 100)
