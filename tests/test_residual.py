from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_adam import residual


def stored(values: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    old = mx.zeros(values.shape, dtype)
    return residual.split(values, old, residual.zeros(old))


def many(largest: float) -> mx.array:
    """Values of both signs over many binades, and what lies around powers of two and ties."""
    spread = mx.random.normal((100_000,)) * mx.exp(4 * mx.random.normal((100_000,)))
    spread = mx.clip(spread, -largest, largest)
    powers = mx.array([s * 2.0**e for e in range(-12, 12) for s in (1, -1)])
    around = [powers * (1 + step * 2.0**-24) for step in (-3, -2, -1, 0, 1, 2, 3)]
    ties = [powers * (1 + 2.0**-8 + step * 2.0**-23) for step in (-1, 0, 1)]
    return mx.concatenate([spread, *around, *ties])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_weight_is_the_rounded_value(dtype: mx.Dtype) -> None:
    values = many(60_000.0)
    weight, _ = stored(values, dtype)
    nearest = values.astype(dtype)
    same = weight == nearest
    # MLX takes the even neighbour at a tie, bfloat16 here the one farther from zero: both are as near.
    tie = mx.abs(values - weight.astype(mx.float32)) == mx.abs(values - nearest.astype(mx.float32))
    assert mx.all(same | tie).item()
    assert same.astype(mx.float32).mean().item() > 0.999


def test_bfloat16_and_residual_are_the_float32_value() -> None:
    values = many(1e30)
    assert mx.array_equal(residual.join(*stored(values, mx.bfloat16)), values).item()


def test_the_join_for_fused_kernels_gives_the_same_bits() -> None:
    values = many(1e30)
    weight, steps = stored(values, mx.bfloat16)
    assert mx.array_equal(residual.fusable_join(weight, steps), residual.join(weight, steps)).item()
    extremes = mx.array([-32768, -32767, -1, 0, 1, 32767], mx.int16)
    weights = mx.array([s * 2.0**e * f for s in (1, -1) for e in (-101, -1, 0, 1, 100) for f in (1.0, 1.5, 1.9921875)])
    weight = mx.repeat(weights.astype(mx.bfloat16), extremes.size)
    steps = mx.tile(extremes, weights.size)
    assert mx.array_equal(residual.fusable_join(weight, steps), residual.join(weight, steps)).item()


def test_what_is_not_a_number_stays_so() -> None:
    # The second is what NVIDIA's GPUs make; rounded up as an integer it would become -0.
    values = mx.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000], mx.uint32).view(mx.float32)
    weight, steps = stored(values, mx.bfloat16)
    assert mx.all(mx.isnan(weight)).item()
    assert mx.all(mx.isnan(residual.join(weight, steps))).item()


def test_float16_and_residual_are_finer_than_float32() -> None:
    values = many(60_000.0)
    values = mx.where(mx.abs(values) < 1e-3, 1e-3, values)  # float32 goes on where float16 ends
    assert mx.array_equal(residual.join(*stored(values, mx.float16)), values).item()
    tiny = mx.random.normal((10_000,)) * 1e-6
    # Below 2^-14 the unit is constant: 2^-25 / 32767, and half of that is the error.
    assert mx.abs(residual.join(*stored(tiny, mx.float16)) - tiny).max().item() <= 2.0**-41 * 1.01


@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        (mx.bfloat16, [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-30, 3.38e38, -3.38e38]),
        (mx.float16, [0.0, -0.0, 1e-45, 1e-8, -6e-8, 1e-7, 65503.0, -65519.0]),
    ],
)
def test_zero_tiny_and_huge_weights(dtype: mx.Dtype, special: list[float]) -> None:
    values = mx.array(special)
    weight, steps = stored(values, dtype)
    joined = residual.join(weight, steps)
    assert mx.all(mx.isfinite(joined)).item()
    assert weight[:2].tolist() == joined[:2].tolist() == [0, 0]
    assert mx.array_equal(steps[:2], residual.zeros(weight[:2])).item()
    # Half a unit in the last place of the weight at most, whatever the residual adds.
    assert np.allclose(np.array(joined), special, rtol=2.0**-8, atol=2.0**-25 if dtype == mx.float16 else 2.0**-100)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_infinite_weights_stay_infinite(dtype: mx.Dtype) -> None:
    weight = mx.array([math.inf, -math.inf, 1.0], dtype)
    steps = residual.zeros(weight)
    for _ in range(3):
        weight, steps = residual.split(residual.join(weight, steps), weight, steps)
    assert residual.join(weight, steps).tolist() == [math.inf, -math.inf, 1.0]


@settings(max_examples=200, deadline=None)
@given(st.floats(-60_000, 60_000, width=32), st.sampled_from([mx.bfloat16, mx.float16]))
def test_splitting_what_was_joined_changes_nothing(value: float, dtype: mx.Dtype) -> None:
    first = stored(mx.array([value]), dtype)
    second = stored(residual.join(*first), dtype)
    assert first[0].item() == second[0].item()
    # One step of the unit, where float32 is coarser than it (float16) or the last bit was lost (bfloat16).
    assert abs(residual.join(*first).item() - residual.join(*second).item()) <= abs(value) * 2.0**-23 + 2.0**-40
