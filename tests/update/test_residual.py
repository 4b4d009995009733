from __future__ import annotations

import math

import compiled_adam as ca
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compiled_adam.update import moments, residual
from compiled_adam.update.kernels import LARGE
from hypothesis import given, settings
from hypothesis import strategies as st


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


def test_a_residual_in_bfloat16_would_lose_movement() -> None:
    """What docs/numerics.md says of 2000 steps of 1e-5, for weights that are uniform in 0.05 to 1."""
    start = mx.random.uniform(0.05, 1.0, (4096,)).astype(mx.bfloat16)
    ours, simple = (start, residual.zeros(start)), (start, mx.zeros_like(start))
    for _ in range(2000):
        ours = residual.split(residual.join(*ours) - 1e-5, *ours)
        whole = simple[0].astype(mx.float32) + simple[1] - 1e-5
        weight = whole.astype(mx.bfloat16)
        simple = weight, (whole - weight).astype(mx.bfloat16)
        mx.eval(ours, simple)
    moved, would_have = (
        (start.astype(mx.float32) - now).mean().item() / 0.02
        for now in (residual.join(*ours), simple[0].astype(mx.float32) + simple[1])
    )
    # float32 itself rounds each step by up to 3e-8 of 1e-5.
    assert moved == pytest.approx(1, abs=3e-3) and would_have == pytest.approx(0.945, abs=0.005)


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


# Every weight with a residual that may be another's.

EVERY = mx.arange(65536).astype(mx.uint16)
# Small ones, extremes, the last that the largest float16 can have, and a spread.
RESIDUALS = sorted({0, 1, 2, 3, 255, 16379, 16380, 16388, 16389, 32766, 32767, *range(541, 32768, 1193)})
RESIDUALS = [*RESIDUALS, *(-r for r in RESIDUALS), -32768]
JOINS = {
    "join": residual.join,
    "fusable_join": residual.fusable_join,
    "compiled": mx.compile(residual.join),
    "fused": mx.compile(lambda w, r: residual.fusable_join(w, r)),
}


def every_weight(dtype: mx.Dtype, steps: int) -> tuple[mx.array, mx.array]:
    zero, kind = residual._ZERO[dtype]
    return EVERY.view(dtype), mx.full((65536,), zero + steps, kind)


def expected_of_bfloat16(bits: np.ndarray, steps: int) -> np.ndarray:
    """In float64, by the definition: a weight is an integer, of which the residual is counted on in 65536ths."""
    magnitude, sign = (bits & 0x7FFF).astype(np.int64), np.where(bits >> 15, -1.0, 1.0)
    patterns = np.where((magnitude == 0) | (magnitude >= 0x7F80), magnitude << 16, (magnitude << 16) + steps)
    exponents, fractions = patterns >> 23, patterns & 0x7FFFFF
    values = np.ldexp((fractions + (exponents > 0) * 2.0**23), (np.maximum(exponents, 1) - 150).astype(int))
    values = np.where(exponents == 255, np.where(fractions == 0, np.inf, np.nan), values)
    return sign * values


