"""Objects say in one line what they are."""

from __future__ import annotations

import copy
import pickle

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from compiled_adam import schedulers


def test_an_optimizer_shows_what_differs_from_the_defaults_and_its_step() -> None:
    assert repr(ca.Adam(1e-3)) == "Adam(learning_rate=0.001; step=0)"
    groups = {"bias": {"learning_rate": 0.1}}
    assert repr(ca.Adam(1e-3, groups=groups)) == f"Adam(learning_rate=0.001, groups={groups}; step=0)"
    optimizer = ca.AdamW(1e-3, (0.9, 0.95), weight_decay=0.1, decay_filter=ca.decay_matrices, skip_nonfinite=True)
    expected = (
        "AdamW(learning_rate={}, betas=(0.9, 0.95), weight_decay=0.1, decay_filter=decay_matrices, skip_nonfinite=True;"
        " step={}, skipped={})"
    )
    optimizer.init({"a": mx.ones(2)})
    assert repr(optimizer) == expected.format(0.001, 0, 0)
    for gradient in (1.0, float("nan"), 2.0):
        optimizer.apply_gradients({"a": mx.full(2, gradient)}, {"a": mx.ones(2)})
    optimizer.learning_rate = 0.5
    assert repr(optimizer) == expected.format(0.5, 2, 1)


def test_a_subclass_shows_its_name_and_what_differs_from_its_own_defaults() -> None:
    class Mine(ca.AdamW):
        def __init__(self, learning_rate: float, eps: float = 1e-6) -> None:
            super().__init__(learning_rate, eps=eps)

    assert repr(Mine(0.1)) == "Mine(learning_rate=0.1; step=0)"
    assert repr(Mine(0.1, eps=1e-4)) == "Mine(learning_rate=0.1, eps=0.0001; step=0)"


def test_in_a_trace_the_step_is_not_known() -> None:
    optimizer, said = ca.Adam(0.1), []
    optimizer.init({"a": mx.ones(2)})

    def update(gradient: mx.array) -> mx.array:
        new = optimizer.apply_gradients({"a": gradient}, {"a": mx.ones(2)})["a"]
        said.append(repr(optimizer))
        return new

    mx.compile(update, inputs=optimizer.state, outputs=optimizer.state)(mx.ones(2))
    assert said == ["Adam(learning_rate=?; step=?)"]
    assert repr(optimizer) == "Adam(learning_rate=0.1; step=1)"


def test_a_step_and_its_result() -> None:
    model = nn.Linear(4, 2)
    optimizer = optim.MultiOptimizer([optim.SGD(0.5), ca.Adam(0.1)], [lambda path, _: path == "bias"])
    step = ca.make_step(model, lambda model, x: (mx.square(model(x) - 1).mean(), model(x)), optimizer, accumulate=2)
    first, second = step(mx.ones((3, 4))), step(mx.ones((3, 4)))
    loss = f"{first.loss.item():.6g}"
    assert repr(first) == (
        f"StepResult(loss={loss}, aux=(float32[3, 2],), grad_norm=None, learning_rate=0.5, updated=False, skipped=0)"
    )
    assert f"grad_norm={second.grad_norm.item():.6g}, learning_rate=0.5, updated=True" in repr(second)
    assert repr(step) == (
        "TrainStep(Linear of 10 trainable parameters, MultiOptimizer(SGD(learning_rate=0.5), Adam(learning_rate=0.1;"
        " step=1)), accumulate=2, traces={'grad': 1, 'accumulate': 1, 'update': 1, 'evicted': 0})"
    )


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (schedulers.cosine(1e-3, 200, warmup=20), "cosine(0.001, 200, warmup=20)"),
        (schedulers.linear(1.0, 10), "linear(1, 10)"),
        (schedulers.join([schedulers.constant(0.5), abs], [100]), "join([constant(0.5), abs], [100])"),
        (
            schedulers.from_config({"name": "cosine_decay", "arguments": [0.1, 9]}),
            "from_config({'name': 'cosine_decay', 'arguments': [0.1, 9]})",
        ),
    ],
    ids=["cosine", "linear", "join", "mlx"],
)
def test_a_schedule_shows_the_call_that_made_it(schedule: schedulers.Schedule, text: str) -> None:
    assert repr(schedule) == text
    assert repr(ca.Adam(schedule)) == f"Adam(learning_rate={text}; step=0)"
    assert repr(copy.deepcopy(schedule)) == text


def test_messages_name_the_schedule() -> None:
    with pytest.raises(ValueError, match=r"schedule join\(\[constant\(1\), <lambda>\], \[3\]\) needs the value"):
        ca.make_step(
            nn.Linear(1, 1),
            lambda model, x: model(x).mean(),
            ca.Adam(schedulers.join([schedulers.constant(1.0), lambda step: float(step)], [3])),
        )


def test_a_copy_of_an_optimizer_shows_the_same() -> None:
    optimizer = ca.AdamW(0.1, max_grad_norm=1.0)
    assert repr(pickle.loads(pickle.dumps(optimizer))) == repr(optimizer)
