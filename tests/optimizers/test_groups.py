"""Groups: parameters with a learning-rate factor, betas, eps and weight decay of their own, by pattern."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from compiled_adam.base import InputError, differences
from compiled_adam.optimizers import any_optimizer
from compiled_adam.update import residual
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from reference import Reference
from trees import assert_identical, flat

from tests.nets import linear_net, squared_error
from tests.saved_steps import advance

BETAS, EPS, DECAY, RATE = (0.9, 0.99), 1e-6, 0.1, 1e-2
GROUPS: dict[str, dict[str, Any]] = {  # each key alone, and all of them
    "rate": {"learning_rate": 3.0},
    "betas": {"betas": (0.6, 0.8)},
    "eps": {"eps": 0.5},
    "decay": {"weight_decay": 2.0},
    "all": {"learning_rate": 0.5, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 1.0},
}


def drawn(seed: int, like: dict[str, mx.array]) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(like))
    return {name: mx.random.normal(a.shape, a.dtype, key=k) for (name, a), k in zip(like.items(), keys, strict=True)}


def reference(path: str, value: Any, own: dict[str, Any], **options: Any) -> Reference:
    factor = own.get("learning_rate", 1.0)
    rate = options.pop("learning_rate", RATE)
    numbers = {"betas": BETAS, "eps": EPS, "weight_decay": DECAY} | options
    numbers |= {key: number for key, number in own.items() if key != "learning_rate"}
    scaled = (lambda step: factor * rate(step)) if callable(rate) else factor * rate
    return Reference({path: np.array(value.astype(mx.float32), np.float64)}, scaled, **numbers)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_each_number_of_a_group_is_that_of_its_reference(dtype: mx.Dtype, bias_correction: bool) -> None:
    schedule = ca.schedulers.linear(RATE, 40, warmup=5)
    p = drawn(0, {name: mx.zeros((3, 4), dtype) for name in (*GROUPS, "none")})
    optimizer = ca.AdamW(schedule, BETAS, EPS, DECAY, bias_correction, groups=GROUPS)
    rates = [schedule(mx.array(i)).item() for i in range(40)]
    references = {
        name: reference(
            name, p[name], GROUPS.get(name, {}), learning_rate=rates.__getitem__, bias_correction=bias_correction
        )
        for name in p
    }
    for i in range(40):
        g = drawn(i + 1, p)
        p = optimizer.apply_gradients(g, p)
        for name, each in references.items():
            each.update({name: np.array(g[name].astype(mx.float32), np.float64)})
    for name, each in references.items():
        found = p[name] if dtype == mx.float32 else residual.join(p[name], optimizer.state[name]["residual"])
        # 40 roundings to float32 of weights below 4: each at most 2^-23, half of them in either direction.
        np.testing.assert_allclose(np.array(found), each.parameters[name], rtol=0, atol=2e-6, err_msg=name)
    assert optimizer.traces == 1


def test_numbers_that_are_changed_later_are_for_parameters_without_their_own() -> None:
    p = drawn(0, {name: mx.zeros((3, 4)) for name in (*GROUPS, "none")})
    optimizer = ca.AdamW(RATE, BETAS, EPS, DECAY, groups=GROUPS)
    references = {name: reference(name, p[name], GROUPS.get(name, {})) for name in p}
    for i in range(6):
        if i == 3:
            optimizer.betas, optimizer.eps, optimizer.weight_decay = [0.5, 0.7], 0.1, 0.5
            for name, each in references.items():
                own = GROUPS.get(name, {})
                each._betas, each._eps = own.get("betas", (0.5, 0.7)), own.get("eps", 0.1)
                each._weight_decay = own.get("weight_decay", 0.5)
        g = drawn(i + 1, p)
        p = optimizer.apply_gradients(g, p)
        for name, each in references.items():
            each.update({name: np.array(g[name], np.float64)})
    for name, each in references.items():
        np.testing.assert_allclose(np.array(p[name]), each.parameters[name], rtol=0, atol=1e-6, err_msg=name)


# Random settings.


PATHS = ("a.x", "a.y", "b.x", "b.y")
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(0, 10),
        "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        "eps": st.floats(1e-6, 1),
        "weight_decay": st.floats(0, 5),
    },
).filter(bool)
# A pattern of one parameter or of several, so that none matches a parameter of another.
PATTERNS = st.sampled_from([("a", "b"), (r"x$", r"y$"), ("a.x", "a.y", "b"), ("a", "^b.x"), ("[ab]",), ()])
COMMON = st.fixed_dictionaries({"betas": st.tuples(*[st.floats(0, 0.999)] * 2), "eps": st.floats(1e-6, 1)})


@pytest.mark.slow
@given(st.data(), PATTERNS, COMMON, st.booleans(), st.sets(st.sampled_from(PATHS)), st.floats(0, 1))
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("uncompiled")  # each set of numbers is a kernel of its own, a second of g++
def test_random_groups(
    data: st.DataObject, patterns: tuple, common: dict, correct: bool, still: set[str], decay: float
) -> None:
    groups = {pattern: data.draw(SETTINGS) for pattern in patterns if data.draw(st.booleans())}
    own = {path: dict(next((its for x, its in groups.items() if re.search(x, path)), {})) for path in PATHS}
    factors = {f"^{p}$": data.draw(st.floats(0, 10)) for p in PATHS if "learning_rate" not in own[p]}
    for path, its in own.items():
        its.setdefault("learning_rate", factors.get(f"^{path}$", 1.0))
        its.setdefault("weight_decay", 0.0 if path in still else decay)
    optimizer = ca.AdamW(
        RATE,
        weight_decay=decay,
        bias_correction=correct,
        decay_filter=lambda path, _: path not in still,
        learning_rate_multipliers=factors,
        groups=groups,
        **common,
    )
    p = {a: {b: mx.array([1.0, -0.5]) for b in "xy"} for a in "ab"}
    references = {
        path: reference(path, mx.array([1.0, -0.5]), its, bias_correction=correct, **common)
        for path, its in own.items()
    }
    for i in range(3):
        g = np.array([0.3 * (i + 1), -1.0 / (i + 1)])
        p = optimizer.apply_gradients(tree_map(lambda _: mx.array(g, mx.float32), p), p)  # noqa: B023
        for path, each in references.items():
            each.update({path: g})
    for path, found in flat(p).items():
        # Three updates of up to 0.1 and decays of 5 %, each with some roundings of 2^-24 to float32.
        np.testing.assert_allclose(found, references[path].parameters[path], rtol=3e-6, atol=1e-6, err_msg=path)


# The same everywhere.

# As in trainers of small language models: vectors without decay, a slow first layer with other betas.
OF_NET = {"bias$": {"weight_decay": 0.0}, "0.weight": {"learning_rate": 0.2, "betas": (0.8, 0.95), "eps": 1e-3}}


def of_net(**options: Any) -> ca.AdamW:
    return ca.AdamW(ca.schedulers.linear(0.05, 20, warmup=3), weight_decay=0.5, max_grad_norm=1.0, **options)


def trained(optimizer: optim.Optimizer, how: str) -> nn.Module:
    """A net after four updates: by calls, inside a compiled function of the user, or by a train step."""
    model = linear_net()
    step = ca.make_step(model, squared_error, optimizer) if how == "make_step" else None
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def update(x: mx.array, y: mx.array) -> None:
        optimizer.update(model, nn.value_and_grad(model, squared_error)(model, x, y)[1])

    if how == "compile":
        update = mx.compile(update, inputs=state, outputs=state)
    for i in range(4):
        x = mx.random.normal((8, 4), key=mx.random.key(i))
        (step or update)(x, x.sum(axis=1, keepdims=True))
        mx.eval(state)
    return model


@pytest.mark.parametrize("how", ["compile", "make_step"])
def test_groups_are_the_same_in_calls_and_in_compiled_functions(how: str) -> None:
    expected, without = flat(trained(of_net(groups=OF_NET), "calls").parameters()), flat(trained(of_net(), "calls"))
    for path, array in flat(trained(of_net(groups=OF_NET), how).parameters()).items():
        # Gradients are fused in another way: a last bit, which Adam divides by the gradient's own size.
        np.testing.assert_allclose(array, expected[path], rtol=2e-5, atol=1e-6, err_msg=path)
        assert np.abs(array - without[path]).max() > 1e-4, path


def test_the_older_options_are_ways_to_write_groups() -> None:
    old = of_net(decay_filter=lambda path, _: "bias" not in path, learning_rate_multipliers={"0.weight": 0.2})
    new = of_net(groups={"bias": {"weight_decay": 0}, "0.weight": {"learning_rate": 0.2}})
    assert_identical(trained(old, "make_step").parameters(), trained(new, "make_step").parameters())
    assert old.options["decays"] == new.options["decays"]


def test_a_filter_is_not_asked_about_a_parameter_with_a_decay_of_its_own() -> None:
    asked: list[str] = []
    optimizer = ca.AdamW(
        0.1,
        weight_decay=0.5,
        decay_filter=lambda path, _: asked.append(path) is not None,
        groups={"a": {"weight_decay": 2.0}},
    )
    p = optimizer.apply_gradients({"a": mx.zeros((2,)), "b": mx.zeros((2,))}, {"a": mx.ones((2,)), "b": mx.ones((2,))})
    assert asked == ["b"] and p["b"].tolist() == [1.0, 1.0]
    assert p["a"].tolist() == pytest.approx([0.8, 0.8])


def test_groups_in_a_multi_optimizer_are_those_of_its_part() -> None:
    weights = ca.AdamW(0.1, weight_decay=0.0, groups={"0.weight": {"weight_decay": 1.0}})
    p = linear_net().parameters()
    both = optim.MultiOptimizer([weights, ca.Adam(0.1)], [lambda path, _: "weight" in path])
    new = flat(both.apply_gradients(tree_map(mx.zeros_like, p), p))
    for path, before in flat(p).items():
        np.testing.assert_allclose(new[path], before * (0.9 if path == "layers.0.weight" else 1.0), rtol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_has_the_groups(copied: Any) -> None:
    p = {"a": mx.ones((2,)), "b": mx.ones((2,))}
    given = {"a": {"betas": [0.5, 0.7]}}
    optimizer = ca.AdamW(0.1, groups=given)
    given["a"]["betas"][0] = 0.0  # a change of the argument comes too late
    optimizer.options["groups"]["a"]["betas"] = (0.0, 0.0)  # what is returned is a copy
    twin = copied(optimizer)
    assert twin.options == optimizer.options and twin.options["groups"] == {"a": {"betas": (0.5, 0.7)}}
    assert_identical(twin.apply_gradients(p, p), optimizer.apply_gradients(p, p))


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Any) -> None:
    def step(groups: Any) -> ca.TrainStep:
        return ca.make_step(linear_net(), squared_error, ca.AdamW(1e-2, groups=groups))

    whole, first, second = step(OF_NET), step(OF_NET), step(dict(reversed(OF_NET.items())))
    expected = advance(whole, 0, 4)
    losses = advance(first, 0, 2)
    ca.save_checkpoint(tmp_path / "2", first)
    ca.load_checkpoint(tmp_path / "2", second)  # the order of patterns means nothing
    assert losses + advance(second, 2, 4) == expected
    for other in (None, OF_NET | {"2.weight": {"eps": 1e-3}}, OF_NET | {"bias$": {"weight_decay": 0.1}}):
        with pytest.raises(ValueError, match=r"was saved by another run:\n.*\n *groups "):
            ca.load_checkpoint(tmp_path / "2", step(other), allow=["decays"])
        ca.load_checkpoint(tmp_path / "2", step(other), allow=["decays", "groups"])
    ca.save_checkpoint(tmp_path / "0", step(None))
    assert "groups" not in (tmp_path / "0" / "meta.json").read_text()  # as in version 0.1


# Errors.


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("a", {})], r"groups is \[\('a', \{\}\)\]; it must be a mapping of patterns to settings"),
        ({"(": {"eps": 1}}, r"groups has the pattern '\(': missing \)"),
        ({3: {"eps": 1}}, "groups has the pattern 3; it must be a regular expression, as text"),
        ({"a": {}}, r"groups\['a'\] is \{\}; it must be a mapping with one or more of learning_rate, betas, eps"),
        ({"a": 0.1}, r"groups\['a'\] is 0.1; it must be a mapping"),
        ({"a": {"lr": 1}}, r"groups\['a'\] has the key 'lr'; the keys are learning_rate, betas, eps, weight_decay$"),
        ({"a": {"weight_decy": 1}}, r"has the key 'weight_decy'.*; did you mean weight_decay\?"),
        ({"a": {"learning_rate": lambda step: step}}, r"groups\['a'\]\['learning_rate'\] \(a factor\) is <function"),
        ({"a": {"learning_rate": -1}}, r"\(a factor\) is -1; it must be a finite number of at least 0"),
        ({"a": {"betas": 0.9}}, r"groups\['a'\]\['betas'\] is 0.9; it must be two numbers"),
        ({"a": {"betas": (0.9, 1)}}, r"beta2 of groups\['a'\]\['betas'\] is 1; it must be .* less than 1"),
        ({"a": {"eps": "1e-8"}}, r"groups\['a'\]\['eps'\] is '1e-8'.* write it without quotes"),
        ({"a": {"weight_decay": None}}, r"groups\['a'\]\['weight_decay'\] is None"),
        ({"c": {"eps": 1}}, "groups: 'c' matches no parameter; paths look like 'a'"),
        ({"a": {"eps": 1}, "a|b": {"betas": (0, 0)}}, "groups: 'a' is matched by 'a' and 'a|b'; change the patterns"),
        (
            {"^b": {"learning_rate": 1}},
            r"'b' gets its learning_rate from groups\['\^b'\] and from learning_rate_multipliers\['b'\]; leave one",
        ),
    ],
)
def test_wrong_groups_are_named(groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ca.AdamW(0.1, groups=groups, learning_rate_multipliers={"b": 2.0}).init({"a": mx.ones(2), "b": mx.ones(2)})


def test_the_order_of_a_groups_settings_means_nothing() -> None:
    settings = {"eps": 1e-6, "betas": (0.5, 0.9)}
    orders = settings, dict(reversed(settings.items()))
    assert not differences(*(any_optimizer.description(ca.Adam(1e-3, groups={"a": its})) for its in orders))


def test_what_adam_has_no_groups_for() -> None:
    with pytest.raises(
        InputError, match=r"the key 'weight_decay'; the keys are learning_rate, betas, eps; .* in AdamW"
    ):
        ca.Adam(0.1, groups={"a": {"weight_decay": 0.1}})
    optimizer = ca.Adam(0.1, groups={"a": {"eps": 0.1}})
    optimizer.init({"a": mx.ones((2,))})
    with pytest.raises(InputError, match=r"apply_single gets one parameter without a path; .* groups, .* need"):
        optimizer.apply_single(mx.ones((2,)), mx.ones((2,)), optimizer.state["a"])
