from __future__ import annotations

import compiled_adam as ca
import mlx.core as mx
import numpy as np
import pytest
from compiled_adam.update import moments

SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (64, 65), (3, 5, 7, 11)]


def some(shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    m = mx.random.normal(shape, key=mx.random.key(1)) * 1e-3
    return m, mx.square(mx.random.normal(shape, key=mx.random.key(2)) * 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "8bit"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_encoding_keeps_shapes_and_is_as_fine_as_it_says(kind: str, shape: tuple[int, ...], stochastic: bool) -> None:
    m, v = some(shape)
    bits = moments.random_bits(mx.random.key(0), shape) if stochastic else None
    stored = moments.encode(kind, m, v, bits)
    assert stored["m"].shape == stored["v"].shape == shape
    assert moments.is_stored(stored, kind, shape)
    decoded_m, decoded_v = moments.decode(stored)
    if m.size == 0:
        return
    # One code, or half of one when rounded to nearest: of the largest in a block for 8 bits, of the value otherwise.
    # float16: v is rounded to multiples of 2^-24, and the root of half of that is 2^-12.5.
    part = 1.0 if stochastic else 0.5
    largest = mx.abs(m).max().item(), mx.sqrt(v).max().item()
    step_m, step_v = {
        "float32": (0.0, 0.0),
        "bfloat16": (2.0**-7 * largest[0], 2.0**-7 * largest[1]),
        "float16": (2.0**-10 * largest[0], 2 * 2.0**-12.5),
        "8bit": (largest[0] / 127, largest[1] / 255),
    }[kind]
    assert mx.abs(decoded_m - m).max().item() <= 1.001 * part * step_m
    assert mx.abs(mx.sqrt(decoded_v) - mx.sqrt(v)).max().item() <= 1.001 * max(part, 0.5) * step_v


@pytest.mark.parametrize("kind", ["bfloat16", "8bit"])
def test_stochastic_rounding_is_unbiased(kind: str) -> None:
    # 4096 roundings of each of two values between codes, the first of which sets the scale of its block.
    m = mx.broadcast_to(mx.array([1.0, 0.3331]), (4096, 2)) * 0.777
    v = mx.square(m)
    decoded_m, decoded_v = moments.decode(moments.encode(kind, m, v, moments.random_bits(mx.random.key(3), m.shape)))
    step = 2.0**-9 if kind == "bfloat16" else 1 / 127
    # The mean of 4096 roundings has a standard deviation of at most half a step / 64; five of them.
    assert mx.abs(decoded_m.mean(axis=0) - m[0]).max().item() < 5 * step / 128
    assert mx.abs(mx.sqrt(decoded_v).mean(axis=0) - mx.sqrt(v[0])).max().item() < 5 * step / 128
    assert len(set(decoded_m[:, 1].tolist())) == 2


def test_random_bits_are_uniform_and_depend_on_the_key() -> None:
    bits = moments.random_bits(mx.random.key(0), (100, 101))
    assert bits.dtype == mx.uint32 and bits.shape == (100, 101)
    assert not mx.array_equal(bits, moments.random_bits(mx.random.key(1), (100, 101))).item()
    for shift in range(32):
        ones = ((bits >> shift) & 1).astype(mx.float32).mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / 100  # five standard deviations


def test_a_second_moment_of_code_zero_is_not_zero() -> None:
    v = mx.array([1.0] + [1e-9] * 127)
    _, decoded = moments.decode(moments.encode("8bit", v, v))
    assert decoded.min().item() == pytest.approx((0.5 / 255) ** 2, rel=1e-6)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "8bit", "param"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "8bit", "param"])