def expected_of_float16(bits: np.ndarray, steps: int) -> np.ndarray:
    """In float64, by the definition; with what is foreign for sure left out."""
    weights = bits.view(np.float16).astype(np.float64)
    weights[~np.isfinite(weights)] = 0  # those are tested by themselves
    units = np.maximum(np.abs(weights), 2.0**-14) * 2.0**-11 / 32767
    foreign = (weights == 0) & ((bits >> 15 == 1) == (steps >= 0))
    foreign |= (np.abs(weights) == 65504) & (abs(steps) > 16388)
    return np.where(foreign, weights, weights + max(steps, -32767) * units)


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_every_weight_with_any_residual_is_harmless(dtype: mx.Dtype, name: str) -> None:
    bits = np.array(EVERY)
    weights = np.array(EVERY.view(dtype).astype(mx.float32))
    finite, number = np.isfinite(weights), ~np.isnan(weights)
    for steps in RESIDUALS:
        weight, rest = every_weight(dtype, steps)
        joined = JOINS[name](weight, rest)
        values = np.array(joined)
        assert np.array_equal(np.isnan(values), ~number), steps
        assert np.array_equal(values[number & ~finite], weights[number & ~finite]), steps
        assert np.isfinite(values[finite]).all(), steps
        zeros = values[weights == 0]
        assert np.array_equal(np.signbit(zeros), [False, True]), steps
        if dtype == mx.bfloat16:
            # Exactly, to the bit, signs of zero and denormals included.
            assert np.array_equal(values, expected_of_bfloat16(bits, steps), equal_nan=True), steps
            assert not zeros.any(), steps
        else:
            expected, w = expected_of_float16(bits, steps)[finite], weights[finite]
            # Float32's rounding of the sum, and of the unit and its multiple.
            assert (np.abs(values[finite] - expected) <= np.abs(w) * 2.0**-24 + np.abs(expected - w) * 2.0**-22).all()
        # Split again it is at most the next weight: one unit in the last place, and never infinite.
        again, _ = residual.split(joined, weight, rest)
        moved = np.abs(np.array(again.view(mx.uint16)).astype(int) - bits)
        assert moved[finite].max() <= (dtype == mx.float16), steps
        assert np.isfinite(np.array(again.astype(mx.float32)))[finite].all(), steps
        assert moved[weights == 0].max() == 0, steps


