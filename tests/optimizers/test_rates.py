"""Learning rates and the other numbers of an optimizer: what is refused, and what a schedule may return."""

from __future__ import annotations

import math
from fractions import Fraction

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base.errors import InputError
from compiled_adam.finetune.metrics import failures
from compiled_adam.optimizers.options import check_schedules
from trees import assert_identical, copied

NAN, INF = math.nan, math.inf
BAD_RATES = [
    *(-1e-3, NAN, INF, -INF, 1e39, True, None, "1e-3", 1j, [1e-3]),
    *(np.float32(-1), np.float64(NAN), np.array(INF), np.array([1e-3]), np.bool_(True)),
    *(mx.array(-1.0), mx.array(NAN), mx.array(INF), mx.array([1e-3]), mx.array(True)),
]


@pytest.mark.parametrize("make", [ca.Adam, ca.AdamW])
@pytest.mark.parametrize("rate", BAD_RATES, ids=repr)
def test_a_learning_rate_that_is_none(make, rate) -> None:
    with pytest.raises(InputError, match="learning_rate is "):
        make(rate)
    optimizer = make(0.5)
    with pytest.raises(InputError, match="learning_rate is "):
        optimizer.learning_rate = rate
    assert optimizer.learning_rate.item() == 0.5


@pytest.mark.parametrize(
    ("rate", "value"),
    [
        *((0, 0.0), (0.0, 0.0), (1, 1.0), (0.25, 0.25), (Fraction(1, 4), 0.25), (3e38, np.float32(3e38))),
        *((np.float32(0.25), 0.25), (np.float64(0.25), 0.25), (np.int64(2), 2.0), (np.array(0.25), 0.25)),
        *((mx.array(0.25), 0.25), (mx.array(2), 2.0), (mx.array(0.25, mx.bfloat16), 0.25)),
    ],
    ids=repr,
)
def test_a_learning_rate_in_any_form(rate, value: float) -> None:
    made, assigned = ca.AdamW(rate), ca.AdamW(0.5)
    assigned.learning_rate = rate
    for optimizer in (made, assigned):
        assert optimizer.learning_rate.item() == value
        assert (optimizer.learning_rate.dtype, optimizer.learning_rate.shape) == (mx.float32, ())


def test_a_quoted_number_is_said_to_be_text_and_a_function_cannot_be_assigned() -> None:
    with pytest.raises(InputError, match=r"'1e-5'.*this is text: write it without quotes"):
        ca.Adam("1e-5")
    with pytest.raises(InputError, match=r"'1e-8'.*without quotes"):
        ca.Adam(1e-3, eps="1e-8")
    with pytest.raises(InputError, match="a function; assign a number, or make a new optimizer"):
        ca.Adam(1e-3).learning_rate = ca.schedulers.constant(1.0)


def test_a_rate_that_is_traced_has_no_value_to_check() -> None:
    optimizer, p = ca.Adam(0.5), {"w": mx.ones(3)}
    optimizer.init(p)

    def update(rate: mx.array, p: dict) -> dict:
        optimizer.learning_rate = rate
        return optimizer.apply_gradients({"w": mx.ones(3)}, p)

    state = [optimizer.state]
    q = mx.compile(update, inputs=state, outputs=state)(mx.array(0.25), p)
    expected = ca.Adam(0.25).apply_gradients({"w": mx.ones(3)}, p)
    # The same graph fused in another place: float32's rounding.
    assert mx.allclose(q["w"], expected["w"], rtol=1e-6, atol=0).item() and optimizer.learning_rate.item() == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (NAN, 0.9)}, r"beta1 of betas is nan"),
        ({"betas": (0.9, 1.0)}, r"beta2 of betas is 1.0; it must be a number of at least 0 and less than 1"),
        ({"betas": (0.9, -0.1)}, r"beta2 of betas is -0.1"),
        ({"betas": ("0.9", 0.9)}, r"beta1 of betas is '0.9'.*this is text"),
        ({"betas": (True, 0.9)}, r"beta1 of betas is True"),
        ({"betas": 0.9}, "betas is 0.9; it must be two numbers"),
        ({"betas": None}, "betas is None; it must be two numbers"),
        ({"betas": "ab"}, "betas is 'ab'; it must be two numbers"),
        ({"betas": {0.9}}, "betas is {0.9}; it must be two numbers"),  # a set has no order
        ({"betas": frozenset((0.9, 0.99))}, "betas is frozenset.*; it must be two numbers"),
        ({"eps": NAN}, r"eps \(epsilon\) is nan; it must be a finite number of at least 0"),
        ({"eps": INF}, r"eps \(epsilon\) is inf"),
        ({"eps": -1e-8}, r"eps \(epsilon\) is -1e-08"),
        ({"eps": None}, r"eps \(epsilon\) is None"),
        ({"weight_decay": NAN}, "weight_decay is nan"),
        ({"weight_decay": INF}, "weight_decay is inf"),
        ({"weight_decay": "0.1"}, "weight_decay is '0.1'.*this is text"),
        ({"weight_decay": True}, "weight_decay is True"),
        ({"max_grad_norm": NAN}, "max_grad_norm is nan"),
        ({"max_grad_norm": INF}, "max_grad_norm is inf"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"bias_correction": "no"}, "bias_correction is 'no'; it must be True or False"),
        ({"learning_rate_multipliers": {"w": NAN}}, r"learning_rate_multipliers\['w'\] is nan"),
    ],
)
def test_numbers_out_of_their_range(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ca.AdamW(1e-3, **options)


# What a schedule returns.


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1e-3])
@pytest.mark.parametrize("packed", [False, True])
def test_the_guard_skips_an_update_whose_scheduled_rate_is_unusable(bad: float, packed: bool) -> None:
    optimizer = ca.AdamW(lambda step: mx.where(step == 2, bad, 0.1), skip_nonfinite=True, moments="bfloat16")
    if packed:
        mx.random.seed(1)
        model = nn.Linear(3, 1)
        step = ca.make_step(model, lambda model, x: mx.square(model(x) - 1).mean(), optimizer)

        def update() -> None:
            step(mx.ones((2, 3)))

        def weights() -> dict:
            return model.parameters()
    else:
        p = {"w": mx.ones(3), "h": mx.ones(5, mx.bfloat16)}

        def update() -> None:
            p.update(optimizer.apply_gradients({"w": mx.ones(3), "h": mx.ones(5, mx.bfloat16)}, p))

        def weights() -> dict:
            return p

    update()
    update()
    changing = ("grad_norm", "skipped", "learning_rate")

    def state() -> dict:
        return copied({name: value for name, value in optimizer.state.items() if name not in changing})

    before, held = copied(weights()), state()
    for skipped in (1, 2):
        update()
        assert optimizer.skipped.item() == skipped and optimizer.step.item() == 2
    assert_identical(weights(), before)
    assert_identical(state(), held)
    assert not math.isfinite(optimizer.learning_rate.item()) or optimizer.learning_rate.item() < 0