def test_a_state_of_one_policy_continues_in_another(source: str, target: str) -> None:
    p = {"w": mx.random.normal((64, 65)).astype(mx.bfloat16)}
    first, second = ca.Adam(1e-3, moments=source), ca.Adam(1e-3, moments=target)
    for i in range(3):
        p = first.apply_gradients({"w": mx.random.normal((64, 65), key=mx.random.key(i)).astype(mx.bfloat16)}, p)
    before = moments.decode(first.state["w"])
    second.state = {**first.state, "w": dict(first.state["w"])}
    second.init(p)
    for a, b in zip(before, moments.decode(second.state["w"]), strict=True):
        # The coarsest of the forms: 1/255 of the largest root, 2^-8 relative.
        assert mx.abs(mx.sqrt(mx.abs(a)) - mx.sqrt(mx.abs(b))).max().item() < 0.13 * mx.sqrt(mx.abs(a)).max().item()
    second.apply_gradients(p, p)
    assert ("m_scale" in second.state["w"]) == (target == "8bit")


def bytes_per_parameter(dtype: mx.Dtype, **options) -> float:
    p = {"w": mx.zeros((512, 512), dtype)}
    optimizer = ca.Adam(1e-3, **options)
    optimizer.init(p)
    return sum(array.nbytes for array in optimizer.state["w"].values()) / p["w"].size


def test_bytes_per_parameter() -> None:
    # The table of docs/numerics.md.
    for dtype, compensated, expected in (
        (mx.float32, True, {"float32": 8, "bfloat16": 4, "8bit": 2.0625, "param": 8}),
        (mx.bfloat16, False, {"float32": 8, "bfloat16": 4, "8bit": 2.0625, "param": 4}),
        (mx.bfloat16, True, {"float32": 10, "bfloat16": 6, "8bit": 4.0625, "param": 6}),
    ):
        for policy, size in expected.items():
            assert bytes_per_parameter(dtype, moments=policy, compensated=compensated) == size


def test_small_leaves_stay_float32() -> None:
    p = {"bias": mx.zeros((4095,)), "weight": mx.zeros((4096,))}
    optimizer = ca.Adam(1e-3, moments="8bit")
    optimizer.init(p)
    assert optimizer.state["bias"]["m"].dtype == mx.float32 and optimizer.state["weight"]["m"].dtype == mx.int8


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "bfloat16", "8bit"])
def test_a_moving_average_does_not_stall_in_20_000_steps(policy: str) -> None:
    # Large gradients for 3000 steps, then 30 times smaller ones: v must fall by a factor of 900, in steps of 0.1 %.
    shape = (8192,)
    small = [mx.random.normal(shape, key=mx.random.key(i)) * 1e-2 + 1e-3 for i in range(64)]
    large = [30 * g for g in small]
    p = {"w": mx.zeros(shape)}
    optimizer = ca.Adam(0.0, moments=policy)
    optimizer.init(p)
    reference = np.zeros(shape), np.zeros(shape)
    squares = [[np.square(np.array(g, np.float64)) for g in group] for group in (large, small)]
    for step in range(20_000):
        optimizer.apply_gradients({"w": (large if step < 3000 else small)[step % 64]}, p)
        mx.async_eval(optimizer.state)
        reference = reference[0], 0.999 * reference[1] + 0.001 * squares[step >= 3000][step % 64]
    _, v = moments.decode(optimizer.state["w"])
    assert reference[1].mean() == pytest.approx(1.01e-4, rel=0.02)
    # The mean over 8192 averages, each with a standard deviation of up to 10 % (8 bits): 0.1 %; five of them, and the
    # bias of squaring a root that was rounded without bias, which is the variance: up to 1 %.
    assert v.mean().item() == pytest.approx(reference[1].mean(), rel=0.015)
    assert (1 / mx.sqrt(v)).mean().item() == pytest.approx((1 / np.sqrt(reference[1])).mean(), rel=0.015)


def test_rounded_to_nearest_it_does_stall() -> None:
    # Why the above is needed: the dtype of the parameter, as in MLX, never comes down again.
    p = {"w": mx.zeros((256,), mx.bfloat16)}
    optimizer = ca.Adam(0.0, moments="param")
    for step in range(4000):
        optimizer.apply_gradients({"w": mx.full((256,), 1.0 if step < 1000 else 0.01, mx.bfloat16)}, p)
        mx.async_eval(optimizer.state)
    assert moments.decode(optimizer.state["w"])[1].mean().item() > 0.1  # instead of 0.03