@pytest.mark.parametrize("name", ["fusable_join", "compiled", "fused"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_all_joins_have_the_same_bits(dtype: mx.Dtype, name: str) -> None:
    for steps in RESIDUALS:
        pair = every_weight(dtype, steps)
        assert mx.array_equal(JOINS[name](*pair).view(mx.uint32), residual.join(*pair).view(mx.uint32)).item(), steps


def patterns(dtype: mx.Dtype) -> mx.array:
    """Float32 values of every exponent, denormals, and around what is special for the dtype."""
    every = moments.random_bits(mx.random.key(0), (500_000,))
    ends = [0.0, -0.0, 1e-45, 2.0**-126, 2.0**-133, 2.0**-134, 65504.0, 65519.99, 65520.0, 3.3895e38, 3.4028e38]
    near = mx.concatenate([mx.array(ends).view(mx.uint32) + i for i in range(4)])
    values = mx.concatenate([every, near, near | 0x80000000]).view(mx.float32)
    if dtype == mx.float16:
        scaled = mx.random.normal((500_000,)) * 2.0 ** mx.random.uniform(-30, 16, (500_000,))
        return mx.concatenate([values, scaled])
    return values


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_every_value_that_was_split_is_joined_again(dtype: mx.Dtype, name: str) -> None:
    values = patterns(dtype)
    weight, rest = stored(values, dtype)
    found, x, w = (np.array(a) for a in (JOINS[name](weight, rest), values, weight.astype(mx.float32)))
    assert np.array_equal(np.isnan(found), np.isnan(x))
    if dtype == mx.bfloat16:
        whole = np.isfinite(w) & (w != 0)  # what rounds to infinity or zero is that
        assert np.array_equal(found[whole].view(np.uint32), x[whole].view(np.uint32))
        assert np.array_equal(found[~whole], w[~whole], equal_nan=True)
        assert np.abs(x[w == 0]).max() < 2.0**-134
    else:
        finite = np.isfinite(w)
        assert np.array_equal(found[~finite], w[~finite], equal_nan=True)
        large = finite & (np.abs(x) >= 2.0**-14)
        assert np.array_equal(found[large], x[large])
        small = finite & ~large
        # Half a step, and float32's rounding of the sum.
        assert np.all(np.abs(found[small] - x[small]) <= 2.0**-41 * 1.01 + np.abs(x[small]) * 2.0**-24)
        assert np.array_equal(np.array(rest)[~finite], np.full((~finite).sum(), 32768))


def test_a_value_that_is_not_a_number_never_becomes_infinite() -> None:
    low = mx.array([0x7F800001, 0x7F80FFFF, 0xFF800001, 0xFFBFFFFF], mx.uint32).view(mx.float32)
    for dtype in (mx.bfloat16, mx.float16):
        weight, rest = stored(low, dtype)
        assert mx.all(mx.isnan(weight)).item() and mx.all(mx.isnan(residual.join(weight, rest))).item()


# Weights that somebody sets between updates, while the optimizer has the residuals of the old ones.


def set_to_zero(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.zeros_like(weight)


def masked(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, weight, mx.zeros_like(weight))


def negative_zero(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, weight, -mx.zeros_like(weight))


def clamped(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.clip(weight, -0.25, 0.25)


def positive(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.maximum(weight, 0)


def begun_anew(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return start


def largest(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, mx.sign(weight) * mx.finfo(weight.dtype).max, weight)


def denormal(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    least = 2.0**-133 if weight.dtype == mx.bfloat16 else 2.0**-24
    return (mx.sign(weight).astype(mx.float32) * least * 5).astype(weight.dtype)


def infinite(weight: mx.array, start: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, -math.inf, weight).astype(weight.dtype)


def ordered(weight: mx.array) -> np.ndarray:
    """Integers in the weights' order, neighbours one apart; both zeros are 0."""
    bits = np.array(weight.view(mx.uint16)).astype(int)
    return np.where(bits >> 15, -(bits & 0x7FFF), bits)


CHANGES = [set_to_zero, masked, negative_zero, clamped, positive, begun_anew, largest, denormal, infinite]


@pytest.mark.parametrize("lowering", ["auto", "fused", "inplace"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("how", ["called", "make_step"])
def test_weights_that_are_set_between_updates(dtype: mx.Dtype, lowering: str, how: str) -> None:
    model = nn.Module()
    # Two that a step packs, and two that are large: in place on the CPU, on both streams.
    for name, shape in {"small": (7,), "other": (30, 10), "large": (LARGE,), "larger": (3, LARGE)}.items():
        model[name] = mx.random.normal(shape).astype(dtype)
    start = dict(model.parameters())
    masks = {name: mx.random.uniform(shape=a.shape) > 0.5 for name, a in start.items()}
    factors = {name: mx.random.normal(a.shape).astype(dtype) for name, a in start.items()}
    optimizer = ca.AdamW(1e-3, skip_nonfinite=True, lowering=lowering)

    def loss_fn(model: nn.Module, scale: mx.array) -> mx.array:  # its gradient is finite, whatever the weights are
        return scale * sum(((w - mx.stop_gradient(w)) * factors[name]).sum() for name, w in model.items())

    step = ca.make_step(model, loss_fn, optimizer)

    def update(i: int) -> None:
        scale = mx.array([1.0, 0.5, -2.0][i % 3], dtype)
        if how == "make_step":
            step(scale)
        else:
            optimizer.update(model, {name: f * scale for name, f in factors.items()})
        mx.eval(model.parameters(), optimizer.state)

    for change in CHANGES:
        optimizer.weight_decay = 0.0 if change is infinite else 0.01  # 0 times infinity is not a number
        model.update(start)
        optimizer.learning_rate = 1e-3
        for i in range(3):
            update(i)
        wanted = {name: change(a, start[name], masks[name]) for name, a in model.parameters().items()}
        model.update(wanted)
        optimizer.learning_rate = 0.0
        for i in range(2):
            update(i)
        for name, array in wanted.items():
            found, expected = ordered(model[name]), ordered(array)
            # At most a unit in the last place; bfloat16, zero and what is infinite, exactly.
            assert np.abs(found - expected).max() <= (dtype == mx.float16), (change, name)
            same = (expected == 0) | np.isinf(np.array(array.astype(mx.float32)))
            assert np.array_equal(found[same], expected[same]), (change, name)
        optimizer.learning_rate = 1e-3
        for i in range(3):
            update(i)
        for name, array in wanted.items():
            assert mx.all(mx.isfinite(model[name]) == mx.isfinite(array)).item(), (change, name)
            assert not mx.any(mx.isnan(model[name])).item(), (change, name)
    assert optimizer.skipped.item() == 0
