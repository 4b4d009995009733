"""Clipping, the guard against non-finite gradients, and parameter groups."""

from __future__ import annotations

import math

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.update import moments
from mlx.utils import tree_map
from reference import Reference
from trees import assert_identical, copied, flat

POLICIES = moments.POLICIES


# Clipping.


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_is_by_the_global_norm(dtype: mx.Dtype, max_norm: float) -> None:
    p = {"a": mx.ones((64,), dtype), "b": [mx.ones((3, 3), dtype)]}
    clipping, plain = ca.Adam(1e-2, max_grad_norm=max_norm), ca.Adam(1e-2)
    q = r = p
    for step in range(5):
        g = tree_map(lambda x: mx.random.normal(x.shape, key=mx.random.key(step)).astype(dtype), p)  # noqa: B023
        norm = math.sqrt(sum(float(np.square(x.astype(np.float64)).sum()) for x in flat(g).values()))
        factor = min(1.0, max_norm / norm)
        q = clipping.apply_gradients(g, q)
        r = plain.apply_gradients(tree_map(lambda x: x.astype(mx.float32) * factor, g), r)  # noqa: B023
        assert clipping.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    for path, array in flat(clipping.state).items():
        if path.endswith((".m", ".v")):
            np.testing.assert_allclose(array, flat(plain.state)[path], rtol=1e-5, atol=1e-12)  # float32, five steps
    assert clipping.skipped.item() == 0


def test_the_norm_of_float16_gradients_whose_squares_overflow() -> None:
    p = {"w": mx.zeros((100,), mx.float16)}
    optimizer = ca.Adam(1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    q = optimizer.apply_gradients({"w": mx.full((100,), 60_000.0, mx.float16)}, p)
    assert optimizer.grad_norm.item() == pytest.approx(6e5, rel=2.0**-10)  # 60 000 in float16
    assert optimizer.skipped.item() == 0
    assert mx.all(q["w"] < 0).item()


def test_gradients_whose_squares_overflow_float32_are_clipped_to_zero_not_to_nan() -> None:
    p = {"w": mx.zeros((10,))}
    optimizer = ca.Adam(1e-2, max_grad_norm=1.0)
    q = optimizer.apply_gradients({"w": mx.full((10,), 1e30)}, p)
    assert mx.array_equal(q["w"], p["w"]).item()


# The guard.


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_nonfinite_gradient_in_any_leaf_changes_no_bit(
    dtype: mx.Dtype, policy: str, bad: float, clip: float | None
) -> None:
    def gradients(step: int) -> dict:
        keys = iter(mx.random.split(mx.random.key(step), 3))
        return tree_map(lambda x: mx.random.normal(x.shape, key=next(keys)).astype(dtype), p)

    p = {
        "large": mx.random.normal((64, 64)).astype(dtype),
        "zero": mx.array([0.0, -0.0], dtype),
        "one": mx.ones((), dtype),
    }
    options = {"moments": policy, "skip_nonfinite": True, "max_grad_norm": clip, "bias_correction": True}
    guarded, untouched = ca.AdamW(1e-2, **options), ca.AdamW(1e-2, **options)
    q, r = p, p
    for step, leaf in enumerate(p):  # at the first step too, where v is 0
        g = gradients(10 + step)
        g[leaf] = mx.where(mx.arange(max(g[leaf].size, 1)).reshape(g[leaf].shape) == 0, bad, g[leaf])
        before, state = copied(q), copied(guarded.state)
        q = guarded.apply_gradients(g, q)
        if step:
            assert_identical(q, before)
            for name in ("grad_norm", "skipped"):
                state.pop(name)
            assert_identical({k: v for k, v in guarded.state.items() if k not in ("grad_norm", "skipped")}, state)
        assert guarded.skipped.item() == step + 1
        assert not math.isfinite(guarded.grad_norm.item())
        # The next good step is as if it had not happened.
        g = gradients(step)
        q, r = guarded.apply_gradients(g, q), untouched.apply_gradients(g, r)
        assert_identical(q, r)
    assert guarded.step.item() == 3
    assert guarded.traces == 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_nan_batch_in_make_step_is_skipped(accumulate: int) -> None:
    def make() -> ca.TrainStep:
        mx.random.seed(3)
        model = nn.Linear(4, 1)
        optimizer = ca.AdamW(1e-2, skip_nonfinite=True, max_grad_norm=1.0, moments="bfloat16")
        return ca.make_step(model, lambda model, x: mx.square(model(x) - 1).mean(), optimizer, accumulate=accumulate)

    def good(i: int) -> mx.array:
        return mx.random.normal((8, 4), key=mx.random.key(i))

    step, reference = make(), make()
    for i in range(6):
        if i == 3:  # within a window, or as one
            for j in range(accumulate):
                result = step(mx.full((8, 4), math.nan) if j == accumulate - 1 else good(j))
            assert result.updated and result.skipped.item() == 1 and math.isnan(result.grad_norm.item())
        for j in range(accumulate):
            result, expected = step(good(10 * i + j)), reference(good(10 * i + j))
    assert_identical(step.model.parameters(), reference.model.parameters())
    assert result.grad_norm.item() == expected.grad_norm.item()
    assert (result.skipped.item(), expected.skipped.item()) == (1, 0)
    assert step.traces["grad"] == step.traces["update"] == 1


# Groups.


def test_decay_filter_and_multipliers_are_parameter_groups() -> None:
    p = {"embed": {"weight": mx.ones((4, 4))}, "up": {"weight": mx.ones((4, 4)), "bias": mx.ones((4,))}}
    g = tree_map(lambda x: mx.full(x.shape, 0.5), p)
    optimizer = ca.AdamW(
        1e-2,
        weight_decay=0.1,
        decay_filter=ca.decay_matrices,
        learning_rate_multipliers={r"^up\.weight$": 2.0, "embed": 0.0},
    )
    reference = {
        "embed.weight": Reference({"w": np.ones(())}, 0.0),
        "up.weight": Reference({"w": np.ones(())}, 2e-2, weight_decay=0.1),
        "up.bias": Reference({"w": np.ones(())}, 1e-2),
    }
    for _ in range(3):
        p = optimizer.apply_gradients(g, p)
        for each in reference.values():
            each.update({"w": np.array(0.5)})
    for path, array in flat(p).items():
        np.testing.assert_allclose(array, reference[path].parameters["w"], rtol=1e-6, err_msg=path)  # float32
    assert optimizer.traces == 1


def test_a_decay_filter_is_asked_once_for_each_parameter() -> None:
    asked = []
    p = {"a": mx.ones((2,)), "b": mx.ones((2, 2))}
    optimizer = ca.AdamW(1e-2, decay_filter=lambda path, parameter: bool(asked.append((path, parameter.shape))))
    for _ in range(3):
        p = optimizer.apply_gradients(p, p)
    assert sorted(set(asked)) == [("a", (2,)), ("b", (2, 2))]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ({"nothing": 2.0}, "'nothing' matches no parameter; paths look like 'up.weight'"),
        ({"up": 2.0, "weight": 3.0}, "'up.weight' is matched by 'up' and 'weight'"),
    ],
)
def test_multiplier_patterns_must_match_once(multipliers: dict, message: str) -> None:
    p = {"up": {"weight": mx.ones((2, 2))}}
    with pytest.raises(ValueError, match=message):
        ca.Adam(1e-2, learning_rate_multipliers=multipliers).init(p)
    with pytest.raises(ValueError, match=message):
        ca.Adam(1e-2, learning_rate_multipliers=multipliers).apply_gradients(p, p)