def test_a_rate_of_zero_is_no_failure() -> None:
    optimizer = ca.AdamW(lambda step: mx.array(0.0), skip_nonfinite=True)
    p = optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    assert (p["w"].tolist(), optimizer.skipped.item(), optimizer.step.item()) == ([1, 1, 1], 0, 1)


PLAIN = [
    lambda step: 1e-3 * min(1.0, step / 10),
    lambda step: 1e-3 * (1 + math.cos(step)),
    lambda step: 1e-3 if step < 3 else 1e-4,
    lambda step: float(np.interp(step, [0, 10], [0, 1e-3])),
    lambda step: 1e-3 / (1 + int(step)),
    lambda step: [1e-3, 1e-4][step],
    lambda step: 1e-3 * 0.5 ** step.item(),
]


@pytest.mark.parametrize("schedule", PLAIN)
def test_a_schedule_of_plain_python(schedule) -> None:
    message = r"the learning_rate schedule .*<lambda> \(.*test_rates.py:\d+\) needs the value of the step.*mx.where"
    mx.random.seed(1)
    model, p = nn.Linear(3, 1), {"w": mx.ones(3)}
    before = copied(model.parameters())
    optimizer = ca.AdamW(schedule)  # called eagerly it is a schedule like any other
    optimizer.apply_gradients({"w": mx.ones(3)}, p)
    optimizer.apply_gradients({"w": mx.ones(3)}, p)
    assert optimizer.learning_rate.item() == pytest.approx(float(schedule(mx.array(1))), rel=1e-6)  # float32
    with pytest.raises(InputError, match=message):
        ca.make_step(model, lambda model, x: mx.square(model(x) - 1).mean(), ca.AdamW(schedule))(mx.ones((2, 3)))
    assert_identical(model.parameters(), before)
    with pytest.raises(InputError, match=message):
        check_schedules(optim.SGD(schedule)._schedulers)
    check_schedules(ca.AdamW(optim.cosine_decay(1e-3, 10))._schedulers)


def test_errors_of_a_schedule_itself_stay_what_they_are() -> None:
    def wrong(step: mx.array) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        check_schedules({"learning_rate": wrong})
    optimizer = ca.Adam(lambda step: mx.array([1e-3, 1e-4]))
    with pytest.raises(InputError, match=r"returns an array of shape \(2,\), not one number"):
        optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})


def test_steps_with_an_unusable_rate_count_as_failures() -> None:
    entry = {"loss": 1.0, "tokens": 5, "grad_norm": 1.0, "learning_rate": 0.0}
    assert failures(2, entry) == 0
    for bad in (NAN, INF, -1e-3):
        assert failures(2, entry | {"learning_rate": bad}) == 3
        assert failures(2, entry | {"learning_rate": bad, "grad_norm": None}) == 2  # of the update before
    assert failures(2, entry | {"learning_rate": None}) == 0


def test_a_number_in_the_state_is_in_what_is_saved_right_after(tmp_path) -> None:
    # Not only once the next call has made an array of it.
    model = nn.Linear(2, 1)
    step = ca.make_step(model, lambda model, x: mx.square(model(x)).mean(), ca.Adam(1e-2))
    step(mx.ones((1, 2)))
    step.optimizer.state["learning_rate"] = 0.25
    assert step.description()["learning_rate"] == 0.25
    step.optimizer.state["learning_rate"] = 0.5
    assert step.state_dict()["optimizer"]["learning_rate"].item() == 0.5
    step.optimizer.state["learning_rate"] = 0.125
    ca.save_checkpoint(tmp_path / "checkpoint", step)
    again = ca.make_step(nn.Linear(2, 1), step.loss_fn, ca.Adam(0.125))
    ca.load_checkpoint(tmp_path / "checkpoint", again)
    assert again.optimizer.learning_rate.item() == 0.125
